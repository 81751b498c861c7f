"""Calls of frozen modules that are put off, and the chains that they make.

In a call through a cache, frozen modules and a list of torch's functions compute nothing when they
are called: they hand on pending values, whose form is known from the last time. When something else
reads one, the calls behind it are made, or what they gave before is found in the cache. What was
read in the last step is asked for together.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from fastfreeze.cache.rows import (
    CannotKeepError,
    Fetched,
    by_sample,
    hash_rows,
    row_numbers,
    take_rows,
)
from fastfreeze.trimming.pending import Given, Node, Pending, TooLateError, current_run, settle

_STATIC = (
    *(bool, int, float, str, type(None), slice, type(...)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
_LEAVES = (Tensor, *_STATIC)
_PURE = (
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk"),
    *("split", "contiguous", "expand", "select", "narrow", "swapaxes", "movedim", "view_as"),
    *("unflatten", "expand_as", "type_as", "to", "float", "__getitem__"),
    *("relu", "relu6", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "sigmoid"),
    *("tanh", "softmax", "log_softmax", "elu", "leaky_relu", "selu", "softplus", "max_pool1d"),
    *("max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "add", "sub", "mul", "div", "__add__", "__radd__", "__sub__"),
    *("__mul__", "__rmul__", "__truediv__", "cat", "concat", "concatenate", "stack", "mean"),
    *("sum", "amax", "amin", "pad", "interpolate", "normalize", "layer_norm", "clone"),
    "masked_fill",
)
_MAY_BE_IN_PLACE = (F.relu, F.relu6, F.silu, F.hardswish, F.hardtanh, F.elu, F.leaky_relu)
_TRIALS = 2  # a model may set itself up in its first call


def _functions(names: Iterable[str]) -> dict[Any, str]:
    owners = (torch, Tensor, F, torch._C._nn)
    return {getattr(o, name): name for o in owners for name in names if hasattr(o, name)}


_KNOWN = _functions(_PURE)


@dataclass(frozen=True)
class Argument:
    """The argument of this number, handed back."""

    number: int


@dataclass(frozen=True)
class Form:
    """What a call gave the last time.

    Attributes:
        metas: shape, dtype and device of each tensor, or which argument it is; other values as they
            are.
        spec: how they are nested.
        keys: of such calls, by those of what goes in.
    """

    metas: tuple[Any, ...]
    spec: TreeSpec
    keys: dict[Any, str] = field(default_factory=dict)


class Call:
    """A call that has been put off.

    Attributes:
        function: makes it.
        modules: that it runs.
        leaves: arguments: nodes, and values that are no tensors.
        key: what it is called, with what, and what went in there; the same in every process.
        index: its place in the forward.
        outputs: while they are there.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        modules: Sequence[nn.Module],
        leaves: list[Any],
        spec: Any,
        form: Form,
        key: str,
        index: int,
        autocast: Any,
    ) -> None:
        self.function, self.modules, self.leaves, self.spec = function, modules, leaves, spec
        self.key, self.index, self._form, self._autocast = key, index, form, autocast
        self.outputs: list[Any] | None = None

    def make(self, values: list[Any], reader: Chains) -> list[Any]:
        """Make it, with the values of its arguments.

        Raises:
            TooLateError: what it gives has another form than the last time.
        """
        args, kwargs = _unflattened(values, self.spec)
        with ExitStack() as stack:
            if self._autocast != autocast_state():
                for device, (enabled, dtype) in zip(("cpu", "cuda"), self._autocast, strict=True):
                    stack.enter_context(torch.autocast(device, dtype, enabled))
            outputs, spec = tree_flatten(self.function(*args, **kwargs))
        form = self._form
        if spec != form.spec or any(
            meta != _meta(value) and not isinstance(meta, Argument)
            for meta, value in zip(form.metas, outputs, strict=True)
        ):
            reader.forget(form)
            raise TooLateError(reader)
        return outputs


