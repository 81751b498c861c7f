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


def _latest() -> deque[float]:
    return deque(maxlen=_TRIALS)


@dataclass
class Account:
    """Whether it pays to keep what a step reads: seconds of the latest steps that were timed."""

    computing: deque[float] = field(default_factory=_latest)
    storing: deque[float] = field(default_factory=_latest)  # and looking up
    finding: deque[float] = field(default_factory=_latest)  # digests, loading and all
    idle: int = 0  # steps in a row that gained nothing
    turn: int = 0  # of the steps in which all was found

    def found(self, seconds: float) -> None:
        """Note a step in which all was found."""
        self.turn += 1
        if self.turn <= _TRIALS or self.turn % _EVERY == 0:
            self.finding.append(seconds)

    def stored(self, seconds: float, computing: float) -> None:
        """Note a step in which all was computed, and then stored."""
        self.storing.append(seconds)
        self.computing.append(computing)

    def check(self, fills: bool) -> None:
        """See that it pays, as far as that is known yet.

        Args:
            fills: whether the latest step stored.

        Raises:
            CannotKeepError: it does not.
        """
        if self.idle > _MAX_IDLE:
            raise CannotKeepError(
                "it does not pay: max_bytes is reached, and no batch is there as a whole"
            )
        costs = self.storing if fills else self.finding
        if min(len(costs), len(self.computing)) < _TRIALS:
            return
        cost, chain = median(costs), median(self.computing)
        if cost >= chain:
            what = "storing and looking up take" if fills else "looking up takes"
            raise CannotKeepError(
                f"it does not pay: {what} {1e3 * cost:.2f} ms a batch, "
                f"the frozen modules {1e3 * chain:.2f} ms"
            )


@dataclass(eq=False)
class Kept:
    """What is kept of a value, for one form of input."""

    name: str  # of the store
    conditions: str  # what else the value depends on
    key: str  # of its node
    form: Form
    rows: RowStore
    size: int  # samples of the first batch; others count only if they give the same bits
    unchecked: int = 2  # batches that are still to be computed when they are found whole

    def __post_init__(self) -> None:
        self.verified: set[tuple[str, ...]] = set()  # names of what was carried on, the same bits
        self._agreeing = {self.size: True}

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
        return self.form.flat(chain.compute(rows, given=given), len(rows))


def first_rows(chain: Chain, dtype: torch.dtype | None) -> tuple[Form, Tensor]:
    """The rows of the first batch, and the form that they have.

    Raises:
        CannotKeepError: they cannot be kept.
    """
    value, n = chain.compute(), len(chain.samples)
    if len(devices := {str(t.device) for t in (*chain.inputs, value)}) > 1:
        raise CannotKeepError(f"inputs and what is read are on {' and '.join(sorted(devices))}")
    form = Form.of(value, n, dtype)
    flat = form.flat(value, n)
    rows = [(n - 1) - i // 2 for i in range(n)]  # half of them, twice, in another order
    again = form.flat(chain.compute(rows), n)
    if not same_bits(again, flat[rows]):  # in the model's first call it was not yet folded
        flat = form.flat(chain.compute(range(n)), n)
    if not same_bits(again, flat[rows]):
        raise CannotKeepError("what a sample gives depends on the others in its batch")
    return form, flat
