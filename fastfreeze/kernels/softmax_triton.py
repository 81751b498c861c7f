"""The softmax operators in Triton.

A program holds whole rows, up to ``_LARGEST_TILE`` classes, and reads each logit once. Longer rows
are split: sums over each part of each member's row first, then the mean. A bad row (NaN, +inf, or
-inf alone) comes out NaN throughout, its sum of exponentials being NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfreeze.kernels.library import current
from fastfreeze.kernels.reference import equal_weights, sum_dtype
from fastfreeze.kernels.softmax_arguments import new_statistics

_Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_GROUP = 8  # members to a launch, at most: each number of them is compiled for itself
_TILE = 1024  # elements of the rows that a program holds, where they are shorter
_MOST_ROWS = 16  # of them: more would want too many registers
_LARGEST_TILE = 4096  # of fp64 half as many, as of the next
_SPLIT = 4096  # classes of a part of a longer row

# 1 / ln(2) as a sum of two numbers of fp32; 1.5 * 2^23 + 127, whose low bits are an exponent's.
_LOG2_E = tl.constexpr(1.44269502162933349609375)
_LOG2_E_REST = tl.constexpr(1.925963033500011e-08)
_UNIT = tl.constexpr(12583039.0)
_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # that is normal
# What is summed up of each part of a member's row.
_TOP = tl.constexpr(0)
_SUM = tl.constexpr(1)
_WEIGHTED = tl.constexpr(2)
_SUMS = tl.constexpr(3)


def ensemble_softmax(
    members: list[Tensor], weights: list[float] | None, temperature: float, log: bool
) -> Tensor:
    """The operator of that name."""
    mean = torch.empty_like(members[0], memory_format=torch.contiguous_format)
    _launch(_Job(members, temperature, mean, log=log), weights)
    return mean


def ensemble_statistics(
    members: list[Tensor], weights: list[float] | None, temperature: float, labels: Tensor | None
) -> _Statistics:
    """The operator of that name."""
    mean, *summary = results = new_statistics(members[0], labels is not None)
    job = _Job(members, temperature, mean)
    job.summary = tuple(summary)
    job.labels = None if labels is None else labels.contiguous()
    _launch(job, weights)
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
    _launch(_Job([logits], temperature, result, total, entropy_sums=entropy), [weight])


@dataclass
class _Job:
    """``out = before + sum of weight * softmax``, or the sum's logarithm."""

    members: list[Tensor]
    temperature: float
    out: Tensor
    before: Tensor | None = None
    log: bool = False
    labels: Tensor | None = None
    # Of each row, what is added to: the members' entropies, and their probabilities of the label.
    entropy_sums: Tensor | None = None
    label_logs: Tensor | None = None
    # Of each row of the mean: all but the first of what ensemble_statistics returns.
    summary: tuple[Tensor, ...] | None = None


def _launch(job: _Job, weights: list[float] | None) -> None:
    if job.out.numel() == 0:
        return
    shares = equal_weights(len(job.members)) if weights is None else weights
    with current(job.out.device):
        size = triton.cdiv(len(shares), triton.cdiv(len(shares), _GROUP))
        *firsts, last = range(0, len(shares), size)
        if firsts:
            _add_running_sums(job)
        for first in firsts:
            some = slice(first, first + size)
            part = replace(job, members=job.members[some], summary=None)
            part.out = torch.empty_like(job.out, dtype=sum_dtype(job.out.dtype))
            _launch_group(part, shares[some])
            job.before = part.out
        _launch_group(replace(job, members=job.members[last:]), shares[last:])


def _add_running_sums(job: _Job) -> None:
    if job.summary is not None:
        job.entropy_sums = torch.zeros_like(job.summary[0])
        if job.labels is not None:
            job.label_logs = torch.full_like(job.summary[0], -torch.inf)