class CallNode(Node):
    """One of the values that a call gives."""

    __slots__ = ("call", "chains", "i", "ident", "key")

    def __init__(self, call: Call, i: int, meta: tuple[Any, ...], chains: Chains) -> None:
        shape, dtype, device = meta
        super().__init__(shape, dtype, device, chains)
        self.call, self.i, self.chains = call, i, chains
        self.key = f"{call.key}.{i}"
        self.ident = call.index, self.key

    def compute(self) -> Tensor:
        return self.chains.read(self)


class _Outer(Given):
    """A tensor that came from outside, the n-th of the call."""

    __slots__ = ("key", "number")

    def __init__(self, value: Tensor, number: int, chains: Chains) -> None:
        super().__init__(value, chains)
        self.number, self.key = number, f"<{number}>"


@dataclass
class Known:
    """What is known of a model's calls from earlier steps.

    Attributes:
        forms: of what calls gave, by what they are and what they are given; a number is how often
            they could not be put off.
        reads: what was read in the last step with inputs of a form; missing if that is not known.
        inside: what is in the modules whose calls are put off.
        holders: names of what holds one of these. It is not put off itself when it is frozen, too:
            what was kept is then carried on.
    """

    forms: dict[Any, Form | int] = field(default_factory=dict)
    reads: dict[Any, set[Any]] = field(default_factory=dict)
    inside: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)

    def frozen_anew(self) -> None:
        """Forget what may be otherwise when something else is frozen."""
        self.reads.clear()
        self.inside.clear()

    def put_off(self, name: str) -> None:
        """Note that a module's call is put off."""
        parts = name.split(".") if name else []
        self.holders.update(".".join(parts[:i]) for i in range(len(parts)))

    def has_hooks_inside(self, module: nn.Module) -> bool:
        """Whether something in a module has hooks; those of its own are called as ever."""
        if module not in self.inside:
            self.inside[module] = [m for m in module.modules() if m is not module]
        hooks = [
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in self.inside[module]
        ]
        return any(hooks)


