"""What an Adam plan is made for, and the plans of the host: the C++ kernel's and the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfreeze.schedule import Segment

# Columns of a plan's table of hyperparameters, as csrc/adam_tables.h reads them.
ADAM_HYPERS = (
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "decoupled",
    "maximize",
    "amsgrad",
    "initial_lr",
)


@dataclass
class AdamSpec:
    """What a plan is made for.

    Attributes:
        params: the tensors to update.
        exp_avgs, exp_avg_sqs: their moments; None where a parameter has never had a gradient.
        max_exp_avg_sqs: the same, and None where the group has no amsgrad.
        steps: float32 [n], how many steps each parameter has taken; a plan's steps advance it.
            Where it is 0 a kernel takes the moments as 0, whatever their memory holds.
        groups: each parameter's group, an index into the table of hyperparameters.
        segments: each group's schedule; empty where the table's lr counts, which is everywhere or
            nowhere.
        eta_min: the schedule's lower bound.
        state_dtype: the moments' dtype; None for the parameters'.
    """

    params: list[Tensor]
    exp_avgs: list[Tensor | None]
    exp_avg_sqs: list[Tensor | None]
    max_exp_avg_sqs: list[Tensor | None]
    steps: Tensor
    groups: list[int]
    segments: Sequence[tuple[Segment, ...]]
    eta_min: float
    state_dtype: torch.dtype | None

    @property
    def scheduled(self) -> bool:
        """Whether the schedule sets the learning rates."""
        return any(self.segments)
