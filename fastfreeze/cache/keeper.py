"""Which calls are put off, and what is known of them from earlier steps.

In a call through a cache, frozen modules and a list of torch's functions compute nothing when they
are called: they hand on pending values, whose form is known from the last time. When something else
reads one, the calls behind it are made, or what they gave before is found in the cache.

A view is in one *group* with what it is a view of. Of a group one value is kept: the view, if that
alone is read, else what all are views of; they are taken from that very tensor.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastfreeze.cache.calls import (
    Call,
    CallNode,
    Chain,
    Outcome,
    Outer,
    autocast_state,
    flattened,
    is_put_off,
    is_static,
    meta_of,
    unflattened,
)
from fastfreeze.cache.digest import Holdings
from fastfreeze.trimming.pending import (
    Pending,
    TooLateError,
    current_run,
    may_wait,
    settle,
    settled,
)
from fastfreeze.trimming.watch import Lookout

_FRESH = (  # give new tensors, whatever they are given
    *("relu", "relu6", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "sigmoid"),
    *("tanh", "softmax", "log_softmax", "elu", "leaky_relu", "selu", "softplus", "max_pool1d"),
    *("max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "add", "sub", "mul", "div", "__add__", "__radd__", "__sub__"),
    *("__mul__", "__rmul__", "__truediv__", "cat", "concat", "concatenate", "stack", "mean"),
    *("sum", "amax", "amin", "interpolate", "normalize", "layer_norm", "clone", "masked_fill"),
)
_VIEWS = (  # may give views of the first argument, or itself
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk"),
    *("split", "contiguous", "expand", "select", "narrow", "swapaxes", "movedim", "unflatten"),
    *("to", "float", "__getitem__"),
)
_TRIALS = 2  # in its first call a module may set itself up, and folds are compared
_MAX_ARGUMENTS = 64  # that are no tensors, of one module or function
_MAX_OUTCOMES = 4096
_INTEGERS = (torch.int64, torch.int32)


def _functions(names: Iterable[str]) -> dict[Any, str]:
    owners = (torch, Tensor, F, torch._C._nn)
    return {getattr(o, name): name for o in owners for name in names if hasattr(o, name)}


_KNOWN = _functions((*_FRESH, *_VIEWS))


class Known:
    """What is known of a model's calls from earlier steps."""

    def __init__(self) -> None:
        # By what calls are and are given; None if one cannot be put off.
        self.outcomes: dict[Any, Outcome | None] = {}
        # By the form of the inputs: idents of what was read in the last step.
        self.reads: dict[Any, set[str]] = {}
        self.changes = 0  # of what modules hold
        self.reasons: dict[str, str] = {}  # why modules are not put off, by their names
        self.lookout = Lookout()
        self._arguments: dict[Any, set[Any]] = {}
        self._holders: set[str] = set()
        self._holdings: dict[str, Holdings] = {}
        self._digests: dict[str, tuple[str, str]] = {}

    def frozen_anew(self) -> None:
        """Forget what may be otherwise when something else is frozen."""
        self.reads.clear()
        self.reasons.clear()
        self._holdings = {n: h for n, h in self._holdings.items() if not h.problem}

    def put_off(self, name: str) -> None:
        """Note that a module's call is put off."""
        parts = name.split(".") if name else []
        self._holders.update(".".join(parts[:i]) for i in range(len(parts)))

    def held(self, name: str, module: nn.Module) -> tuple[str, str] | None:
        """Digests of what a module holds; None if it is not to be put off.

        Nor is what holds a module that was put off before, if it is frozen later: what was kept is
        then carried on.
        """
        if name in self._holders:
            return None
        holdings = self._holdings.get(name)
        if holdings is None or holdings.module is not module:
            holdings = self._holdings[name] = Holdings(module, self.lookout)
        digest = holdings.digest()
        if holdings.problem:
            self.reasons[name] = f"{name} is not put off: {holdings.problem}"
            return None
        if holdings.has_hooks_inside():
            return None
        if self._digests.setdefault(name, digest) != digest:
            self._digests[name] = digest
            self.changes += 1
        return digest

    def outcome(self, given: Any) -> Outcome | None:
        """What such a call gave the last time; None if it is new or is not to be put off."""
        found = self.outcomes.get(given)
        return found if found is not None and found.repeats else None

    def may_learn(self, given: Any, what: Any, arguments: Any) -> bool:
        """Whether a call is new, and what is called does not get other numbers all the time."""
        if given in self.outcomes:
            return False
        if len(self.outcomes) >= _MAX_OUTCOMES:
            self.outcomes.clear()
            self.reads.clear()
        seen = self._arguments.setdefault(what, set())
        if len(seen) < _MAX_ARGUMENTS:
            seen.add(arguments)
        return arguments in seen


