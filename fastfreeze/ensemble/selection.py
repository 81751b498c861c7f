"""Which members an ensemble does best with, by their predictions on held-out data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastfreeze.checks import check_int
from fastfreeze.ensemble.scores import check_like_first, check_members, checked_predictions
from fastfreeze.kernels.reference import nll_reference

Metric = Literal["nll", "error"]


@dataclass(frozen=True)
class Selection:
    """The members that :func:`select_members` chose, and why.

    Attributes:
        picks: members by their position, in the order chosen; with replacement one may come again.
        path: the metric of the mean of the picks so far, after each pick. It never rises.
        single: the metric of each member by itself.
    """

    picks: tuple[int, ...]
    path: tuple[float, ...]
    single: tuple[float, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """Each member that was chosen, once, in the order first chosen."""
        return tuple(Counter(self.picks))

    @property
    def counts(self) -> tuple[int, ...]:
        """How often each of :attr:`indices` was chosen."""
        return tuple(Counter(self.picks).values())

    @property
    def weights(self) -> tuple[float, ...]:
        """The share of each of :attr:`indices` in the mean; their sum is 1."""
        return tuple(count / len(self.picks) for count in self.counts)


@torch.no_grad()
def select_members(
    members: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    max_members: int | None = None,
    replace: bool = False,
    metric: Metric = "nll",
) -> Selection:
    """Greedy forward selection of an ensemble's members (Caruana et al., ICML 2004).

    It starts from the best single member, and adds the one that lowers the metric of the mean of
    probabilities the most, until none does. Of equal ones the first is taken. The mean is kept in
    float64 as a sum, so that a pick takes one pass over the members, whatever was picked before.

    The metric of the result is too good, as it was chosen by it: measure it on other data.

    Args:
        members: probabilities of M >= 1 members on data that they were not trained on, as one
            tensor [M, B, C] or a sequence of M tensors [B, C] of one shape and device; B >= 1 and
            C >= 2, floating point, rows summing to 1.
        labels: [B], integers in 0..C-1.
        max_members: at most so many picks, >= 1. None: as many as lower the metric.
        replace: members may be picked again, which gives them weight.
        metric: what to lower. "nll", see :func:`~fastfreeze.ensemble.nll`, or "error", see
            :func:`~fastfreeze.ensemble.error_rate`, which leaves ties to the NLL.

    Raises:
        TypeError, ValueError: an argument is not such; the message names the member and the row.

    Example:
        >>> chosen = select_members(list(ensemble.member_probabilities(x_valid)), y_valid)
        >>> smaller = fastfreeze.SnapshotEnsemble.from_store(model, store, members=chosen.indices)
    """
    scored = _Scored(members, labels, metric)
    if max_members is not None:
        check_int("max_members", max_members, minimum=1)
    left = list(range(len(scored)))
    total, picks, path = scored.nothing(), list[int](), list[_Value]()
    single: list[_Value] = []
    while left and (max_members is None or len(picks) < max_members):
        values = [scored.value(total + scored.rows(m), len(picks) + 1) for m in left]
        single = single or values
        lowest = min(values)
        if path and not lowest < path[-1]:
            break
        pick = left[values.index(lowest)]
        picks.append(pick)
        path.append(lowest)
        total += scored.rows(pick)
        if not replace:
            left.remove(pick)
    return Selection(tuple(picks), _first_of(path), _first_of(single))


@torch.no_grad()
def last_k_curve(
    members: Tensor | Sequence[Tensor], labels: Tensor, *, metric: Metric = "nll"
) -> tuple[float, ...]:
    """The metric of the mean of the last k members, for k = 1..M.

    Where it rises towards the end, early snapshots hurt: their cycles were too short.

    Args:
        members: as in :func:`select_members`, the latest last.
        labels, metric: as in :func:`select_members`.

    Raises:
        TypeError, ValueError: as from :func:`select_members`.
    """
    scored = _Scored(members, labels, metric)
    total, values = scored.nothing(), list[_Value]()
    for k in range(1, len(scored) + 1):
        total += scored.rows(len(scored) - k)
        values.append(scored.value(total, k))
    return _first_of(values)


_Value = tuple[float, ...]  # the metric, then what decides ties


def _first_of(values: Sequence[_Value]) -> tuple[float, ...]:
    return tuple(value[0] for value in values)


class _Scored:
    """Members, and the metric of sums of their rows.

    The NLL needs a label's probability alone: rows are then of one class, the label.
    """

    def __init__(self, members: Tensor | Sequence[Tensor], labels: Tensor, metric: Metric) -> None:
        check_members(members)
        if metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {get_args(Metric)}, got {metric!r}")
        for m, member in enumerate(members):
            _, self._labels = checked_predictions(member, labels, f"members[{m}]")
            check_like_first(f"members[{m}]", member, members[0])
        self._members, self._metric = members, metric

    def __len__(self) -> int:
        return len(self._members)

    def rows(self, m: int) -> Tensor:
        """What of a member matters, in float64: [B, 1], or [B, C] if all classes do."""
        member = self._members[m].detach()
        if self._metric == "nll":
            member = member.gather(-1, self._labels[:, None])
        return member.double()

    def nothing(self) -> Tensor:
        """The sum of no rows."""
        return torch.zeros_like(self.rows(0))

    def value(self, total: Tensor, count: int) -> _Value:
        """Of the mean of so many members, given the sum of their rows."""
        mean, dtype = total / count, self._members[0].dtype
        if self._metric == "nll":
            labels = torch.zeros_like(self._labels)
            return (nll_reference(mean, labels, dtype).mean().item(),)
        error = (mean.argmax(-1) != self._labels).double().mean().item()
        return (error, nll_reference(mean, self._labels, dtype).mean().item())
