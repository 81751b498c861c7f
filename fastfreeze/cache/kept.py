"""What is kept of some values, whether that pays, and how rows may be computed bit by bit alike."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median

import torch
from torch import Tensor

from fastfreeze.cache.calls import Chain
from fastfreeze.cache.rows import CannotKeepError, Form, share_storage
from fastfreeze.cache.store import RowStore
from fastfreeze.trimming.bits import same_bits
from fastfreeze.trimming.state import record_stream

_CHECKED_BATCHES = 2  # found whole, and computed all the same
TRIALS = 5  # batches that are timed
_EVERY = 16  # batches of those that are found whole, one is timed later on
_MAX_IDLE = 50  # batches in which nothing was found whole and nothing more could be added

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


@dataclass
class Account:
    """Whether keeping pays: seconds of the latest batches that were timed.

    Attributes:
        computing: what is kept.
        storing: it.
        looking: it up, from the question to the values: digests, what modules hold, loading.
        idle: how many batches in a row gained nothing.
        turn: of the batches that were found whole.
    """

    computing: deque[float] = field(default_factory=lambda: deque(maxlen=TRIALS))
    storing: deque[float] = field(default_factory=lambda: deque(maxlen=TRIALS))
    looking: deque[float] = field(default_factory=lambda: deque(maxlen=TRIALS))
    idle: int = 0
    turn: int = 0

    def found_whole(self) -> bool:
        """Note such a batch; whether it is to be timed."""
        self.idle, self.turn = 0, self.turn + 1
        return self.turn <= TRIALS or self.turn % _EVERY == 0

    def computed(self, computing: float, storing: float, looking: float) -> None:
        """Note a batch that was computed and stored, and how long it takes to look one up."""
        self.computing.append(computing)
        self.storing.append(storing)
        self.looking.append(looking)

    def problem(self, fills: bool) -> str:
        """Why it does not pay; empty if it does, or if that is not known yet.

        Args:
            fills: whether storing is a part of it.
        """
        if self.idle > _MAX_IDLE:
            return "it does not pay: max_bytes is reached, and no batch is there as a whole"
        if len(self.computing) < TRIALS or len(self.looking) < TRIALS:
            return ""
        cost = median(self.looking) + (median(self.storing) if fills else 0.0)
        chain = median(self.computing)
        if cost < chain:
            return ""
        what = "storing and looking up take" if fills else "looking up takes"
        return (
            f"it does not pay: {what} {1e3 * cost:.2f} ms a batch, "
            f"the frozen modules {1e3 * chain:.2f} ms"
        )


class Kept:
    """What is kept of some values for one form of input.

    Attributes:
        name: of the store.
        wanted: keys of the nodes whose values they are.
        conditions: what else the values depend on.
        rows: the store.
        size: samples of the first batch. Others count only if they give the same bits.
        verified: names of earlier values from which carrying on was found to give the same bits.
        unchecked: how many batches that are found whole are still to be computed all the same.
        account: whether it pays; None if nobody asks.
    """

    rows: RowStore

    def __init__(self, name: str, conditions: str, chain: Chain, dtype: torch.dtype | None) -> None:
        self.name, self.conditions = name, conditions
        self.wanted, self.size = chain.keys, len(chain.samples)
        self.verified: set[str] = set()
        self.unchecked = _CHECKED_BATCHES
        self.account: Account | None = None
        self._agreeing = {self.size: True}
        self._dtype = dtype
        self._forms: list[Form] = []

    @property
    def columns(self) -> list[tuple[torch.dtype, int]]:
        return [form.column for form in self._forms]

    def first(self, chain: Chain) -> Rows:
        """The rows of the first batch, which show what forms they have.

        Raises:
            CannotKeepError: they cannot be kept.
        """
        values, n = chain.compute(), self.size
        self._forms = [Form.of(value, n, self._dtype) for value in values]
        if len(devices := {str(t.device) for t in (*chain.inputs, *values)}) > 1:
            raise CannotKeepError(f"inputs and what is read are on {' and '.join(sorted(devices))}")
        if share_storage(values, chain.inputs):
            raise CannotKeepError("values that are read share memory")
        flat = self._flat(values, n)
        rows = [(n - 1) - i // 2 for i in range(n)]  # half of them, twice, in another order
        if not all_same_bits(self._flat(chain.compute(rows=rows), n), pick(flat, rows)):
            raise CannotKeepError("what a sample gives depends on the others in its batch")
        return flat

    def get(self, slots: Sequence[int], device: torch.device) -> Rows | None:
        """Kept rows, on ``device``; None if they were damaged.

        To a GPU they go beside what it does, out of pinned memory. Torch keeps that, and uses it
        again when the copy is done.
        """
        on_gpu = device.type == "cuda"
        columns = self.rows.get(slots, pinned=on_gpu)
        if columns is None or not on_gpu:
            return columns and [column.to(device) for column in columns]
        now, beside = torch.cuda.current_stream(device), _stream_for_copies(device)
        with torch.cuda.stream(beside):
            columns = [column.to(device, non_blocking=True) for column in columns]
        now.wait_stream(beside)
        record_stream(columns, now)
        return columns

    def values(self, flat: Rows) -> list[Tensor]:
        """The values, for the rows of a whole batch."""
        return [form.value(rows) for form, rows in zip(self._forms, flat, strict=True)]

    def compute(self, chain: Chain) -> Rows:
        """The rows that a chain gives for its batch."""
        return self._flat(chain.compute(), len(chain.samples))

    def agrees(self, chain: Chain, slots: Sequence[int]) -> bool:
        """Whether rows in a batch of this size give the same bits as in one of the usual size."""
        n = len(slots)
        if n not in self._agreeing:
            here = [i for i, slot in enumerate(slots) if slot >= 0]
            found = self.get([slots[i] for i in here], chain.device) if here else None
            if not found:
                return False
            self._agreeing[n] = all_same_bits(found, pick(self.compute(chain), here))
        return self._agreeing[n]

    def leads_to(self, other: Kept, chain: Chain) -> bool:
        """Whether these values are on the way to other ones, those of a chain."""
        narrows = any(form.stored != form.dtype for form in self._forms)
        if narrows or self.conditions != other.conditions or self.wanted == other.wanted:
            return False
        return bool(len(self.rows)) and chain.nodes.keys() >= set(self.wanted)

    def carried_on(
        self, earlier: Kept, chain: Chain, samples: Sequence[int], slots: Sequence[int]
    ) -> Rows | None:
        """These values of some samples of a batch, from earlier ones; None if these were damaged.

        The batch is as large as ever: some come more than once.
        """
        n = len(chain.samples)
        chosen = [i % len(samples) for i in range(n)]
        found = earlier.get([slots[i] for i in chosen], chain.device)
        if found is None:
            return None
        given = dict(zip(earlier.wanted, earlier.values(found), strict=True))
        values = chain.compute(rows=[samples[i] for i in chosen], given=given)
        return [column[: len(samples)] for column in self._flat(values, n)]

    def _flat(self, values: Sequence[Tensor], n: int) -> Rows:
        return [form.flat(value, n) for form, value in zip(self._forms, values, strict=True)]


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@cache
def _stream_for_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def pick(flat: Rows, rows: Sequence[int]) -> Rows:
    return [column[list(rows)] for column in flat]


def all_same_bits(a: Rows, b: Rows) -> bool:
    return all(map(same_bits, a, b))
