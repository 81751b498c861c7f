"""What is kept of a value, whether that pays, and how rows may be computed bit by bit alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from fastfreeze.cache.calls import Chain
from fastfreeze.cache.rows import CannotKeepError, Form
from fastfreeze.cache.store import RowStore
from fastfreeze.trimming.bits import same_bits

_CHECKED_BATCHES = 2  # found whole, and computed all the same
_TRIALS = 5  # steps that are timed
_EVERY = 16  # steps of those in which all is found, one is timed later on
_MAX_IDLE = 50  # steps in which all was computed, and nothing more could be added


@dataclass
class CacheStats:
    """What a cache has done, counted in rows: what is kept of a value for one sample and view.

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
    """Whether keeping what a step reads pays: seconds of the latest steps that were timed.

    Attributes:
        computing: what is kept.
        storing: it.
        looking: it up, from the question to the values: digests, what modules hold, loading.
        idle: how many steps in a row gained nothing.
        turn: of the steps in which all was found.
    """

    computing: deque[float] = field(default_factory=lambda: deque(maxlen=_TRIALS))
    storing: deque[float] = field(default_factory=lambda: deque(maxlen=_TRIALS))
    looking: deque[float] = field(default_factory=lambda: deque(maxlen=_TRIALS))
    idle: int = 0
    turn: int = 0

    def found(self, looking: float) -> None:
        """Note a step in which all was found."""
        self.turn += 1
        if self.turn <= _TRIALS or self.turn % _EVERY == 0:
            self.looking.append(looking)

    def computed(self, computing: float, storing: float, looking: float) -> None:
        """Note a step in which all was computed, and how long it takes to look that up."""
        self.computing.append(computing)
        self.storing.append(storing)
        self.looking.append(looking)

    def check(self, fills: bool) -> None:
        """See that it pays, as far as that is known yet.

        Args:
            fills: whether storing is a part of it.

        Raises:
            CannotKeepError: it does not.
        """
        if self.idle > _MAX_IDLE:
            raise CannotKeepError(
                "it does not pay: max_bytes is reached, and no batch is there as a whole"
            )
        if len(self.computing) < _TRIALS or len(self.looking) < _TRIALS:
            return
        cost = median(self.looking) + (median(self.storing) if fills else 0.0)
        chain = median(self.computing)
        if cost >= chain:
            what = "storing and looking up take" if fills else "looking up takes"
            raise CannotKeepError(
                f"it does not pay: {what} {1e3 * cost:.2f} ms a batch, "
                f"the frozen modules {1e3 * chain:.2f} ms"
            )


class Kept:
    """What is kept of a value, for one form of input.

    Attributes:
        name: of the store.
        conditions: what else the value depends on.
        key: of the node whose value it is.
        form: of the value.
        rows: the store.
        size: samples of the first batch. Others count only if they give the same bits.
        verified: names of earlier values from which carrying on was found to give the same bits.
        unchecked: how many batches that are found whole are still to be computed all the same.
        untimed: how many that are computed are still to be timed.
    """

    form: Form
    rows: RowStore

    def __init__(self, name: str, conditions: str, chain: Chain) -> None:
        self.name, self.conditions = name, conditions
        self.key, self.size = chain.node.key, len(chain.samples)
        self.verified: set[tuple[str, ...]] = set()
        self.unchecked, self.untimed = _CHECKED_BATCHES, _TRIALS
        self._agreeing = {self.size: True}

    def first(self, chain: Chain, dtype: torch.dtype | None) -> Tensor:
        """The rows of the first batch, which show what form they have.

        Raises:
            CannotKeepError: they cannot be kept.
        """
        value, n = chain.compute(), self.size
        self.form = Form.of(value, n, dtype)
        if len(devices := {str(t.device) for t in (*chain.inputs, value)}) > 1:
            raise CannotKeepError(f"inputs and what is read are on {' and '.join(sorted(devices))}")
        flat = self.form.flat(value, n)
        rows = [(n - 1) - i // 2 for i in range(n)]  # half of them, twice, in another order
        again = self.form.flat(chain.compute(rows), n)
        if not same_bits(again, flat[rows]):
            # It may have been computed before its convolutions were folded.
            flat = self.form.flat(chain.compute(range(n)), n)
        if not same_bits(again, flat[rows]):
            raise CannotKeepError("what a sample gives depends on the others in its batch")
        return flat

    def get(self, slots: Sequence[int], device: torch.device) -> Tensor | None:
        """Kept rows, on ``device``: to a GPU out of pinned memory; None if they were damaged."""
        on_gpu = device.type == "cuda"
        rows = self.rows.get(slots, pinned=on_gpu)
        return None if rows is None else rows.to(device, non_blocking=on_gpu)

    def compute(self, chain: Chain) -> Tensor:
        """The rows that a chain gives for its batch."""
        return self.form.flat(chain.compute(), len(chain.samples))

    def agrees(self, chain: Chain, slots: Sequence[int]) -> bool:
        """Whether rows in a batch of this size give the same bits as in one of the usual size."""
        n = len(slots)
        if n not in self._agreeing:
            here = [i for i, slot in enumerate(slots) if slot >= 0]
            found = self.get([slots[i] for i in here], chain.device) if here else None
            if found is None:
                return False
            self._agreeing[n] = same_bits(found, self.compute(chain)[here])
        return self._agreeing[n]

    def may_lead_to(self, other: Kept) -> bool:
        """Whether another value that is computed from this one would be the same bits."""
        own = self.form.is_exact, self.conditions
        return own == (True, other.conditions) and self.key != other.key

    def carried_on(self, chain: Chain, rows: Sequence[int], given: dict[str, Tensor]) -> Tensor:
        """The rows that a chain gives for a batch of some samples, from given values of these."""
        return self.form.flat(chain.compute(rows, given), len(rows))
