"""What is kept of some values, and how its rows may be computed so that no bit depends on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from fastfreeze.cache.chain import Chain
from fastfreeze.cache.rows import CannotKeepError, Fetched, Layout, hash_rows, row_numbers
from fastfreeze.cache.store import RowStore
from fastfreeze.trimming.state import record_stream

_CHECKED_BATCHES = 2  # found whole, and computed all the same

Rows = list[Tensor]


@dataclass
class CacheStats:
    """What a cache has done, counted in rows of one sample and view.

    Attributes:
        hits: taken from the cache.
        misses: computed from the inputs.
        advanced: carried on from earlier values to those that are wanted now.
        rows: that are held now.
        bytes: that these take up, in memory or on disk.
    """

    hits: int = 0
    misses: int = 0
    advanced: int = 0
    rows: int = 0
    bytes: int = 0


class Batch:
    """A chain, and the samples that it is for.

    Attributes:
        inputs: the tensors that go in.

    Raises:
        CannotKeepError: there are none with a row for each sample, or they are not on one device.
    """

    def __init__(self, keys: list[int], chain: Chain) -> None:
        self.keys, self.chain = keys, chain
        self.inputs = [chain.outer[number].now() for number in sorted(chain.outer)]
        if not any(t.ndim and len(t) == len(keys) for t in self.inputs):
            raise CannotKeepError(f"no tensor with a row for each of {len(keys)} samples goes in")
        if len(devices := {str(t.device) for t in self.inputs}) > 1:
            raise CannotKeepError(f"what goes in is on {' and '.join(sorted(devices))}")

    @property
    def inputs_are_given(self) -> bool:
        """Whether they are all what the model was called with."""
        given = self.chain.wanted[0].chains.given
        return all(id(t) in given for t in self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the inputs are, and what is computed of them."""
        return self.inputs[0].device

    @cached_property
    def digests(self) -> Fetched:
        """int64 ``[B]``: one number for the bits of all that goes in for each sample."""
        return digests_of(self.inputs, len(self.keys))

    def part(self, wanted: Sequence[str]) -> Batch:
        """The same samples for values on the way, of these keys."""
        nodes = [self.chain.node(key) for key in wanted]
        return Batch(self.keys, Chain([node for node in nodes if node is not None]))


class Kept:
    """What is kept of some values for one form of input.

    Attributes:
        wanted: keys of the nodes whose values they are.
        place: calls of the modules behind them.
        held: digest of what these held.
        conditions: what else the values depend on.
        rows: the store.
        size: rows of the first batch. Other numbers of rows count only if they give the same bits.
        verified: names of earlier values from which carrying on was found to give the same bits.
        unchecked: how many batches that are found whole are still to be computed all the same.
        measures: whether it is still open if this pays.
        times: seconds of batches in computing, and in storing and looking up.
    """

    rows: RowStore

    def __init__(
        self,
        name: str,
        conditions: str,
        chain: Chain,
        held: str,
        layout: Layout,
        size: int,
        measures: bool,
    ) -> None:
        self.name, self.conditions, self.held = name, conditions, held
        self.wanted, self.place = [node.key for node in chain.wanted], chain.place
        self.layout, self.size, self.measures = layout, size, measures
        self.verified: set[str] = set()
        self.unchecked = _CHECKED_BATCHES
        self.times: list[tuple[float, float]] = []
        self._agreeing = {size: True}

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

    def values(self, flat: Rows) -> list[Tensor]:
        """The values, for the rows of a whole batch."""
        return list(self.layout.values(flat, ()))

    def compute(self, batch: Batch, rows: Sequence[int] = ()) -> Rows:
        """What the chain gives for a batch, or for some of its rows, as many as it has."""
        return self.layout.flat(batch.chain.compute(rows=rows))

    def rows_are_independent(self, batch: Batch, expected: Rows) -> bool:
        """Whether rows give the same bits beside others: half of them, twice, in another order."""
        rows = [(self.size - 1) - i // 2 for i in range(self.size)]
        return same_bits(self.compute(batch, rows), pick(expected, rows))

    def agrees(self, batch: Batch) -> bool:
        """Whether rows in a batch of this size give the same bits as in one of the usual size."""
        n = len(batch.keys)
        if n not in self._agreeing:
            slots = self.rows.find(batch.keys)
            here = [i for i, slot in enumerate(slots) if slot >= 0]
            digests = batch.digests.wait()
            here = [i for i in here if self.rows.digests([slots[i]])[0] == digests[i]]
            if not here:
                return False
            found = self.get([slots[i] for i in here], batch.device)
            self._agreeing[n] = same_bits(found, pick(self.compute(batch), here))
        return self._agreeing[n]

    def leads_to(self, other: Kept, chain: Chain) -> bool:
        """Whether these values are on the way to other ones, those of a chain."""
        if self.layout.narrows or self.conditions != other.conditions:
            return False
        return self.wanted != other.wanted and all(map(chain.node, self.wanted))

    def carry_on(
        self, earlier: Kept, batch: Batch, rows: Sequence[int], slots: Sequence[int]
    ) -> Rows:
        """These values of some rows of a batch, from earlier ones of the same rows."""
        n = len(batch.keys)
        chosen = [i % len(rows) for i in range(n)]
        values = earlier.values(earlier.get([slots[i] for i in chosen], batch.device))
        given = dict(zip(earlier.wanted, values, strict=True))
        found = batch.chain.compute(rows=[rows[i] for i in chosen], given=given)
        return [column[: len(rows)] for column in self.layout.flat(found)]

    def now(self, device: torch.device) -> float:
        """Seconds on a clock; while this is measured, when the device has done what was asked."""
        if self.measures and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def digests_of(inputs: Sequence[Tensor], n: int) -> Fetched:
    """int64 ``[n]``: one number for the bits of each row, and of what has no rows."""
    total = torch.zeros(n, dtype=torch.int64, device=inputs[0].device)
    for tensor in inputs:
        rows = tensor if tensor.ndim and len(tensor) == n else tensor.reshape(1, -1)
        total = total * 3 + hash_rows(rows)
    return Fetched(total)


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
