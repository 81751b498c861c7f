"""What FreezeOut can save at most: the steps of the suffixes alone, weighed by the schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import interleave
from benchmarks.training_rivals import HYPERS, LR, Task
from fastfreeze.schedule import Schedule


@dataclass(frozen=True)
class CutTimes:
    """Seconds with the first k layers frozen, for each k from 0 to all but the head.

    Attributes:
        suffix: forward, backward and update of the layers behind, on ready inputs.
        prefix: forward of the k layers, in eval mode and without autograd.
    """

    suffix: list[float]
    prefix: list[float]

    def limits(self, frozen: Sequence[int]) -> tuple[float, float]:
        """Shares of the run's time that are saved at most, with the prefix's forward and without.

        Args:
            frozen: how many layers are frozen, at each step.
        """
        whole = self.suffix[0] * len(frozen)
        suffixes = sum(self.suffix[k] for k in frozen)
        prefixes = sum(self.prefix[k] for k in frozen)
        return 1 - (suffixes + prefixes) / whole, 1 - suffixes / whole


def frozen_layers(schedule: Schedule, num_layers: int) -> list[int]:
    """How many layers are frozen at each step."""
    starts = [schedule.freeze_steps(i, num_layers) for i in range(num_layers)]
    firsts = [min(s) for s in starts if s]
    return [sum(first <= step for first in firsts) for step in range(schedule.total_steps)]


def measure_cuts(task: Task, rounds: int) -> CutTimes:
    """Median times of each cut of a model that is a chain, in the baseline's layout."""
    model = task.build()
    links = [model.stem, *model.blocks, model.head]
    images, labels, _ = task.batch(0)
    inputs = [images]
    with torch.no_grad():
        for link in links[:-1]:
            inputs.append(link(inputs[-1]))
    optimizer = torch.optim.SGD(model.parameters(), LR, **HYPERS)
    in_eval = copy.deepcopy(links)
    for link in in_eval:
        link.eval()
    runs: dict[str, Callable[[], object]] = {}
    for k, x in enumerate(inputs):
        runs[f"suffix {k}"] = partial(_step, links[k:], x, labels, optimizer)
        runs[f"prefix {k}"] = partial(_forward, in_eval[:k], images)
    times = interleave(runs, rounds, burst=1)
    return CutTimes(
        *([times[f"{part} {k}"].median for k in range(len(links))] for part in ("suffix", "prefix"))
    )


def _step(
    links: list[nn.Module], x: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(nn.Sequential(*links)(x), labels).backward()
    optimizer.step()


@torch.no_grad()
def _forward(links: list[nn.Module], x: Tensor) -> None:
    for link in links:
        x = link(x)
