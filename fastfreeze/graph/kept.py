"""What is kept under one cut, and how its rows may be computed so that no bit depends on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastfreeze.trim.state import record_stream
from fastfreeze.graph.call import Call
from fastfreeze.graph.prefix import Prefix, Values
from fastfreeze.graph.rows import Fetched, Layout, row_numbers, take_rows
from fastfreeze.graph.split import CannotSplitError, find_stretch
from fastfreeze.graph.store import RowStore

_CHECKED_BATCHES = 2  # found whole under a cut, and computed all the same

Rows = list[Tensor]


@dataclass(frozen=True)
class Batch:
    """A call, and the samples that it is for."""

    call: Call
    prefix: Prefix
    prefix_key: str
    keys: list[int]
    digests: Fetched

    @property
    def device(self) -> torch.device:
        """Where the inputs are, and what is computed of them."""
        return self.call.inputs[0].device


class Kept:
    """What is kept under one cut for one form of input.

    Attributes:
        rows: the store.
        size: rows of the first batch. Other numbers of rows count only if they give the same bits.
        reads_inputs: for earlier cuts that can be carried on, by name: whether that takes inputs.
        verified: names of earlier cuts from which carrying on was found to give the same bits.
        unchecked: how many batches that are found whole are still to be computed all the same.
        measures: whether it is still open if this pays.
        constants: the values that are no tensors, by the number of rows that ran.
        times: seconds of batches in computing, and in storing and looking up.
    """

    rows: RowStore

    def __init__(self, name: str, form: str, batch: Batch, layout: Layout, measures: bool) -> None:
        self.name, self.form = name, form
        self.prefix, self.prefix_key = batch.prefix, batch.prefix_key
        self.layout, self.measures = layout, measures
        self.size = len(batch.keys)
        self.reads_inputs: dict[str, bool] = {}
        self.verified: set[str] = set()
        self.unchecked = _CHECKED_BATCHES
        self.times: list[tuple[float, float]] = []
        self.constants: dict[int, tuple[Any, ...]] = {}
        self._agreeing = {self.size: True}

    def get(self, slots: Sequence[int], device: torch.device) -> Rows:
        """Kept rows, on ``device``.

        To a GPU they go beside what it does, out of pinned memory. Torch keeps that, and uses it
        again when the copy is done.
        """
        if device.type != "cuda":
            return [column.to(device) for column in self.rows.get(slots)]
        pinned, now = self.rows.get(slots, pinned=True), torch.cuda.current_stream(device)
        beside = _stream_for_copies(device)
        with torch.cuda.stream(beside):
            columns = [column.to(device, non_blocking=True) for column in pinned]
        now.wait_stream(beside)
        record_stream(columns, now)
        return columns

    def values(self, flat: Rows) -> Values:
        """The values that cross, for the rows of a whole batch."""
        return self.layout.values(flat, self.constants[len(flat[0])])

    def compute(self, batch: Batch, rows: Sequence[int] = (), size: int = 0) -> Rows:
        """What the prefix gives for some rows of a batch, in a run of ``size``; or for all."""
        tensors = self._taken(batch, rows, size) if size else batch.call.tensors
        values = self.prefix.run(tensors)
        flat = self.layout.flat(values)
        self.constants[len(flat[0])] = self.layout.constants(values)
        return [column[: len(rows)] for column in flat] if size else flat

    def rows_are_independent(self, batch: Batch, expected: Rows) -> bool:
        """Whether every other row gives the same bits without the rest.

        In a run of half the size; or else of the same, where these rows come twice.
        """
        half = (self.size + 1) // 2
        rows = range(self.size - 1, -1, -2)
        wanted = pick(expected, rows)
        self._agreeing[half] = same_bits(self.compute(batch, rows, half), wanted)
        return self._agreeing[half] or same_bits(self.compute(batch, rows, self.size), wanted)

    def agrees(self, batch: Batch, size: int) -> bool:
        """Whether rows in a run of ``size`` give the same bits as in one of the usual size."""
        if size not in self._agreeing:
            rows = range(min(size, self.size, len(batch.keys)))[::-1]
            usual = self.compute(batch, rows, self.size)
            self._agreeing[size] = same_bits(self.compute(batch, rows, size), usual)
        return self._agreeing[size]

    def sizes_for(self, count: int) -> list[int]:
        """Sizes of run that hold so many rows, in steps of a quarter of the usual size."""
        quarters = sorted({-(-self.size * k // 4) for k in (1, 2, 3, 4)})
        return [size for size in quarters if size >= count]

    def continues(self, earlier: Kept) -> bool:
        """Whether this cut's values can be computed from an earlier one's."""
        if self.size not in earlier.constants:
            return False
        if earlier.name not in self.reads_inputs:
            if earlier.layout.narrows or earlier.prefix.flow.graph is not self.prefix.flow.graph:
                return False
            splits = earlier.prefix.split, self.prefix.split
            try:
                nodes = find_stretch(self.prefix.flow, *splits)
            except CannotSplitError:
                return False
            read = {i for node in nodes for i in node.all_input_nodes}
            self.reads_inputs[earlier.name] = any(i.op == "placeholder" for i in read)
        return True

    def more_keys(self, known: set[int], limit: int) -> list[int]:
        """Keys of up to ``limit`` rows that are whole, others than those known."""
        keys = [key for key in self.rows.keys(limit + len(known)) if key not in known][:limit]
        return [key for key, slot in zip(keys, self.rows.find(keys), strict=True) if slot >= 0]

    def carry_on(
        self, earlier: Kept, batch: Batch, rows: Sequence[int], slots: Sequence[int]
    ) -> Rows:
        """Values of this cut from the rows of an earlier one, the first of them the batch's."""
        again = [slots[i % len(slots)] for i in range(self.size)]
        values = earlier.values(earlier.get(again, batch.device))
        reads = self.reads_inputs[earlier.name]
        tensors = self._taken(batch, rows, self.size) if reads else batch.call.tensors
        flat = self.layout.flat(self.prefix.advance(earlier.prefix, tensors, values))
        return [column[: len(slots)] for column in flat]

    def now(self, device: torch.device) -> float:
        """Seconds on a clock; while this is measured, when the device has done what was asked."""
        if self.measures and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def _taken(self, batch: Batch, rows: Sequence[int], size: int) -> list[Tensor]:
        """The call's tensors for some rows, again and again, up to ``size``."""
        chosen = [rows[i % len(rows)] for i in range(size)]
        tensors = list(batch.call.tensors)
        for i in self.prefix.inputs:
            tensors[i] = take_rows(tensors[i], row_numbers(chosen, tensors[i].device))
        return tensors


@cache
def _stream_for_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def pick(flat: Rows, rows: Sequence[int]) -> Rows:
    return [column[list(rows)] for column in flat]


def same_bits(a: Rows, b: Rows) -> bool:
    """Whether all bits are the same."""
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def assembled(parts: Sequence[tuple[Sequence[int], Rows]]) -> Rows:
    """Parts of a batch, in the batch's order."""
    order = [i for rows, _ in parts for i in rows]
    columns = zip(*(flat for rows, flat in parts if rows), strict=True)
    joined = [torch.cat(column) for column in columns]
    back = row_numbers(sorted(range(len(order)), key=order.__getitem__), joined[0].device)
    return [column.index_select(0, back) for column in joined]