class Chains:
    """The calls that are put off in one call of a model.

    Args:
        known: from earlier steps.
        form: of the model's inputs.
        samples: numbers of these.
        names: of its frozen modules.
        find: values of nodes from the cache, or computed by it; or None.

    Attributes:
        waits: False if what a chain reads was written to before it was read.
        given: ids of the tensors that the model is called with.
    """

    def __init__(
        self,
        known: Known,
        form: Any,
        samples: list[int],
        names: dict[nn.Module, str],
        find: Callable[[Chain], list[Tensor] | None],
    ) -> None:
        self._known, self._find, self._names = known, find, names
        self._form, self._reads = form, known.reads.get(form)
        self.samples, self.waits = samples, True
        self.given: set[int] = set()
        self._outer: dict[int, _Outer] = {}  # tensors that came from outside, in order
        self._nodes: list[CallNode] = []
        self._index = 0
        self._read: set[Any] = set()
        self._learned = False

    def begin(self, args: Any, kwargs: Any) -> None:
        """Note what the model is called with."""
        self.given = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}

    def release(self) -> None:
        """Let go of what was computed on the way."""
        for node in self._nodes:
            node.call.outputs = None

    def finish(self) -> None:
        """Note what was read, for the next step."""
        if self._learned:
            self._known.reads.pop(self._form, None)
        else:
            self._known.reads[self._form] = self._read

    def forget(self, form: Form) -> None:
        """Never put a call off again that gave something of another form than the last time."""
        forms = self._known.forms
        forms.update({given: _TRIALS for given, found in forms.items() if found is form})

    def call_module(self, module: nn.Module, function: Any, args: Any, kwargs: Any) -> Any:
        """Put off a call of a frozen module; NotImplemented if it must be made."""
        name = self._names[module]
        if name in self._known.holders or self._known.has_hooks_inside(module):
            return NotImplemented
        return self._put_off(("module", name), function, [module], args, kwargs)

    def call_function(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Put off a function of pending values; NotImplemented if it must be called."""
        name = _KNOWN.get(function)
        in_place = function in _MAY_BE_IN_PLACE and any(a is True for a in args[1:])
        if name is None or in_place or kwargs.get("inplace"):
            return NotImplemented
        return self._put_off(("function", name), function, [], args, kwargs)

    def _put_off(
        self, what: tuple[str, str], function: Any, modules: Any, args: Any, kwargs: Any
    ) -> Any:
        if torch.is_inference_mode_enabled():
            return NotImplemented
        leaves, spec = _flattened(args, kwargs)
        signature: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if not _may_wait(leaf):
                    return NotImplemented
                signature.append(_meta(leaf))
            elif isinstance(leaf, _STATIC):
                signature.append(repr(leaf))
            else:
                return NotImplemented
        given = (
            *what,
            spec if type(spec) is tuple else str(spec),
            tuple(signature),
            autocast_state(),
        )
        form = self._known.forms.get(given, 0)
        if self._learned or not isinstance(form, Form):
            if form == _TRIALS:
                return NotImplemented
            return self._learn(given, function, modules, leaves, spec)
        nodes = [self._node(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        keys = tuple([node.key for node in nodes if isinstance(node, (CallNode, _Outer))])
        if keys not in form.keys:
            form.keys[keys] = self._key(given, keys)
            if modules:
                self._known.put_off(what[1])
        place = self._index, given[-1]
        call = Call(function, modules, nodes, spec, form, form.keys[keys], *place)
        self._index += 1
        outputs = [self._output(call, i, meta, leaves) for i, meta in enumerate(form.metas)]
        return tree_unflatten(outputs, form.spec)

    def _output(self, call: Call, i: int, meta: Any, leaves: Sequence[Any]) -> Any:
        if isinstance(meta, Argument):
            return leaves[meta.number]
        if not isinstance(meta, tuple):
            return meta
        self._nodes.append(CallNode(call, i, meta, self))
        return Pending.of(self._nodes[-1])

    def _learn(self, given: Any, function: Any, modules: Any, leaves: list[Any], spec: Any) -> Any:
        """Make a call that is new, and see what it gives and whether it may be put off.

        From here on nothing is put off in this step: the model may write to what it was given.
        """
        self._learned = True
        leaves = [settle(leaf) if _is_put_off(leaf) else leaf for leaf in leaves]
        args, kwargs = _unflattened(leaves, spec)
        real = [leaf for leaf in leaves if isinstance(leaf, Tensor) and type(leaf) is not Pending]
        before = _effects(real, modules)
        run = current_run()
        outer, run.keeper = run.keeper, None
        try:
            result = function(*args, **kwargs)
        finally:
            run.keeper = outer
        values, nesting = tree_flatten(result)
        known = self._known.forms.get(given, 0)
        trials = known if isinstance(known, int) else 0
        numbers = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        fits = all(_may_wait(v) if isinstance(v, Tensor) else _is_static(v) for v in values)
        own = [v for v in values if id(v) not in numbers]
        if not fits or (modules and _share_storage(own, real)):
            trials, fits = _TRIALS, False
        elif _effects(real, modules) != before:
            trials, fits = trials + 1, False
        metas = [Argument(numbers[id(v)]) if id(v) in numbers else _meta(v) for v in values]
        self._known.forms[given] = Form(tuple(metas), nesting) if fits else trials
        if not fits:
            return result
        # So that functions of these come here, too.
        return tree_unflatten([_wrapped(value) for value in values], nesting)

    def _node(self, tensor: Any) -> CallNode | _Outer:
        if _is_put_off(tensor) and tensor.node.value is None:
            node: CallNode = tensor.node
            return node
        value = settle(tensor)
        known = self._outer.setdefault(id(value), _Outer(value, len(self._outer), self))
        return known if known.version == value._version else _Outer(value, known.number, self)

    def _key(self, given: Any, keys: tuple[str, ...]) -> str:
        """What a call is, whatever the number of samples."""
        *what, signature, autocast = given
        forms = [self._without_samples(form) for form in signature]
        text = repr((what, forms, autocast, keys)).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def _without_samples(self, form: Any) -> Any:
        times = self._times(form[0]) if isinstance(form, tuple) else 0
        return (f"{times}n", *form[0][1:], *form[1:]) if times else form

    def _times(self, shape: torch.Size) -> int:
        """Rows for each sample; 0 where there are none."""
        n = len(self.samples)
        return 0 if not (n and shape) or shape[0] % n else shape[0] // n

    def read(self, node: CallNode) -> Tensor:
        """The value of a node that something reads; with it those that were read the last time."""
        reads, times = self._reads, self._times(node.shape)
        self._read.add(node.ident)
        if reads is None:
            return Chain([node], self).compute(keep=True)[0]
        wanted = [
            n
            for n in self._nodes
            if n is node or (n.value is None and n.ident in reads and self._times(n.shape) == times)
        ]
        self._read.update(n.ident for n in wanted)
        chain = Chain(wanted, self)
        values = self._find(chain) if times else None
        if values is None:
            values = chain.compute()
        for n, value in zip(wanted, values, strict=True):
            if n is not node:
                n.version, n.value = value._version, value
        return values[wanted.index(node)]


class Chain:
    """The calls behind some nodes, also those whose values are known.

    Attributes:
        wanted: the nodes.
        keys: of these.
        chains: that they belong to.
        samples: numbers of those in the batch.
        calls: in the order in which they were put off.
        outer: the tensors that go in, by their number.
        modules: that the calls run.
        place: which calls of modules they are.
    """

    def __init__(self, wanted: Sequence[CallNode], chains: Chains) -> None:
        self.wanted, self.chains, self.samples = list(wanted), chains, chains.samples
        self.calls, self.keys = _behind(wanted), [node.key for node in wanted]
        leaves = [leaf for call in self.calls for leaf in call.leaves]
        self.outer = {leaf.number: leaf for leaf in leaves if isinstance(leaf, _Outer)}
        self._nodes = {n.key: n for n in (*leaves, *wanted) if isinstance(n, CallNode)}
        self.modules = list(dict.fromkeys(m for call in self.calls for m in call.modules))
        self.place = tuple([call.key for call in self.calls if call.modules])

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The tensors that go in, all on one device, one of them with a row for each sample.

        Raises:
            CannotKeepError: that is not so.
        """
        inputs, n = [self.outer[number].now() for number in sorted(self.outer)], len(self.samples)
        if not any(t.ndim and len(t) == n for t in inputs):
            raise CannotKeepError(f"no tensor with a row for each of {n} samples goes in")
        if len(devices := {str(t.device) for t in inputs}) > 1:
            raise CannotKeepError(f"what goes in is on {' and '.join(sorted(devices))}")
        return inputs

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @cached_property
    def digests(self) -> Fetched:
        """For each sample one number for the bits of all that goes in."""
        n = len(self.samples)
        total = torch.zeros(n, dtype=torch.int64, device=self.device)
        for tensor in self.inputs:
            rows = tensor if tensor.ndim and len(tensor) == n else tensor.reshape(1, -1)
            total = total * 3 + hash_rows(rows)
        return Fetched(total)

    def node(self, key: str) -> CallNode | None:
        """The node of this key, if it is on the way to those that are wanted, or one of them."""
        return self._nodes.get(key)

    def compute(
        self,
        keep: bool = False,
        rows: Sequence[int] = (),
        given: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """The values of the nodes.

        Args:
            keep: also keep all that is computed on the way, for who reads it later in this step.
            rows: which samples of the inputs to take, as many as there are; empty for all in order.
            given: values of nodes on the way that are known, by their keys.
        """
        given = given or {}
        needed = _behind(self.wanted, given)
        ends = {node.call for node in self.wanted}
        last = {n.call: call for call in needed for n in call.leaves if isinstance(n, CallNode)}
        made: dict[Call, list[Any]] = {}
        run = current_run()
        outer, run.keeper = run.keeper, None
        try:
            for call in needed:
                if call.outputs is None:
                    values = [self._value(leaf, made, rows, given) for leaf in call.leaves]
                    made[call] = call.make(values, self.chains)
                else:
                    made[call] = call.outputs
                if keep:
                    call.outputs = made[call]
                for done in [c for c in made if last.get(c) is call and c not in ends]:
                    del made[done]
            return [settle(made[node.call][node.i]) for node in self.wanted]
        finally:
            run.keeper = outer

    def _value(
        self, leaf: Any, made: dict[Call, list[Any]], rows: Sequence[int], given: dict[str, Tensor]
    ) -> Any:
        if not isinstance(leaf, Node):
            return leaf
        if isinstance(leaf, CallNode) and leaf.value is None:
            return given[leaf.key] if leaf.key in given else made[leaf.call][leaf.i]
        value, n = leaf.now(), len(rows)
        may_have_rows = value.ndim > 0 and n > 0 and len(value) % n == 0
        if not may_have_rows or (len(value) > n and isinstance(leaf, _Outer)):
            return value
        taken = take_rows(by_sample(value, n), row_numbers(rows, value.device))
        return taken if len(value) == n else taken.flatten(0, 1)


def _behind(wanted: Sequence[CallNode], given: dict[str, Tensor] | None = None) -> list[Call]:
    """The calls behind some nodes; not those behind values that are ``given`` or there."""
    found: set[Call] = set()
    queue = [node.call for node in wanted]
    while queue:
        call = queue.pop()
        if call in found:
            continue
        found.add(call)
        nodes = [leaf for leaf in call.leaves if isinstance(leaf, CallNode)]
        queue += [
            n.call for n in nodes if given is None or (n.value is None and n.key not in given)
        ]
    return sorted(found, key=lambda call: call.index)


def _flattened(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """Arguments in a row, and how they are nested: of most, how many have which name."""
    leaves = [*args, *kwargs.values()]
    if all(isinstance(leaf, _LEAVES) for leaf in leaves):
        return leaves, (len(args), *kwargs)
    return tree_flatten((args, kwargs))


def _unflattened(leaves: Sequence[Any], spec: Any) -> Any:
    if isinstance(spec, TreeSpec):
        return tree_unflatten(leaves, spec)
    n, *names = spec
    return leaves[:n], dict(zip(names, leaves[n:], strict=True))


def autocast_state() -> tuple[Any, ...]:
    return tuple(
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    )


def _is_put_off(value: Any) -> bool:
    return type(value) is Pending and isinstance(value.node, CallNode)


def _meta(value: Any) -> Any:
    if type(value) is Pending:
        node = value.node
        return node.shape, node.dtype, node.device
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _wrapped(value: Any) -> Any:
    known = isinstance(value, Tensor) and type(value) is not Pending
    return Pending.of(Given(value)) if known else value


def _is_static(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, type(None)))


def _may_wait(tensor: Tensor) -> bool:
    if type(tensor) is Pending:
        return True
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not (tensor.requires_grad or tensor.is_inference())


def _effects(inputs: Sequence[Tensor], modules: Sequence[nn.Module]) -> Any:
    """What a call must leave as it is: random numbers, its inputs, and what its modules hold."""
    held = [vars(m) for module in modules for m in module.modules()]
    tensors = [t for d in held for t in (*d["_parameters"].values(), *d["_buffers"].values())]
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        str(np.random.get_state()),
        [t._version for t in inputs],
        [(id(t), t._version) for t in tensors if t is not None],
        [(name, id(value)) for d in held for name, value in d.items() if name != "forward"],
    )


def _share_storage(values: Sequence[Any], inputs: Sequence[Tensor]) -> bool:
    there = [v for v in values if isinstance(v, Tensor) and type(v) is not Pending]
    places = [v.untyped_storage().data_ptr() for v in there]
    taken = {t.untyped_storage().data_ptr() for t in inputs}
    return len(set(places)) < len(places) or not taken.isdisjoint(places)