class Keeper:
    """Puts calls off in one call of a model.

    Args:
        known: from earlier steps.
        form: of the model's inputs.
        samples: numbers of these.
        names: of its frozen modules.
        inputs: what the model is called with.
        find: gives a chain's value from the cache and whether it is exact; None if it cannot.

    Attributes:
        waits: False if what a call reads was written to before its value was read.
    """

    def __init__(
        self,
        known: Known,
        form: Any,
        samples: list[int],
        names: dict[nn.Module, str],
        inputs: Iterable[Tensor],
        find: Callable[[Chain], tuple[Tensor, bool] | None],
    ) -> None:
        self._known, self._find, self._names = known, find, names
        self._form, self._reads = form, known.reads.get(form)
        self._samples, self.waits, self._lock = samples, True, threading.RLock()
        self._inputs = set(map(id, inputs))
        self._outer: dict[int, Outer] = {}
        self._num_outer = self._num_calls = 0
        self._nodes: list[CallNode] = []
        self._asked: set[CallNode] = set()  # for what they gave before
        known.lookout.look()

    def finish(self) -> None:
        """Note what was read, of a group one value; what was not looked up is kept from now on."""
        groups: dict[CallNode, list[CallNode]] = {}
        for node in self._nodes:
            if node.was_read:
                groups.setdefault(node.root, []).append(node)
        wanted = [group[0] if len(group) == 1 else root for root, group in groups.items()]
        self._known.reads[self._form] = {node.ident for node in wanted}
        for node in wanted:
            is_new = node not in self._asked and self._has_rows(node)
            if is_new and node.at_hand() is not None:
                with suppress(TooLateError):  # something that goes in has been written to
                    self._find(Chain(node, self._samples))
        for node in self._nodes:
            node.call.held = ()
        self._nodes.clear()

    def call_module(self, module: nn.Module, function: Any, args: Any, kwargs: Any) -> Any:
        """Put off a call of a frozen module; NotImplemented if it must be made."""
        name = self._names[module]
        held = self._known.held(name, module)
        if held is None:
            return NotImplemented
        return self._put_off(("module", name), function, module, args, kwargs, held)

    def call_function(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Put off a function of pending values; NotImplemented if it must be called."""
        name = _KNOWN.get(function)
        if name is None or kwargs.get("inplace") or "out" in kwargs:
            return NotImplemented
        return self._put_off(("function", name), function, None, args, kwargs, ("", ""))

    def _put_off(
        self, what: Any, function: Any, module: Any, args: Any, kwargs: Any, held: Any
    ) -> Any:
        leaves, spec = flattened(args, kwargs)
        if not self._may_put_off(leaves, module is not None, what[1] in _VIEWS):
            return NotImplemented
        signature = tuple([meta_of(x) if isinstance(x, Tensor) else repr(x) for x in leaves])
        spec_text = spec if type(spec) is tuple else str(spec)
        given = (*what, spec_text, signature, autocast_state(), held[0])
        outcome, values = self._known.outcome(given), list[Any]()
        if outcome is None:
            arguments = spec_text, tuple(s for s in signature if isinstance(s, str))
            if not self._known.may_learn(given, what, arguments):
                return NotImplemented
            outcome, values, nesting = self._learn(given, function, module, leaves, spec)
            if outcome is None:
                return tree_unflatten(values, nesting)
        nodes: list[Any] = [
            self._node(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        behind = [node for node in nodes if isinstance(node, (CallNode, Outer))]
        keys, idents = tuple([n.key for n in behind]), tuple([n.ident for n in behind])
        key, ident = _names_of(given, held[1], keys, idents, len(self._samples))
        if module is not None:
            self._known.put_off(what[1])
        for node in behind:
            if isinstance(node, CallNode):
                node.call.num_readers += 1
        call = Call(function, nodes, spec, outcome, key, ident, self._num_calls, given[-2])
        self._num_calls += 1
        root = nodes[0].root if module is None and what[1] in _VIEWS else None
        outputs: list[Any] = []
        for i, meta in enumerate(outcome.metas):
            if isinstance(meta, int):
                outputs.append(leaves[meta])
            elif meta is None:
                outputs.append(None)
            else:
                self._nodes.append(CallNode(call, i, root, self._fill, self._lock))
                if values:
                    self._nodes[-1].set(values[i])
                outputs.append(Pending.of(self._nodes[-1]))
        return tree_unflatten(outputs, outcome.spec)

    def _may_put_off(self, leaves: Sequence[Any], is_module: bool, may_be_view: bool) -> bool:
        """Whether a call with these arguments may be put off, or looked at to be so later."""
        if torch.is_inference_mode_enabled() or not all(
            may_wait(x) if isinstance(x, Tensor) else is_static(x) for x in leaves
        ):
            return False
        if is_module:
            return True
        first = leaves[:1] if may_be_view else leaves
        if not any(map(is_put_off, first)):
            return False  # what is there already has a value that others may write to
        # An index of true and false: how many are true depends on the batch.
        return not may_be_view or not any(
            isinstance(x, Tensor) and x.dtype not in _INTEGERS for x in leaves[1:]
        )

    def _learn(
        self, given: Any, function: Any, module: Any, leaves: Sequence[Any], spec: Any
    ) -> tuple[Outcome | None, list[Any], Any]:
        """Make a call that is new: its outcome, None if it is not to be put off; and what it gives,
        with how that is nested.

        It is made once more if in the first time the module has set itself up, or folded
        convolutions were compared.
        """
        real = [leaf.node.look() if is_put_off(leaf) else settle(leaf) for leaf in leaves]
        args, kwargs = unflattened(real, spec)
        tensors = [leaf for leaf in real if isinstance(leaf, Tensor)]
        for _ in range(_TRIALS):
            before = self._effects(tensors, module)
            asks = _Asks()
            result = settled(self._made(function, args, kwargs, asks, module is not None))
            after = self._effects(tensors, module)
            if before[:-1] != after[:-1] or not (asks.found or before != after):
                break
        values, nesting = tree_flatten(result)
        numbers = {id(x): i for i, x in enumerate(real) if isinstance(x, Tensor) and module}
        own = [v for v in values if isinstance(v, Tensor) and id(v) not in numbers]
        fits = all(v is None or (isinstance(v, Tensor) and may_wait(v)) for v in values)
        if module is not None:
            held = [*module.parameters(), *module.buffers()]
            fits = fits and not _share_storage(own, [*tensors, *held])
        if not fits or asks.found or before != after:
            self._known.outcomes[given] = None
            for leaf in leaves:
                settle(leaf)  # has been read
            return None, values, nesting
        metas = tuple([numbers.get(id(v), meta_of(v)) for v in values])
        self._known.outcomes[given] = outcome = Outcome(metas, nesting)
        return outcome, values, nesting

    def _made(self, function: Any, args: Any, kwargs: Any, asks: _Asks, is_module: bool) -> Any:
        """What a call gives, with nothing in it put off."""
        run = current_run()
        outer, run.keeper = run.keeper, None
        try:
            with asks if is_module else nullcontext():
                run.own_modes = int(is_module)
                return function(*args, **kwargs)
        finally:
            run.keeper, run.own_modes = outer, 0

    def _effects(self, inputs: Sequence[Tensor], module: nn.Module | None) -> Any:
        """What a call must leave as it is: random numbers, its inputs, what its module holds."""
        if module is None:
            return ()
        name = self._names[module]
        return (
            torch.get_rng_state().numpy().tobytes(),
            random.getstate(),
            str(np.random.get_state()),
            [t._version for t in inputs],
            self._known.held(name, module),
        )

    def _node(self, tensor: Any) -> CallNode | Outer:
        if is_put_off(tensor):
            node: CallNode = tensor.node
            for view in node.parted():
                view.there()
            return node
        value = settle(tensor)
        known = self._outer.get(id(value))
        if known is None or known.version != value._version:
            known = Outer(value, self._num_outer, id(value) in self._inputs)
            self._outer[id(value)] = known
            self._num_outer += 1
        return known

    def _fill(self, node: CallNode) -> None:
        """Give a node that something reads its value, and at once the views of that theirs."""
        reads, root = self._reads, node.root
        alone = reads is not None and node.ident in reads and root.value is None
        target = node if alone else root
        if target.value is None:
            if not alone and root.parted():
                raise TooLateError
            chain = Chain(target, self._samples)
            found = None
            if reads is not None and self._has_rows(target):
                self._asked.add(target)
                found = self._find(chain)
            target.set(*(found or (chain.compute(),)))
        for view in (*target.views, node):
            if view.value is None:
                view.set(Chain(view, self._samples).compute())

    def _has_rows(self, node: CallNode) -> bool:
        return _times(node.shape, len(self._samples)) > 0


@lru_cache(maxsize=4096)
def _names_of(
    given: Any, held: str, keys: tuple[str, ...], idents: tuple[str, ...], n: int
) -> tuple[str, str]:
    """Key and ident of a call, whatever the number ``n`` of samples."""
    kind, name, spec, signature, autocast, text = given
    what = kind, name, spec, [_without_samples(form, n) for form in signature], autocast
    return _digest((*what, text, held, keys)), _digest((*what, idents))


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _without_samples(form: Any, n: int) -> Any:
    times = _times(form[0], n) if isinstance(form, tuple) else 0
    return (f"{times}n", *form[0][1:], *form[1:]) if times else form


def _times(shape: torch.Size, n: int) -> int:
    """Rows for each of ``n`` samples; 0 where there are none."""
    return 0 if not (n and shape) or shape[0] % n else shape[0] // n


class _Asks(TorchDispatchMode):
    """Notes whether something asks on the way what values are, to go on by that."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.data_dependent_output in function.tags:
            self.found = True
        elif torch.Tag.dynamic_output_shape in function.tags:
            by_numbers = function is torch.ops.aten.index.Tensor and all(
                index is None or index.dtype in _INTEGERS for index in args[1]
            )
            self.found = self.found or not by_numbers
        return function(*args, **(kwargs or {}))


def _share_storage(values: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether some values lie in the storage of one another, or of others."""
    places = [v.untyped_storage().data_ptr() for v in values if v.numel()]
    taken = {t.untyped_storage().data_ptr() for t in others}
    return len(set(places)) < len(places) or not taken.isdisjoint(places)
