"""What an optimizer's own arithmetic must say, so that plans can be made for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastfreeze.layers.groups import Group
from fastfreeze.ops._library import Backend
from fastfreeze.schedule import Segment


@dataclass
class Planned:
    """The parameters of one plan, as this process holds them.

    Attributes:
        params: the tensors to update.
        moments: by the name that the state has for them, what is kept of each parameter; None
            where it has never had a gradient, or where its group keeps none.
        first: whether a parameter's moments are still uninitialised memory.
        steps: float32 [n], how many steps each parameter has taken; None unless the rule counts.
        groups: each parameter's.
        segments: each group's schedule; empty where there is none.
        eta_min, warmup_steps: the schedule's.
        state_dtype: the moments' dtype of 16-bit parameters; None for the parameters'.
    """

    params: list[Tensor]
    moments: dict[str, list[Tensor | None]]
    first: list[bool]
    steps: Tensor | None
    groups: list[int]
    segments: Sequence[tuple[Segment, ...]]
    eta_min: float
    warmup_steps: int
    state_dtype: torch.dtype | None


class UpdateRule(ABC):
    """One update rule: its hyperparameters, what it keeps of a parameter, and its plans."""

    name: ClassVar[str]  # torch's and ours
    required: ClassVar[Sequence[str]]  # keys of groups by which a state is known as this rule's
    added_since: ClassVar[Mapping[str, Any]]  # keys that older states lack, and what they meant
    keys: ClassVar[Sequence[str]]  # what the update depends on in a group, without lr
    hypers: ClassVar[Sequence[str]]  # columns of its plans' table of hyperparameters
    plans: ClassVar[Mapping[Backend, Any]]
    moments: ClassVar[Mapping[str, str]]  # by name in the state: a plan's attribute with all
    together: ClassVar[Sequence[str]] = ()  # moments of which a state has all or none
    takes_sparse: ClassVar[bool]  # gradients
    counter: ClassVar[str | None] = None  # the state's name for a parameter's own step

    @abstractmethod
    def kept(self, group: Group) -> Sequence[str]:
        """Names of the moments that a parameter of this group has."""

    @abstractmethod
    def row(self, group: Group) -> list[float]:
        """A group's row of the table, as :attr:`hypers` names its columns."""

    @abstractmethod
    def spec(self, planned: Planned) -> Any:
        """What the plans take."""
