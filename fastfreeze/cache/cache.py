"""What frozen modules give, kept for each sample, so that they need not run again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from fastfreeze.cache.chain import Chain, Chains, Known
from fastfreeze.cache.digest import Holdings
from fastfreeze.cache.kept import (
    Batch,
    CacheStats,
    Kept,
    Rows,
    assembled,
    digests_of,
    pick,
    same_bits,
)
from fastfreeze.cache.rows import CannotKeepError, Layout, row_strides
from fastfreeze.cache.store import Budget, RowStore, StoreDirectory
from fastfreeze.trimming.state import fp32_precision, requires_grad, tensors_in
from fastfreeze.trimming.trimmed import TrimmedModel

_VIEW_BITS = 20
_INDEX_BITS = 63 - _VIEW_BITS
_TRIALS = 5  # batches that are timed
_MAX_CHANGES = 8  # of weights
_MAX_LATE = 4
_IN_EVAL = "the model is in eval mode"
_NOTHING_READ = "nothing frozen was read that has a row for each sample"
_UNKNOWN = "it is found out what is read of the frozen modules"
_LATE = "what frozen modules read was written to before their values were read"


class FeatureCache:
    """Calls a trimmed model, and runs its frozen modules once for each sample, not once an epoch.

    What the rest of the model reads of them is kept for each sample and view, and taken from there
    when the sample comes again. Nothing need be said about where the frozen part ends: it is what
    was read in the last step. When more is frozen, what was kept is carried on from the old values
    to the new ones as the samples come; when frozen weights or what modules hold change (a thaw,
    ``load_state_dict``), it is computed anew. Kept rows are compared with a digest of all tensors
    that go into the frozen modules, masks too.

    The model sees the same bits as without the cache (with ``dtype``, the same but for that
    rounding): what may differ is compared first. That is whether a row depends on the others,
    whether carrying on gives what computing from the inputs gives, once for each pair, and the
    first two batches that are found whole, and the first of another size. Where bits differ the
    cache does without.

    A frozen module is called where the model calls it, not put off, if a tensor that goes in
    requires grad, if something in it has hooks, draws random numbers, writes to its input or to
    what it holds, or in inference mode; what is in it may be put off all the same.

    It does without for good when a sample comes with other inputs than before: the data set is then
    not deterministic. With random augmentation, see :class:`~fastfreeze.RepeatableViews`.

    Args:
        network: made by :func:`fastfreeze.trim`.
        max_bytes: > 0; of what is kept. When it is reached nothing more is added: with shuffled
            epochs, to replace one sample by another gains nothing.
        directory: keep in files there, mapped into memory, to go on with after a restart; without,
            in memory. One process at a time may use it. Files that are damaged, cut short or made
            by another version, device or number of threads are not used. The files of the least
            recently used values are deleted when their space is needed.
        dtype: a floating-point dtype to keep wider values in: ``torch.bfloat16`` halves the bytes
            of fp32, with a relative error of up to 2**-8 in each value, kept or just computed. What
            is kept is then not carried on when more is frozen.
        enabled: None: on where the first few batches show that looking up and storing together take
            less time than the frozen modules, anew whenever something else is frozen. True: without
            that. False: off.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: ``directory`` is in use.
        OSError: ``directory`` cannot be made.

    Example:
        >>> network = fastfreeze.trim(model)
        >>> with fastfreeze.FeatureCache(network) as cache:
        ...     for (images, labels), samples in loader:  # of RepeatableViews
        ...         loss = criterion(cache(images, samples=samples), labels)
    """

    def __init__(
        self,
        network: TrimmedModel,
        max_bytes: int = 4 * 2**30,
        directory: str | Path | None = None,
        dtype: torch.dtype | None = None,
        enabled: bool | None = None,
    ) -> None:
        if not isinstance(network, TrimmedModel):
            raise TypeError(f"network must be a TrimmedModel, got {type(network).__name__}")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be an int > 0, got {max_bytes!r}")
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be > 0, got {max_bytes}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point dtype or None, got {dtype}")
        if enabled is not None and not isinstance(enabled, bool):
            raise TypeError(f"enabled must be True, False or None, got {enabled!r}")
        self.network = network
        self._dtype, self._measures = dtype, enabled is None
        self._directory = None if directory is None else StoreDirectory(Path(directory))
        self._budget = Budget(max_bytes, self._directory)
        self._kept: dict[str, Kept] = {}  # in the order in which they came
        self._refusals: dict[str, str] = {}
        self._known = Known()
        self._names: dict[Any, str] | None = None
        self._old: set[str] = set()  # kept when something else was frozen, and not used since
        self._holdings: dict[tuple[str, ...], Holdings] = {}
        self._digests: dict[tuple[str, ...], str] = {}  # of what was held in the last step
        self._num_changes = self._num_late = 0
        self._counts = CacheStats()
        self._off = "switched off by enabled=False" if enabled is False else ""
        self._reason = self._off or "it has not been called yet"

    def __call__(self, *args: Any, samples: Tensor, **kwargs: Any) -> Any:
        """``network(*args, **kwargs)``, with the frozen prefix from the cache where possible.

        Args:
            samples: int64 ``[B]``, the index of each sample, in 0..2**43 - 1; or ``[B, 2]``, index
                and view, in 0..2**20 - 1, as :class:`~fastfreeze.RepeatableViews` gives them. The
                same sample and view always mean the same inputs. They belong on the CPU: others are
                waited for.

        Raises:
            TypeError, ValueError: ``samples`` is not as above, or not of the inputs' length.
        """
        keys = _keys_of(samples)
        self._reason = self._off
        if self._off or peek_interpreter_stack() is not None:
            self._reason = self._off or "in a transform of torch.func"
            return self.network(*args, **kwargs)
        self._check_lengths(args, kwargs, len(keys))
        names = self.network.frozen_names()
        if names is not self._names:  # what is read now is not known
            self._names = names
            self._known.reads.clear()
            self._old = set(self._kept)
        if not (names and self.network.training):
            self._reason = "nothing is frozen" if self.network.training else _IN_EVAL
            return self.network(*args, **kwargs)
        if requires_grad((args, kwargs)):
            self._reason = "an input requires grad"
            return self.network(*args, **kwargs)
        form = tuple([(t.shape, t.dtype, t.device) for t in tensors_in((args, kwargs))])
        self._reason = _NOTHING_READ if form in self._known.reads else _UNKNOWN
        chains = Chains(self._known, form, len(keys), names, partial(self._find, keys))
        output = self.network.run(args, kwargs, chains)
        if chains.waits:
            chains.finish()
            return output
        self._num_late += 1
        self._known.reads.clear()
        self._reason = _LATE
        if self._num_late > _MAX_LATE:
            self._off = _LATE
        return output

    @property
    def active(self) -> bool:
        """Whether the latest call looked its samples up and kept what was missing."""
        return not self._reason

    @property
    def reason(self) -> str:
        """Why not; empty if it did."""
        return self._reason

    def stats(self) -> CacheStats:
        """Counts so far."""
        counts = self._counts
        counts.rows = sum(len(kept.rows) for kept in self._kept.values())
        counts.bytes = sum(kept.rows.nbytes for kept in self._kept.values())
        return CacheStats(**vars(counts))

    def close(self) -> None:
        """Let go of memory and files; the files stay. Calls then run the network alone."""
        for kept in self._kept.values():
            kept.rows.close()
        self._kept.clear()
        if self._directory is not None:
            self._directory.close()
        self._off = self._reason = "it is closed"

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_lengths(self, args: Any, kwargs: Any, n: int) -> None:
        tensors = [t for t in tensors_in((args, kwargs)) if t.ndim]
        if tensors and not any(len(t) == n for t in tensors):
            raise ValueError(
                f"samples must have a row for each of {len(tensors[0])} inputs, got {n}"
            )

    def _find(self, keys: list[int], chain: Chain) -> list[Tensor] | None:
        """The values of a chain, from what is kept as far as possible; None if it is to be made."""
        try:
            values = self._values(keys, chain)
        except CannotKeepError as error:
            self._reason = str(error)
            return None
        if self._reason == _NOTHING_READ:
            self._reason = ""
        return values

    def _values(self, keys: list[int], chain: Chain) -> list[Tensor]:
        batch = Batch(keys, chain)
        conditions, held = self._conditions(batch), self._held(chain)
        wanted = [node.key for node in chain.wanted]
        strides = [row_strides(t) for t in batch.inputs if t.ndim]
        text = f"{held}\n{wanted}\n{strides}\n{conditions}"
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        if name in self._refusals:
            raise CannotKeepError(self._refusals[name])
        if name not in self._kept:
            return self._first(batch, name, held, conditions)
        kept = self._kept[name]
        self._old.discard(name)
        if not kept.agrees(batch):
            raise CannotKeepError(
                f"a batch of {len(keys)} gives other bits than one of {kept.size}"
            )
        slots = self._slots(kept, batch, range(len(keys)))
        missing = [i for i, slot in enumerate(slots) if slot < 0]
        if not missing:
            return self._whole(kept, batch, slots)
        parts = []
        for earlier in self._earlier(kept, batch):
            rows, flat = self._carry_on(earlier, kept, batch, missing)
            parts.append((rows, flat))
            missing = sorted(set(missing) - set(rows))
            if not missing:
                break
        if missing:
            return self._compute(kept, batch, missing)
        if found := [i for i, slot in enumerate(slots) if slot >= 0]:
            parts.append((found, kept.get([slots[i] for i in found], batch.device)))
            self._counts.hits += len(found)
        return kept.values(assembled(parts))

    def _held(self, chain: Chain) -> str:
        """Digest of what a chain's modules hold; noted for what was kept of them."""
        place = chain.place
        if place not in self._holdings:
            self._holdings[place] = Holdings(chain.modules)
        digest = self._holdings[place].digest()
        if self._digests.setdefault(place, digest) != digest:
            self._digests[place] = digest
            self._num_changes += 1
            if self._num_changes > _MAX_CHANGES:
                self._give_up("what is frozen changes again and again")
        return digest

    def _conditions(self, batch: Batch) -> str:
        """What else values depend on, or how they are kept; in words."""
        device = batch.device
        return "\n".join(
            (
                f"{self._dtype} {fp32_precision(device)} {torch.get_num_threads()}",
                f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {device.type}",
                torch.cuda.get_device_name(device) if device.type == "cuda" else "",
                f"{self.network.folding}",
            )
        )

    def _first(self, batch: Batch, name: str, held: str, conditions: str) -> list[Tensor]:
        """The first batch of its kind: find out whether its values can be kept, and how."""
        n = len(batch.keys)
        if n < 2:
            raise CannotKeepError("a batch of one sample does not show what depends on the others")
        values = batch.chain.compute()
        try:
            layout = Layout.of(values, n, batch.inputs, self._dtype)
            kept = Kept(name, conditions, batch.chain, held, layout, n, self._measures)
            flat = layout.flat(values)
            if not kept.rows_are_independent(batch, flat):
                raise CannotKeepError("what a sample gives depends on the others in its batch")
        except CannotKeepError as error:
            self._refusals[name] = str(error)
            raise
        path = None if self._directory is None else self._directory.open(name)
        kept.rows = RowStore(layout.columns, self._budget, path)
        self._kept[name] = kept
        slots = self._slots(kept, batch, range(n))
        known = [i for i in range(n) if slots[i] >= 0]
        if known:
            found = kept.get([slots[i] for i in known], batch.device)
            if not same_bits(found, pick(flat, known)):
                kept.rows.discard(range(len(kept.rows)))
        for earlier in self._earlier(kept, batch):
            self._carry_on(earlier, kept, batch, range(n), flat)
        kept.rows.add(batch.keys, batch.digests.wait(), flat)
        self._counts.misses += n
        return kept.values(flat)

    def _whole(self, kept: Kept, batch: Batch, slots: list[int]) -> list[Tensor]:
        """A batch that is there."""
        flat = kept.get(slots, batch.device)
        if kept.unchecked:
            kept.unchecked -= 1
            if not same_bits(flat, kept.compute(batch)):
                self._refuse(kept, "the frozen modules do not always give the same bits")
                raise CannotKeepError(self._refusals[kept.name])
        self._counts.hits += len(batch.keys)
        return kept.values(flat)

    def _compute(self, kept: Kept, batch: Batch, missing: list[int]) -> list[Tensor]:
        """The whole batch; what is missing is kept from now on."""
        start = kept.now(batch.device)
        flat = kept.compute(batch)
        computed = kept.now(batch.device)
        kept.rows.add(
            [batch.keys[i] for i in missing], batch.digests.wait()[missing], pick(flat, missing)
        )
        self._counts.misses += len(batch.keys)
        if kept.measures:
            self._measure(kept, batch, computed - start, kept.now(batch.device) - computed)
        return kept.values(flat)

    def _measure(self, kept: Kept, batch: Batch, computing: float, storing: float) -> None:
        """Add to the measurement; at its end, switch off what does not pay."""
        if not len(kept.rows):
            return
        slots = [i * 7919 % len(kept.rows) for i in range(len(batch.keys))]
        start = kept.now(batch.device)
        digests_of(batch.inputs, len(batch.keys)).wait()
        self._held(batch.chain)
        kept.rows.digests(slots)
        kept.get(slots, batch.device)
        kept.times.append((computing, storing + kept.now(batch.device) - start))
        if len(kept.times) < _TRIALS:
            return
        kept.measures = False
        chain, cache = (median(column) * 1e3 for column in zip(*kept.times, strict=True))
        if cache >= chain:
            self._refuse(
                kept,
                f"it does not pay: storing and looking up take {cache:.2f} ms a batch, "
                f"the frozen modules {chain:.2f} ms",
            )

    def _slots(self, kept: Kept, batch: Batch, rows: Sequence[int]) -> list[int]:
        """Slots of rows of the batch, -1 where there is none; their inputs are the same as then.

        This is the one wait for a GPU in front of what trains, and only where rows are found. Later
        would be too late: a step on rows of other inputs cannot be taken back, and nothing else
        tells that a sample came with the same inputs again.
        """
        keys = [batch.keys[i] for i in rows]
        slots = kept.rows.find(keys)
        found = [(i, slot) for i, slot in zip(rows, slots, strict=True) if slot >= 0]
        if not found:
            return slots
        here = [slot for _, slot in found]
        digests = batch.digests.wait()[[i for i, _ in found]]
        differs = (kept.rows.digests(here) != digests).tolist()
        if not any(differs):
            return slots
        inherited = kept.rows.found_here(here)
        for (i, _), differ, old in zip(found, differs, inherited, strict=True):
            if differ and not old:
                self._blame(kept, batch, i)
        kept.rows.discard([slot for slot, differ in zip(here, differs, strict=True) if differ])
        return kept.rows.find(keys)

    def _blame(self, kept: Kept, batch: Batch, i: int) -> None:
        """Give up what depends on other inputs than before: all, if they are the model's own."""
        sample, view = divmod(batch.keys[i], 1 << _VIEW_BITS)
        came = f"sample {sample}, view {view}, came with other inputs than before"
        if batch.inputs_are_given:
            self._give_up(
                f"{came}: the data set is not deterministic (see fastfreeze.RepeatableViews)"
            )
        self._refuse(kept, f"for {came}: something random, or that trains, lies in front")
        raise CannotKeepError(self._refusals[kept.name])

    def _earlier(self, kept: Kept, batch: Batch) -> list[Kept]:
        """What is kept of values on the way to those that are wanted, the latest first.

        What is no longer valid, or of no use to what is frozen now, is deleted.
        """
        found = []
        for other in list(self._kept.values()):
            if other is kept:
                continue
            if self._holdings[other.place].digest() != other.held:
                self._delete(other)
            elif len(other.rows) and other.leads_to(kept, batch.chain):
                found.append(other)
            elif other.name in self._old:
                self._delete(other)
        return found[::-1]

    def _carry_on(
        self,
        earlier: Kept,
        kept: Kept,
        batch: Batch,
        rows: Sequence[int],
        reference: Rows | None = None,
    ) -> tuple[list[int], Rows]:
        """Those of some rows of the batch that are kept on the way to what is wanted, carried on.

        They move to where they are kept now.

        Args:
            reference: what the whole chain gives for the batch, if that is known.
        """
        slots = self._slots(earlier, batch.part(earlier.wanted), rows)
        rows = [i for i, slot in zip(rows, slots, strict=True) if slot >= 0]
        slots = [slot for slot in slots if slot >= 0]
        if not rows:
            return [], []
        flat = kept.carry_on(earlier, batch, rows, slots)
        if earlier.name not in kept.verified:
            expected = kept.compute(batch) if reference is None else reference
            if not same_bits(flat, pick(expected, rows)):
                self._delete(earlier)
                return [], []
            kept.verified.add(earlier.name)
        earlier.rows.discard(slots)
        kept.rows.add([batch.keys[i] for i in rows], batch.digests.wait()[rows], flat)
        self._counts.advanced += len(rows)
        if not len(earlier.rows):
            self._delete(earlier)
        return rows, flat

    def _refuse(self, kept: Kept, reason: str) -> None:
        self._refusals[kept.name] = reason
        self._delete(kept)

    def _give_up(self, reason: str) -> None:
        self._off = reason
        for kept in list(self._kept.values()):
            self._delete(kept)
        raise CannotKeepError(reason)

    def _delete(self, kept: Kept) -> None:
        kept.rows.close()
        del self._kept[kept.name]
        if self._directory is not None:
            self._directory.remove(kept.name)


def _keys_of(samples: Tensor) -> list[int]:
    """One number for each sample and view."""
    if not isinstance(samples, Tensor) or samples.dtype != torch.int64:
        what = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
        raise TypeError(f"samples must be an int64 tensor, got {what}")
    if not (samples.ndim == 1 or (samples.ndim == 2 and samples.shape[1] == 2)):
        raise ValueError(f"samples must be [B] or [B, 2], got {list(samples.shape)}")
    pairs = samples.tolist() if samples.ndim == 2 else [(i, 0) for i in samples.tolist()]
    for index, view in pairs:
        if not (0 <= index < 1 << _INDEX_BITS and 0 <= view < 1 << _VIEW_BITS):
            raise ValueError(
                f"samples must hold indices in 0..2**{_INDEX_BITS} - 1 and views in "
                f"0..2**{_VIEW_BITS} - 1, got {index}, {view}"
            )
    return [index << _VIEW_BITS | view for index, view in pairs]
