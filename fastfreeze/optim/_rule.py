"""What an optimizer's own arithmetic must say, so that plans can be made for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastfreeze.kernels.plans import Rule
from fastfreeze.layers.groups import Group


class UpdateRule(ABC):
    """One update rule: its hyperparameters, and what it keeps of a parameter."""

    name: ClassVar[str]  # torch's and ours
    required: ClassVar[Sequence[str]]  # keys of groups by which a state is known as this rule's
    keys: ClassVar[Sequence[str]]  # what the update depends on in a group, without lr
    kernel: ClassVar[Rule]
    moments: ClassVar[Sequence[str]]  # the state's names of all that may be kept, in plans' order
    together: ClassVar[Sequence[str]] = ()  # moments of which a state has all or none
    counter: ClassVar[str | None] = None  # the state's name for a parameter's own step

    @abstractmethod
    def kept(self, group: Group) -> Sequence[str]:
        """Names of the moments that a parameter of this group has."""

    @abstractmethod
    def values(self, group: Group) -> Mapping[str, Any]:
        """A group's hyperparameters by the columns of the kernel's table; 0 where there is none."""

    def row(self, g: int, group: Group) -> list[float]:
        """Group ``g``'s row of the table; ValueError, with its values, if one is no number."""
        try:
            values = self.values(group)
            return [float(values.get(name, 0.0)) for name in self.kernel.hypers]
        except (TypeError, ValueError, RuntimeError) as error:
            given = {name: group[name] for name in ("lr", *self.keys) if name in group}
            raise ValueError(f"parameter group {g} has bad values in {given}: {error}") from error
