"""The softmax operators in Triton, of few members and rows that a program holds whole.

A program reads each logit once. A bad row (NaN, +inf, or -inf alone) comes out NaN throughout, its
sum of exponentials being NaN.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfreeze.kernels.library import current
from fastfreeze.kernels.reference import equal_weights, sum_dtype
from fastfreeze.kernels.softmax_arguments import Statistics, new_statistics

_TILE = 1024  # elements of the rows that a program holds, where they are shorter
_MOST_ROWS = 16  # of them: more would want too many registers

# 1 / ln(2) as a sum of two numbers of fp32; 1.5 * 2^23 + 127, whose low bits are an exponent's.
_LOG2_E = tl.constexpr(1.44269502162933349609375)
_LOG2_E_REST = tl.constexpr(1.925963033500011e-08)
_UNIT = tl.constexpr(12583039.0)
_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # that is normal


def ensemble_softmax(
    members: list[Tensor], weights: list[float] | None, temperature: float, log: bool
) -> Tensor:
    """The operator of that name."""
    mean = torch.empty_like(members[0], memory_format=torch.contiguous_format)
    launch(members, weights, temperature, mean, log=log)
    return mean


def ensemble_statistics(
    members: list[Tensor], weights: list[float] | None, temperature: float, labels: Tensor | None
) -> Statistics:
    """The operator of that name."""
    mean, *summary = results = new_statistics(members[0], labels is not None)
    labels = None if labels is None else labels.contiguous()
    launch(members, weights, temperature, mean, labels=labels, summary=tuple(summary))
    return results


def softmax_add(
    result: Tensor,
    entropy: Tensor | None,
    total: Tensor | None,
    logits: Tensor,
    weight: float,
    temperature: float,
) -> None:
    """The operator of that name."""
    launch([logits], [weight], temperature, result, before=total, entropy_sum=entropy)


def launch(
    members: list[Tensor],
    weights: list[float] | None,
    temperature: float,
    out: Tensor,
    *,
    before: Tensor | None = None,
    log: bool = False,
    labels: Tensor | None = None,
    entropy_sum: Tensor | None = None,
    summary: tuple[Tensor, ...] | None = None,
) -> None:
    """``out = before + sum of weight * softmax``, or the sum's logarithm.

    Args:
        entropy_sum: of each row, what the members' entropies are added to.
        summary: of each row of the mean, all but the first of what ensemble_statistics returns.
    """
    if out.numel() == 0:
        return
    shares = equal_weights(len(members)) if weights is None else weights
    logits = tuple(_rows_of(z) for z in members)
    strides = tuple(z.stride(0) for z in logits)
    rows, classes = logits[0].shape
    wide = logits[0].dtype == torch.float64
    vector = 16 // logits[0].element_size()
    block = triton.next_power_of_2(classes)
    height = min(max(1, _TILE // block), _MOST_ROWS)
    size = sum_dtype(logits[0].dtype).itemsize
    with current(out.device):
        _kernel[(triton.cdiv(rows, height),)](
            logits,
            strides,
            _parts(shares) if wide else tuple(shares),
            out,
            before,
            labels,
            entropy_sum,
            summary,
            1.0 / temperature,
            rows,
            classes,
            VECTOR=vector if all(n % vector == 0 for n in (classes, *strides)) else 1,
            MATH=tl.float64 if wide else tl.float32,
            LOG=log,
            ROWS=height,
            BLOCK=block,
            # 32 bytes of a tile to a thread; at most 1024 threads where a warp has 64.
            num_warps=min(max(height * block * size // 1024, 4), 16),
        )


def _rows_of(logits: Tensor) -> Tensor:
    """As rows of unit stride, copied where they have another or lie unevenly."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()


def _parts(weights: list[float]) -> tuple[float, ...]:
    """Each as a sum of three numbers of fp32: in a tuple, Triton hands over no wider ones."""
    parts = []
    for weight in weights:
        rest = weight
        for _ in range(3):
            parts.append(float(np.float32(rest)))
            rest -= parts[-1]
    return tuple(parts)


