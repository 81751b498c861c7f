"""Which members make the best ensemble, by their predictions on held-out data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfreeze.ensemble.scores import checked_members
from fastfreeze.kernels.reference import nll_reference


@torch.no_grad()
def select_members(members: Tensor | Sequence[Tensor], labels: Tensor) -> tuple[int, ...]:
    """Greedy forward selection of an ensemble's members (Caruana et al., ICML 2004).

    It starts from the member with the lowest NLL, and adds the one that lowers the NLL of the mean
    of probabilities the most, until none does. Of equal ones it takes the first. The first k are
    the selection of at most k.

    The result was chosen by its NLL on these data: measure it on others.

    Args:
        members: probabilities of M >= 1 members on data that they were not trained on, as one
            tensor [M, B, C] or a sequence of M tensors [B, C] of one shape and device; B >= 1 and
            C >= 2, floating point, rows summing to 1.
        labels: [B], integers in 0..C-1.

    Returns:
        The members' positions, each once, in the order chosen.

    Raises:
        TypeError, ValueError: an argument is not such; the message names the member and the row.

    Example:
        >>> chosen = select_members(list(ensemble.member_probabilities(x_valid)), y_valid)
        >>> smaller = fastfreeze.SnapshotEnsemble.from_store(model, store, members=chosen)
    """
    found = _of_labels(members, labels)
    dtype = members[0].dtype
    left, picks, lowest = list(range(len(found))), list[int](), float("inf")
    total = torch.zeros_like(found[0])
    while left:
        values = [_nll(total + found[m], len(picks) + 1, dtype) for m in left]
        if not min(values) < lowest:
            break
        lowest = min(values)
        picks.append(left.pop(values.index(lowest)))
        total += found[picks[-1]]
    return tuple(picks)


@torch.no_grad()
def last_k_curve(members: Tensor | Sequence[Tensor], labels: Tensor) -> tuple[float, ...]:
    """The NLL of the mean of the last k members, for k = 1..M.

    Where it rises towards the end, early snapshots hurt: their cycles were too short.

    Args:
        members: as in :func:`select_members`, the latest last.
        labels: as in :func:`select_members`.

    Raises:
        TypeError, ValueError: as from :func:`select_members`.
    """
    totals = _of_labels(members, labels).flip(0).cumsum(0)
    return tuple(_nll(total, k, members[0].dtype) for k, total in enumerate(totals, 1))


def _of_labels(members: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """The members' probabilities of the labels: [M, B] in float64."""
    if isinstance(members, Tensor) and members.dim() != 3:
        raise ValueError(f"members must have shape [M, B, C], got {tuple(members.shape)}")
    found, y = checked_members(members, labels)
    return torch.stack([p.gather(-1, y[:, None])[:, 0] for p in found])


def _nll(total: Tensor, count: int, dtype: torch.dtype) -> float:
    """Of the mean of so many members, given the sum [B] of their probabilities of the labels."""
    mean = (total / count)[:, None]  # of one class, the label
    return nll_reference(mean, mean.new_zeros(len(mean), dtype=torch.int64), dtype).mean().item()