def _launch_group(job: _Job, shares: list[float]) -> None:
    members = tuple(_rows_of(z) for z in job.members)
    classes = members[0].shape[1]
    strides = tuple(z.stride(0) for z in members)
    wide = members[0].dtype == torch.float64
    vector = 16 // members[0].element_size()
    common: dict[str, Any] = {
        "members": members,
        "strides": strides,
        "inverse_temperature": 1.0 / job.temperature,
        "classes": classes,
        "MATH": tl.float64 if wide else tl.float32,
    }
    options: dict[str, Any] = {
        "weights": _parts(shares) if wide else tuple(shares),
        "VECTOR": vector if all(n % vector == 0 for n in (classes, *strides)) else 1,
        "LOG": job.log,
    }
    registers = 2 if wide else 1  # for a number
    if classes <= _LARGEST_TILE // registers:
        _launch_tiles(job, common | options)
    else:
        _launch_splits(job, common, options, _SPLIT // registers)


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


def _warps(elements: int, dtype: torch.dtype) -> int:
    """32 bytes of a tile to a thread; at most 1024 threads where a warp has 64."""
    return min(max(elements * dtype.itemsize // 1024, 4), 16)


def _launch_tiles(job: _Job, arguments: dict[str, Any]) -> None:
    rows, classes = arguments["members"][0].shape
    block = triton.next_power_of_2(classes)
    height = min(max(1, _TILE // block), _MOST_ROWS)
    _tile_kernel[(triton.cdiv(rows, height),)](
        **arguments,
        out=job.out,
        before=job.before,
        labels=job.labels,
        entropy_sums=job.entropy_sums,
        label_logs=job.label_logs,
        summary=job.summary,
        rows=rows,
        ROWS=height,
        BLOCK=block,
        num_warps=_warps(height * block, sum_dtype(job.members[0].dtype)),
    )


def _launch_splits(job: _Job, common: dict[str, Any], options: dict[str, Any], block: int) -> None:
    rows, classes = common["members"][0].shape
    splits = triton.cdiv(classes, block)
    dtype = sum_dtype(job.members[0].dtype)
    sums = job.out.new_empty((rows, len(job.members), _SUMS.value, splits), dtype=dtype)
    of_splits = None
    if job.summary is not None:
        dtypes = (dtype, torch.int32, dtype)
        of_splits = tuple(job.out.new_empty((rows, splits), dtype=d) for d in dtypes)
    common |= {"sums": sums, "splits": splits}
    padded = triton.next_power_of_2(splits)
    _split_sums_kernel[(rows * splits,)](
        **common, VECTOR=options["VECTOR"], BLOCK=block, num_warps=_warps(block, dtype)
    )
    _split_mean_kernel[(rows * splits,)](
        **common,
        **options,
        out=job.out,
        before=job.before,
        of_splits=of_splits,
        BLOCK=block,
        SPLITS=padded,
        num_warps=_warps(block, dtype),
    )
    if job.summary is not None or job.entropy_sums is not None:
        _split_statistics_kernel[(rows,)](
            **common,
            weights=options["weights"],
            of_splits=of_splits,
            labels=job.labels,
            entropy_sums=job.entropy_sums,
            label_logs=job.label_logs,
            summary=job.summary,
            SPLITS=padded,
            num_warps=4,
        )


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
def _load_total(before, place, mask, LOG: tl.constexpr, MATH: tl.constexpr):
    if before is not None:
        total = tl.load(before + place, mask=mask, other=0)
    else:
        total = tl.full(place.shape, -float("inf") if LOG else 0.0, MATH)
    return total


@triton.jit
def _add_member(total, x, e, factor, LOG: tl.constexpr):
    if LOG:
        total = _log_add(total, x + tl.log(factor)[:, None])
    else:
        total = tl.fma(e, tl.broadcast_to(factor[:, None], e.shape), total)
    return total


@triton.jit
def _weighted_sum(x, e):
    """Of x e^x, 0 where a class is masked."""
    return tl.sum(tl.where(e > 0, x * e, e), 1)


@triton.jit
def _summarise(total, column, classes):
    """Maximum, 0 in a bad row, the first class that has it, and entropy."""
    best = tl.max(tl.where(total > 0, total, 0.0), 1)
    index = tl.min(tl.where(total == best[:, None], column, classes), 1)
    return best, index, -tl.sum(total * tl.log(tl.maximum(total, _SMALLEST)), 1)


@triton.jit
def _start_terms(entropy_sums, label_logs, labels, row, mine, MATH: tl.constexpr):
    """What the launches before left of the members' entropies and labels; the labels."""
    own_entropy = tl.full(row.shape, 0.0, MATH)
    label_log = tl.full(row.shape, -float("inf"), MATH)
    label = row
    if entropy_sums is not None:
        own_entropy = tl.load(entropy_sums + row, mask=mine, other=0)
    if label_logs is not None:
        label_log = tl.load(label_logs + row, mask=mine, other=0)
    if labels is not None:
        label = tl.load(labels + row, mask=mine, other=0)
    return own_entropy, label_log, label


@triton.jit
def _add_label(label_log, member, stride, label, row, mine, top, factor, inverse, classes):
    """NaN, where the label is no class."""
    known = mine & (label >= 0) & (label < classes)
    z = tl.load(member + row * stride + label, mask=known, other=float("nan")).to(top.dtype)
    return _log_add(label_log, (z - top) * inverse + tl.log(factor))


@triton.jit
def _store_terms(entropy_sums, label_logs, own_entropy, label_log, row, mine):
    """For the launches that follow."""
    if entropy_sums is not None:
        tl.store(entropy_sums + row, own_entropy, mask=mine)
    if label_logs is not None:
        tl.store(label_logs + row, label_log, mask=mine)


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
def _tile_kernel(
    members, strides, weights, out, before, labels, entropy_sums, label_logs, summary,
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
    total = _load_total(before, place, mask, LOG, MATH)
    own_entropy, label_log, label = _start_terms(entropy_sums, label_logs, labels, row, mine, MATH)
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
        if entropy_sums is not None or summary is not None:
            own_entropy += weight * (tl.log(s) - _weighted_sum(x, e) / s)
        if labels is not None:
            label_log = _add_label(
                label_log, members[m], strides[m], label, row, mine, top, factor, inverse, classes
            )
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
    _store_terms(entropy_sums, label_logs, own_entropy, label_log, row, mine)
    if summary is not None:
        best, index, entropy = _summarise(total, column, classes)
        _store_summary(summary, labels, best, index, entropy, own_entropy, label_log, row, mine)


@triton.jit(do_not_specialize=["classes", "splits"])
def _split_sums_kernel(
    members, strides, sums, inverse_temperature: tl.float64, classes, splits,
    VECTOR: tl.constexpr, MATH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a part of each member's row: the top, and sums of e^x and x e^x, x being below it."""
    classes = _multiple(classes, VECTOR)
    inverse = tl.full((), inverse_temperature, MATH)
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64) + tl.arange(0, 1)
    split = program % splits
    column = (split * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = column < classes
    following = _load(members[0], strides[0], row, column, mask, VECTOR)
    for m in tl.static_range(len(members)):
        z = following.to(MATH)
        if m + 1 < len(members):
            following = _load(members[m + 1], strides[m + 1], row, column, mask, VECTOR)
        top = tl.max(z, 1)
        # Where all of a part is masked, other parts decide whether the row is bad.
        x = (z - tl.where(top == -float("inf"), 0.0, top)[:, None]) * inverse
        e = _exp(x)
        place = sums + (row * len(members) + m) * _SUMS * splits + split
        tl.store(place + _TOP * splits, top)
        tl.store(place + _SUM * splits, tl.sum(e, 1))
        tl.store(place + _WEIGHTED * splits, _weighted_sum(x, e))


@triton.jit
def _merged(sums, member_row, splits, inverse, SPLITS: tl.constexpr):
    """The sums of all parts, moved up to the highest top."""
    i = tl.arange(0, SPLITS)[None, :]
    mask = i < splits
    place = sums + (member_row * _SUMS * splits)[:, None] + i
    tops = tl.load(place + _TOP * splits, mask=mask, other=-float("inf"))
    s = tl.load(place + _SUM * splits, mask=mask, other=0)
    weighted = tl.load(place + _WEIGHTED * splits, mask=mask, other=0)
    top = tl.max(tops, 1)
    x = (tops - top[:, None]) * inverse
    e = _exp(x)
    weighted = tl.where(e > 0, e * (weighted + x * s), 0.0)
    return top, tl.sum(e * s, 1), tl.sum(weighted, 1)


@triton.jit(do_not_specialize=["classes", "splits"])
def _split_mean_kernel(
    members, strides, weights, sums, out, before, of_splits, inverse_temperature: tl.float64,
    classes, splits, VECTOR: tl.constexpr, MATH: tl.constexpr, LOG: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A part of a row of the mean; of_splits: its maximum, where it is, and its entropy."""
    M: tl.constexpr = len(members)
    classes = _multiple(classes, VECTOR)
    inverse = tl.full((), inverse_temperature, MATH)
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64) + tl.arange(0, 1)
    column = (program % splits * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = column < classes
    place = (row * classes)[:, None] + column
    total = _load_total(before, place, mask, LOG, MATH)
    following = _load(members[0], strides[0], row, column, mask, VECTOR)
    for m in tl.static_range(M):
        z = following.to(MATH)
        if m + 1 < M:
            following = _load(members[m + 1], strides[m + 1], row, column, mask, VECTOR)
        top, s, _ = _merged(sums, row * M + m, splits, inverse, SPLITS)
        x = (z - top[:, None]) * inverse
        total = _add_member(total, x, _exp(x), _weight(weights, m, M, MATH) / s, LOG)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
    if of_splits is not None:
        best, index, entropy = _summarise(total, column, classes)
        at = program.to(tl.int64) + tl.arange(0, 1)
        tl.store(of_splits[0] + at, best)
        tl.store(of_splits[1] + at, index)
        tl.store(of_splits[2] + at, entropy)


@triton.jit(do_not_specialize=["classes", "splits"])
def _split_statistics_kernel(
    members, strides, weights, sums, of_splits, labels, entropy_sums, label_logs, summary,
    inverse_temperature: tl.float64, classes, splits, MATH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A row's, of those of its parts."""
    M: tl.constexpr = len(members)
    inverse = tl.full((), inverse_temperature, MATH)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mine = row >= 0
    own_entropy, label_log, label = _start_terms(entropy_sums, label_logs, labels, row, mine, MATH)
    for m in tl.static_range(M):
        top, s, weighted = _merged(sums, row * M + m, splits, inverse, SPLITS)
        weight = _weight(weights, m, M, MATH)
        own_entropy += weight * (tl.log(s) - weighted / s)
        if labels is not None:
            label_log = _add_label(
                label_log, members[m], strides[m], label, row, mine, top, weight / s, inverse,
                classes,
            )  # fmt: skip
    _store_terms(entropy_sums, label_logs, own_entropy, label_log, row, mine)
    if summary is not None:
        i = tl.arange(0, SPLITS)[None, :]
        mask = i < splits
        place = (row * splits)[:, None] + i
        bests = tl.load(of_splits[0] + place, mask=mask, other=0)
        indices = tl.load(of_splits[1] + place, mask=mask, other=0)
        entropies = tl.load(of_splits[2] + place, mask=mask, other=0)
        best = tl.max(bests, 1)
        index = tl.min(tl.where(bests == best[:, None], indices, classes), 1)
        entropy = tl.sum(entropies, 1)
        _store_summary(summary, labels, best, index, entropy, own_entropy, label_log, row, mine)
