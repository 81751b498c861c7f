"""What frozen modules give, kept for each sample, so that they need not run again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.module import _has_any_global_hook

from fastfreeze.cache.calls import Chain
from fastfreeze.cache.keeper import Keeper, Known
from fastfreeze.cache.kept import Account, CacheStats, Kept, first_rows
from fastfreeze.cache.rows import CannotKeepError, row_strides
from fastfreeze.cache.store import Stores
from fastfreeze.checks import check_int
from fastfreeze.trimming.bits import same_bits
from fastfreeze.trimming.state import fp32_precision, requires_grad, tensors_in
from fastfreeze.trimming.trimmed import TrimmedModel

_VIEW_BITS = 20
_INDEX_BITS = 63 - _VIEW_BITS
_MAX_CHANGES = 8  # of weights
_MAX_LATE = 4
_NOTHING_READ = "nothing frozen was read that has a row for each sample"
_NOT_THE_SAME = "the frozen modules do not always give the same bits"
_WAIT = 500  # calls, until what was refused is tried again for the first time
_CHANGES = "what is frozen changes again and again"
_LATE = "what frozen modules read was written to before their values were read"


class _Refusal(NamedTuple):
    """Why something is not kept, for how many calls, and until which one."""

    reason: str
    wait: int
    until: int


@dataclass
class _Step:
    """What a call has looked up, and the seconds that it took."""

    names: list[str] = field(default_factory=list)  # of stores
    found: int = 0  # in how many the whole batch was there
    stored: int = 0  # in how many it was not, and was added
    full: int = 0  # in how many it was not, and nothing could be added
    seconds: float = 0.0
    computing: float = 0.0  # of these


class FeatureCache:
    """Calls a trimmed model, and runs its frozen modules once for each sample, not once an epoch.

    What the rest of the model reads of them is kept for each sample and view, and taken from there
    when the sample comes again. Nothing need be said about where the frozen part ends: it is what
    was read in the last step. When more is frozen, the new values are computed from the kept ones
    as the samples come. When weights or anything else that frozen modules hold has changed, they
    are computed anew. Kept rows are compared with a digest of all tensors that go into the frozen
    modules, masks too: if a sample comes with other inputs than before, the data set is not
    deterministic, and the cache does without for good. With random augmentation, see
    :class:`~fastfreeze.RepeatableViews`.

    The model sees the same bits as without the cache; with ``dtype``, the same but for that
    rounding. These are compared first: rows in a batch of others, and of another size; new values
    that are computed from kept ones; and the first two batches that are found whole. Where bits
    differ the cache does without.

    A frozen module runs where the model calls it, and nothing of it is kept, in inference mode; if
    a tensor that goes in requires grad; if something in it has hooks, draws random numbers, writes
    to its input or to what it holds, gives anything but tensors and None, or asks what values are
    (``.item()``, ``nonzero()``); or if the content of what it holds cannot be seen, such as a
    generator, a lock or a module outside of it. What is in it may be kept all the same.

    Args:
        network: made by :func:`fastfreeze.trim`.
        max_bytes: > 0; of what is kept. When it is reached nothing more is added, but what was kept
            before something else was frozen makes room: with shuffled epochs, to replace one sample
            by another gains nothing.
        directory: keep in files there, to go on with after a restart; without, in memory. One
            process at a time may use it. Files that are damaged, cut short or made by another
            version, device or number of threads are not used. The files of the least recently used
            values are deleted when their space is needed.
        dtype: a floating-point dtype to keep wider values in: ``torch.bfloat16`` halves the bytes
            of fp32, with a relative error of up to 2**-8 in each value, kept or just computed, but
            for the first batch after a freeze. What is kept is then not carried on when more is
            frozen.
        enabled: None: on while looking up takes less time than the frozen modules, and storing too
            while it fills; measured in the first few batches after something else was frozen, and
            now and then. What does not pay is tried again after a while. True: without that. False:
            off.

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
        check_int("max_bytes", max_bytes, minimum=1)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point dtype or None, got {dtype}")
        if enabled is not None and not isinstance(enabled, bool):
            raise TypeError(f"enabled must be True, False or None, got {enabled!r}")
        self.network = network
        self._dtype, self._measures = dtype, enabled is None
        self._stores = Stores(max_bytes, None if directory is None else Path(directory))
        self._kept: dict[str, Kept] = {}  # in the order in which they came
        self._refusals: dict[str, _Refusal] = {}
        self._calls = 0
        self._known = Known()
        self._names: dict[Any, str] = {}
        self._old: set[str] = set()  # kept when something else was frozen, and not used since
        self._num_late = 0
        self._counts = CacheStats()
        self._step, self._accounts = _Step(), dict[tuple[str, ...], Account]()
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
        self._calls += 1
        self._reason = self._off or self._obstacle(args, kwargs, len(keys))
        if self._reason:
            return self.network(*args, **kwargs)
        known, inputs = self._known, list(tensors_in((args, kwargs)))
        form = tuple([(t.shape, t.dtype, t.device) for t in inputs])
        self._reason = _NOTHING_READ
        changes = known.changes
        self._step = _Step()
        keeper = Keeper(known, form, keys, self._names, inputs, self._find)
        output = self.network.run(args, kwargs, keeper)
        if keeper.waits and self.active:
            self._forget_old(keys)
            if self._measures and self._step.names:
                self._settle(self._step)
        if known.changes != changes:
            self._old = set(self._kept)
        if known.changes > _MAX_CHANGES:
            self._give_up(_CHANGES)
        if keeper.waits:
            if self._reason == _NOTHING_READ and known.reasons:
                self._reason = next(iter(known.reasons.values()))
            return output
        known.reads.pop(form, None)
        self._num_late += 1
        self._reason = _LATE
        if self._num_late > _MAX_LATE:
            self._give_up(_LATE)
        return output

    def _obstacle(self, args: Any, kwargs: Any, n: int) -> str:
        """Why a call with these inputs goes to the network alone; empty if it does not."""
        if peek_interpreter_stack() is not None:
            return "in a transform of torch.func"
        if _has_any_global_hook():
            return "all modules have hooks"
        if not any(len(x) == n for x in tensors_in((args, kwargs)) if x.ndim):
            batches = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
            if batches:
                raise ValueError(
                    f"samples must have a row for each of {len(batches[0])} inputs, got {n}"
                )
            return "no input has a row for each sample"
        names = self.network.frozen_names()
        if names is not self._names:  # what is read now is not known
            self._names = names
            self._known.frozen_anew()
            self._old = set(self._kept)
        if not self.network.training:
            return "the model is in eval mode"
        if not names:
            return "nothing is frozen"
        return "an input requires grad" if requires_grad((args, kwargs)) else ""

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
        stores = [kept.rows for kept in self._kept.values()]
        num_bytes = sum(store.nbytes for store in stores)
        return replace(self._counts, rows=sum(map(len, stores)), bytes=num_bytes)

    def close(self) -> None:
        """Let go of memory and files; the files stay. Calls then run the network alone."""
        self._stores.close()
        self._kept.clear()
        self._off = self._reason = "it is closed"

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, chain: Chain) -> tuple[Tensor, bool] | None:
        """A value, from what is kept as far as possible, and whether it is exact; None if it cannot
        be kept.
        """
        if self._off:
            return None
        try:
            start = self._clock(chain)
            kept, rows = self._rows(chain)
            value = kept.form.value(rows)
            self._step.seconds += self._clock(chain) - start
        except CannotKeepError as error:
            self._reason = str(error)
            return None
        except OSError as error:
            self._give_up(f"its files cannot be used: {error}")
            return None
        if self._reason == _NOTHING_READ:
            self._reason = ""
        return value, kept.form.is_exact

    def _rows(self, chain: Chain) -> tuple[Kept, Tensor]:
        """The rows of a batch, found or computed and kept, and what keeps them.

        Raises:
            CannotKeepError: they are not kept.
        """
        conditions = self._conditions(chain.device)
        strides = [row_strides(t) for t in chain.inputs if t.ndim]
        text = f"{chain.node.key}\n{strides}\n{conditions}"
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        refusal = self._refusals.get(name)
        if refusal and self._calls < refusal.until:
            raise CannotKeepError(refusal.reason)
        kept = self._kept.get(name)
        if kept is None:
            return self._first(name, conditions, chain)
        self._step.names.append(name)
        self._old.discard(name)
        slots = self._slots(kept, chain, range(len(chain.samples)))
        if not kept.agrees(chain, slots):
            raise CannotKeepError(
                f"a batch of {len(slots)} gives other bits than one of {kept.size}"
            )
        missing = [i for i, slot in enumerate(slots) if slot < 0]
        carried = self._carry_on(kept, chain, missing) if missing else None
        if carried is not None and len(missing) == len(slots):
            return kept, carried
        if carried is not None:
            slots = kept.rows.find(chain.samples)  # by now all, if there was room
        rows = kept.get(slots, chain.device) if all(slot >= 0 for slot in slots) else None
        if rows is None:
            return kept, self._compute(kept, chain)
        if not missing:
            self._check_whole(kept, chain, rows)
        self._counts.hits += len(slots) - len(missing)
        return kept, rows

    def _conditions(self, device: torch.device) -> str:
        """What else values depend on, or how they are kept; in words."""
        cpu, gpu = torch.backends.cpu.get_cpu_capability(), ""
        if device.type == "cuda":
            gpu = torch.cuda.get_device_name(device)
        how = self._dtype, fp32_precision(device), torch.get_num_threads(), self.network.folding
        return f"{how} {torch.__version__} {cpu} {device.type} {gpu}"

    def _first(self, name: str, conditions: str, chain: Chain) -> tuple[Kept, Tensor]:
        """The first batch of its kind: find out whether its values can be kept, and how."""
        n = len(chain.samples)
        if n < 2:
            raise CannotKeepError("a batch of one sample does not show what depends on the others")
        try:
            form, flat = first_rows(chain, self._dtype)
        except CannotKeepError as error:
            raise self._refused(name, str(error)) from None
        rows = self._stores.open(name, form.column)
        kept = self._kept[name] = Kept(name, conditions, chain.node.key, form, rows, n)
        slots = self._slots(kept, chain, range(n))
        if here := [i for i in range(n) if slots[i] >= 0]:
            found = kept.get([slots[i] for i in here], chain.device)
            if found is not None and not same_bits(found, flat[here]):
                self._stores.drop(name)
                kept.rows = self._stores.open(name, form.column)
        self._add(kept, chain, range(n), flat)
        self._counts.misses += n
        return kept, flat

    def _check_whole(self, kept: Kept, chain: Chain, rows: Tensor) -> None:
        """See that a batch that was found is right."""
        self._step.found += 1
        if kept.unchecked:
            kept.unchecked -= 1
            if not same_bits(rows, self._timed(kept, chain)):
                raise self._refused(kept.name, _NOT_THE_SAME)

    def _compute(self, kept: Kept, chain: Chain) -> Tensor:
        """The whole batch; what is missing is kept from now on."""
        samples = range(len(chain.samples))
        self._counts.misses += len(samples)
        flat = self._timed(kept, chain)
        added = self._add(kept, chain, samples, flat)
        self._step.stored += bool(added)
        self._step.full += not added
        return flat

    def _timed(self, kept: Kept, chain: Chain) -> Tensor:
        """The rows of a batch, computed."""
        start = self._clock(chain)
        flat = kept.compute(chain)
        self._step.computing += self._clock(chain) - start
        return flat

    def _clock(self, chain: Chain) -> float:
        """Seconds, when the device has done what was asked, if somebody wants to know."""
        if self._measures and chain.device.type == "cuda":
            torch.cuda.synchronize(chain.device)
        return time.perf_counter()

    def _settle(self, step: _Step) -> None:
        """Refuse for a while what does not pay."""
        names, n = tuple(step.names), len(step.names)
        account = self._accounts.setdefault(names, Account())
        rest = step.seconds - step.computing
        if step.found == n:
            account.found(rest)
        elif step.stored == n:
            account.stored(rest, step.computing)
        account.idle = account.idle + 1 if step.full == n else 0
        try:
            account.check(fills=step.found < n)
        except CannotKeepError as error:
            del self._accounts[names]
            for name in names:
                self._refused(name, str(error))

    def _add(self, kept: Kept, chain: Chain, samples: Sequence[int], flat: Tensor) -> int:
        """Keep rows of some samples; what is no longer wanted makes room."""
        keys = [chain.samples[i] for i in samples]
        digests = [chain.digests[i] for i in samples]
        pairs = zip(keys, kept.rows.find(keys), strict=True)
        wanted = len({key for key, slot in pairs if slot < 0})
        added = kept.rows.add(keys, digests, flat)
        while added < wanted and (old := next(iter(self._old), None)):
            self._delete(old)
            added += kept.rows.add(keys, digests, flat)
        return added

    def _forget_old(self, keys: Sequence[int]) -> None:
        """What has been carried on, or is of no use to what is frozen now."""
        for name in list(self._old):
            self._kept[name].rows.forget(keys)
            if not len(self._kept[name].rows):
                self._delete(name)

    def _slots(self, kept: Kept, chain: Chain, samples: Sequence[int]) -> list[int]:
        """Slots of samples of the batch, -1 where there is none; inputs are the same as then.

        This is the one wait for a GPU in front of what trains, and only where rows are found. Later
        would be too late: a step on rows of other inputs cannot be taken back, and nothing else
        tells that a sample came with the same inputs again.
        """
        slots = kept.rows.find([chain.samples[i] for i in samples])
        for place, (i, slot) in enumerate(zip(samples, slots, strict=True)):
            if slot >= 0 and kept.rows.digest(slot) != chain.digests[i]:
                if not kept.rows.was_found(slot):
                    self._blame(kept, chain, i)
                kept.rows.forget([chain.samples[i]])
                slots[place] = -1
        return slots

    def _blame(self, kept: Kept, chain: Chain, i: int) -> None:
        """Give up what depends on other inputs than before: all, if they are the model's own."""
        sample, view = divmod(chain.samples[i], 1 << _VIEW_BITS)
        came = f"sample {sample}, view {view}, came with other inputs than before"
        if all(outer.is_input for outer in chain.outer):
            reason = f"{came}: the data set is not deterministic (see fastfreeze.RepeatableViews)"
            self._give_up(reason)
            raise CannotKeepError(reason)
        reason = f"to a frozen module {came}: something random, or that trains, lies in front of it"
        raise self._refused(kept.name, reason)

    def _carry_on(self, kept: Kept, chain: Chain, samples: Sequence[int]) -> Tensor | None:
        """Rows of some samples of a batch, computed from earlier values and kept.

        None if there are no such values of all of them. The batch is as large as ever: some samples
        come more than once.
        """
        places = [i % len(samples) for i in range(len(chain.samples))]
        given: dict[str, Tensor] = {}
        names = []
        for earlier in reversed(self._kept.values()):
            node = chain.nodes.get(earlier.key)
            if node is None or not (earlier.may_lead_to(kept) and chain.reads(node, given)):
                continue
            slots = self._slots(earlier, Chain(node, chain.samples), samples)
            if all(slot >= 0 for slot in slots):
                rows = earlier.get([slots[i] for i in places], chain.device)
                if rows is not None:
                    given[earlier.key] = earlier.form.value(rows)
                    names.append(earlier.name)
        if not given:
            return None
        flat = kept.carried_on(chain, [samples[i] for i in places], given)[: len(samples)]
        if tuple(names) not in kept.verified:
            if not same_bits(flat, kept.compute(chain)[list(samples)]):
                for name in names:
                    self._delete(name)
                return None
            kept.verified.add(tuple(names))
        self._add(kept, chain, samples, flat)
        self._counts.advanced += len(samples)
        return flat

    def _refused(self, name: str, reason: str) -> CannotKeepError:
        """Do without for a while, the longer the more often."""
        wait = 2 * self._refusals[name].wait if name in self._refusals else _WAIT
        self._refusals[name] = _Refusal(reason, wait, self._calls + wait)
        if name in self._kept:
            self._delete(name)
        return CannotKeepError(reason)

    def _give_up(self, reason: str) -> None:
        self._off = self._reason = reason
        for name in list(self._kept):
            self._delete(name)

    def _delete(self, name: str) -> None:
        self._stores.drop(name)
        del self._kept[name]
        self._old.discard(name)


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
