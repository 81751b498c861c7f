"""What an optimizer's own arithmetic must say, so that plans can be made for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from fastfreeze.kernels.library import Backend
from fastfreeze.kernels.plans import Plan
from fastfreeze.layers.groups import Group


class UpdateRule(ABC):
    """One update rule: its hyperparameters, what it keeps of a parameter, and its plans."""

    name: ClassVar[str]  # torch's and ours
    required: ClassVar[Sequence[str]]  # keys of groups by which a state is known as this rule's
    keys: ClassVar[Sequence[str]]  # what the update depends on in a group, without lr
    hypers: ClassVar[Sequence[str]]  # columns of its plans' table of hyperparameters
    plans: ClassVar[Mapping[Backend, type[Plan]]]
    moments: ClassVar[Sequence[str]]  # the state's names of all that may be kept, in plans' order
    together: ClassVar[Sequence[str]] = ()  # moments of which a state has all or none
    takes_sparse: ClassVar[bool]  # gradients
    counter: ClassVar[str | None] = None  # the state's name for a parameter's own step

    @abstractmethod
    def kept(self, group: Group) -> Sequence[str]:
        """Names of the moments that a parameter of this group has."""

    @abstractmethod
    def row(self, group: Group) -> list[float]:
        """A group's row of the table, as :attr:`hypers` names its columns."""