@triton.jit
def _exp(x):
    """e^x for x <= 0 or NaN, as 2^n 2^f with n an integer and 2^n normal.

    In fp32 the error of tl.exp grows with the distance from 0.
    """
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        n = tl.maximum(tl.fma(x, _LOG2_E, _UNIT), _UNIT - 126.0)
        # Named, for Triton's interpreter: there a constant less a tensor is a constexpr, which an
        # assignment unwraps, but tl.fma from Triton 3.7 on does not.
        minus_n = _UNIT - n
        f = tl.fma(x, _LOG2_E_REST, tl.fma(x, _LOG2_E, minus_n))
        e = tl.exp2(f) * (n.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return e


@triton.jit
def _log_add(a, b):
    """log(e^a + e^b), NaN if one of them is."""
    high = tl.where(a > b, a, b)
    low = tl.where(a > b, b, a)
    some = high != -float("inf")
    distance = tl.where(some, low - high, 0.0)
    return tl.where(some, high + tl.log(1.0 + _exp(distance)), high + low)


@triton.jit
def _multiple(n, VECTOR: tl.constexpr):
    """n, which VECTOR divides: what is hinted of an argument does not reach where it is used."""
    return n // VECTOR * VECTOR


@triton.jit
def _weight(weights, m: tl.constexpr, M: tl.constexpr, MATH: tl.constexpr):
    PARTS: tl.constexpr = len(weights) // M
    weight = tl.full((), weights[m * PARTS], MATH)
    for i in tl.static_range(1, PARTS):
        weight += tl.full((), weights[m * PARTS + i], MATH)
    return weight


@triton.jit
def _load(member, stride, row, column, mask, VECTOR: tl.constexpr):
    start = row * _multiple(stride, VECTOR)
    return tl.load(member + start[:, None] + column, mask=mask, other=-float("inf"))


@triton.jit
def _add_member(total, x, e, factor, LOG: tl.constexpr):
    if LOG:
        total = _log_add(total, x + tl.log(factor)[:, None])
    else:
        total = tl.fma(e, tl.broadcast_to(factor[:, None], e.shape), total)
    return total


@triton.jit
def _summarise(total, column, classes):
    """Maximum, 0 in a bad row, the first class that has it, and entropy."""
    best = tl.max(tl.where(total > 0, total, 0.0), 1)
    index = tl.min(tl.where(total == best[:, None], column, classes), 1)
    return best, index, -tl.sum(total * tl.log(tl.maximum(total, _SMALLEST)), 1)


@triton.jit
def _add_label(label_log, member, stride, label, row, mine, top, factor, inverse, classes):
    """NaN, where the label is no class."""
    known = mine & (label >= 0) & (label < classes)
    z = tl.load(member + row * stride + label, mask=known, other=float("nan")).to(top.dtype)
    return _log_add(label_log, (z - top) * inverse + tl.log(factor))


@triton.jit
def _store_summary(
    summary, labels, best, index, entropy, own_entropy, label_log, row, mine
):  # fmt: skip
    bad = best == 0
    entropy = tl.where(entropy < 0, 0.0, entropy)
    mutual_information = entropy - own_entropy
    mutual_information = tl.where(mutual_information < 0, 0.0, mutual_information)
    tl.store(summary[0] + row, tl.where(bad, float("nan"), best), mask=mine)
    tl.store(summary[1] + row, tl.where(bad, 0, index).to(tl.int64), mask=mine)
    tl.store(summary[2] + row, entropy, mask=mine)
    tl.store(summary[3] + row, mutual_information, mask=mine)
    if labels is not None:
        tl.store(summary[4] + row, -label_log, mask=mine)


@triton.jit(do_not_specialize=["rows", "classes"])
def _kernel(
    members, strides, weights, out, before, labels, entropy_sum, summary,
    inverse_temperature: tl.float64, rows, classes, VECTOR: tl.constexpr, MATH: tl.constexpr,
    LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows at a time. What is None is not wanted, or not there."""
    M: tl.constexpr = len(members)
    classes = _multiple(classes, VECTOR)
    inverse = tl.full((), inverse_temperature, MATH)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mine = row < rows
    column = tl.arange(0, BLOCK)[None, :]
    mask = mine[:, None] & (column < classes)
    place = (row * classes)[:, None] + column
    total = tl.full(place.shape, -float("inf") if LOG else 0.0, MATH)
    if before is not None:
        total = tl.load(before + place, mask=mask, other=0)
    own_entropy = tl.full(row.shape, 0.0, MATH)
    if entropy_sum is not None:
        own_entropy = tl.load(entropy_sum + row, mask=mine, other=0)
    label_log = tl.full(row.shape, -float("inf"), MATH)
    label = row
    if labels is not None:
        label = tl.load(labels + row, mask=mine, other=0)
    following = _load(members[0], strides[0], row, column, mask, VECTOR)
    for m in tl.static_range(M):
        z = following.to(MATH)
        if m + 1 < M:  # on its way while this one is worked on
            following = _load(members[m + 1], strides[m + 1], row, column, mask, VECTOR)
        top = tl.max(z, 1)
        x = (z - top[:, None]) * inverse
        e = _exp(x)
        s = tl.sum(e, 1)
        weight = _weight(weights, m, M, MATH)
        factor = weight / s
        total = _add_member(total, x, e, factor, LOG)
        if entropy_sum is not None or summary is not None:
            weighted = tl.sum(tl.where(e > 0, x * e, e), 1)  # 0 where a class is masked
            own_entropy += weight * (tl.log(s) - weighted / s)
        if labels is not None:
            label_log = _add_label(
                label_log, members[m], strides[m], label, row, mine, top, factor, inverse, classes
            )
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
    if entropy_sum is not None:
        tl.store(entropy_sum + row, own_entropy, mask=mine)
    if summary is not None:
        best, index, entropy = _summarise(total, column, classes)
        _store_summary(summary, labels, best, index, entropy, own_entropy, label_log, row, mine)
