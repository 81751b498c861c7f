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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from fastfreeze.cache.rows import row_numbers, take_rows
from fastfreeze.trimming.pending import Given, Node, Pending, current_run, settle

_STATIC = (
    *(bool, int, float, str, type(None), slice, type(...)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
_VIEWS = (
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk"),
    *("split", "contiguous", "expand", "select", "narrow", "swapaxes", "movedim", "view_as"),
    *("expand_as", "type_as", "to", "float", "__getitem__"),
)
_PURE = (
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
_IN_PLACE = {"relu_": "relu", "add_": "add", "__iadd__": "add", "mul_": "mul", "__imul__": "mul"}


def _functions(names: Iterable[str]) -> dict[Any, str]:
    owners = (torch, Tensor, F, torch._C._nn)
    return {getattr(o, name): name for o in owners for name in names if hasattr(o, name)}


_KNOWN = _functions([*_VIEWS, *_PURE])
_WRITING = {function: _IN_PLACE[name] for function, name in _functions(_IN_PLACE).items()}


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
    """

    metas: tuple[Any, ...]
    spec: TreeSpec


class Call:
    """A call that has been put off.

    Attributes:
        function: makes it.
        modules: that it runs.
        leaves: arguments: nodes, and values that are no tensors.
        key: what it is called, with what, and what went in there; the same in every process.
        ident: the place in the forward, and the call.
        outputs: while they are there.
        is_view: whether what it gives may be a view of what went in.
        taken: how many calls read what it gives.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        modules: Sequence[nn.Module],
        leaves: list[Any],
        spec: TreeSpec,
        key: str,
        index: int,
    ) -> None:
        self.function, self.modules, self.leaves, self.spec = function, modules, leaves, spec
        self.key, self.ident = key, (index, key)
        self.autocast = autocast_state()
        self.outputs: list[Any] | None = None
        self.is_view, self.taken = False, 0

    def make(self, values: list[Any]) -> None:
        """Make it, with the values of its arguments."""
        args, kwargs = tree_unflatten(values, self.spec)
        with ExitStack() as stack:
            if self.autocast != autocast_state():
                for device, (enabled, dtype) in zip(("cpu", "cuda"), self.autocast, strict=True):
                    stack.enter_context(torch.autocast(device, dtype, enabled))
            self.outputs = tree_flatten(self.function(*args, **kwargs))[0]


class CallNode(Node):
    """One of the values that a call gives."""

    __slots__ = ("call", "chains", "i")

    def __init__(self, call: Call, i: int, meta: tuple[Any, ...], chains: Chains) -> None:
        shape, dtype, device = meta
        super().__init__(shape, dtype, device, chains)
        self.call, self.i, self.chains = call, i, chains

    @property
    def key(self) -> str:
        return f"{self.call.key}.{self.i}"

    def compute(self) -> Tensor:
        return self.chains.read(self)


@dataclass
class Known:
    """What is known of a model's calls from earlier steps.

    Attributes:
        forms: of what calls gave, by what they are and what they are given; a number is how often
            they could not be put off.
        reads: what was read in the last step with inputs of a form; missing if that is not known.
        units: names of the modules whose calls were put off.
        holders: names of what holds one. It is not put off itself when it is frozen, too: what was
            kept is then carried on.
    """

    forms: dict[Any, Form | int] = field(default_factory=dict)
    keys: dict[Any, str] = field(default_factory=dict)
    reads: dict[Any, set[Any]] = field(default_factory=dict)
    units: set[str] = field(default_factory=set)
    holders: set[str] = field(default_factory=set)

    def put_off(self, name: str) -> None:
        """Note that a module's call was put off."""
        if name not in self.units:
            self.units.add(name)
            parts = name.split(".") if name else []
            self.holders.update(".".join(parts[:i]) for i in range(len(parts)))


class Chains:
    """The calls that are put off in one call of a model.

    Args:
        known: from earlier steps.
        form: of the model's inputs.
        num_samples: rows that they have.
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
        num_samples: int,
        names: dict[nn.Module, str],
        find: Callable[[Chain], list[Tensor] | None],
    ) -> None:
        self._known, self._find, self._names = known, find, names
        self._form, self._reads = form, known.reads.get(form)
        self._num_samples = num_samples
        self.waits = True
        self.given: set[int] = set()
        self._outer: dict[int, int] = {}  # tensors that came from outside, in order
        self._alive: list[Any] = []
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

    def call_module(self, module: nn.Module, function: Any, args: Any, kwargs: Any) -> Any:
        """Put off a call of a frozen module; NotImplemented if it must be made."""
        name = self._names[module]
        if torch.is_inference_mode_enabled() or _has_hooks_inside(module):
            return NotImplemented
        if name in self._known.holders:
            return NotImplemented
        result = self._put_off(("module", name), function, [module], args, kwargs)
        if result is not NotImplemented and not self._learned:
            self._known.put_off(name)
        return result

    def call_function(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Put off a function of pending values; NotImplemented if it must be called."""
        if torch.is_inference_mode_enabled():
            return NotImplemented
        name = _KNOWN.get(function)
        if function not in _WRITING and not _is_in_place(function, args, kwargs):
            if name is None:
                return NotImplemented
            return self._put_off(("function", name), function, [], args, kwargs)
        name = _WRITING.get(function, name)
        if name is None or not args or not _may_become(args[0]):
            return NotImplemented
        if function in _WRITING:
            function = getattr(torch, name)
        kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
        given = tuple(a for a in args if a is not True)
        result = self._put_off(("function", name), function, [], given, kwargs)
        if result is NotImplemented:
            return NotImplemented
        args[0].node = result.node if type(result) is Pending else Given(result)
        return args[0]

    def _put_off(
        self, what: tuple[str, str], function: Any, modules: Any, args: Any, kwargs: Any
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        signature: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if not _may_wait(leaf):
                    return NotImplemented
                signature.append((leaf.shape, leaf.dtype, leaf.device))
            elif isinstance(leaf, _STATIC):
                signature.append(repr(leaf))
            else:
                return NotImplemented
        given = (*what, str(spec), tuple(signature), autocast_state())
        form = self._known.forms.get(given, 0)
        if self._learned or not isinstance(form, Form):
            if form == _TRIALS:
                return NotImplemented
            return self._learn(given, function, modules, leaves, spec)
        nodes = [self._node(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = self._key(given, nodes)
        call = Call(function, modules, nodes, spec, key, self._index)
        call.is_view = what[0] == "function" and what[1] in _VIEWS
        self._index += 1
        for node in nodes:
            if isinstance(node, CallNode):
                node.call.taken += 1
        outputs = [self._output(call, i, meta, leaves) for i, meta in enumerate(form.metas)]
        return tree_unflatten(outputs, form.spec)

    def _output(self, call: Call, i: int, meta: Any, leaves: Sequence[Any]) -> Any:
        if isinstance(meta, Argument):
            return leaves[meta.number]
        if not isinstance(meta, tuple):
            return meta
        self._nodes.append(CallNode(call, i, meta, self))
        return Pending.of(self._nodes[-1])

    def _learn(
        self, given: Any, function: Any, modules: Any, leaves: list[Any], spec: TreeSpec
    ) -> Any:
        """Make a call that is new, and see what it gives and whether it may be put off.

        From here on nothing is put off in this step: the model may write to what it was given.
        """
        self._learned = True
        leaves = [settle(leaf) if _is_put_off(leaf) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
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

    def _node(self, tensor: Any) -> Node:
        if _is_put_off(tensor) and tensor.node.value is None:
            node: Node = tensor.node
            return node
        value = settle(tensor)
        if id(value) not in self._outer:
            self._outer[id(value)] = len(self._outer)
            self._alive.append(value)
        return _Outer(value, self._outer[id(value)], self)

    def _key(self, given: Any, nodes: Sequence[Any]) -> str:
        """What a call is, whatever the number of samples."""
        keys = tuple([node.key for node in nodes if isinstance(node, (CallNode, _Outer))])
        found = self._known.keys.get((given, keys))
        if found is None:
            *what, signature, autocast = given
            forms = [self._without_samples(form) for form in signature]
            text = repr((what, forms, autocast, keys)).encode()
            found = hashlib.blake2b(text, digest_size=16).hexdigest()
            self._known.keys[given, keys] = found
        return found

    def _without_samples(self, form: Any) -> Any:
        if not isinstance(form, tuple) or not form[0] or form[0][0] != self._num_samples:
            return form
        return ("n", *form[0][1:]), *form[1:]

    def read(self, node: CallNode) -> Tensor:
        """The value of a node that something reads; with it those that were read the last time."""
        self._read.add((node.call.ident, node.i))
        reads = self._reads
        if reads is None:
            chain = Chain([node])
            return chain.compute(keep=True)[0]
        wanted = [
            n
            for n in self._nodes
            if n is node
            or (
                (n.value is None and (n.call.ident, n.i) in reads)
                and self._has_rows(n) == self._has_rows(node)
            )
        ]
        self._read.update((n.call.ident, n.i) for n in wanted)
        chain = Chain(wanted)
        values = self._find(chain) if self._has_rows(node) else None
        if values is None:
            values = chain.compute()
        result = None
        for n, value in zip(wanted, values, strict=True):
            if n is node:
                result = value
            else:
                n.version, n.value = value._version, value
        assert result is not None
        return result

    def _has_rows(self, node: Node) -> bool:
        return bool(node.shape) and node.shape[0] == self._num_samples


class _Outer(Given):
    """A tensor that came from outside, the n-th of the call."""

    __slots__ = ("key", "number")

    def __init__(self, value: Tensor, number: int, chains: Chains) -> None:
        super().__init__(value, chains)
        self.number, self.key = number, f"<{number}>"


class Chain:
    """The calls behind some nodes, also those whose values are known.

    Attributes:
        wanted: the nodes.
        calls: in the order in which they were put off.
        outer: the tensors that go in, by their number.
    """

    def __init__(self, wanted: Sequence[CallNode]) -> None:
        self.wanted = list(wanted)
        self.outer: dict[int, _Outer] = {}
        found: dict[Call, None] = {}
        queue = [node.call for node in wanted]
        while queue:
            call = queue.pop()
            if call in found:
                continue
            found[call] = None
            for leaf in call.leaves:
                if isinstance(leaf, CallNode):
                    queue.append(leaf.call)
                elif isinstance(leaf, _Outer):
                    self.outer[leaf.number] = leaf
        self.calls = sorted(found, key=lambda call: call.ident[0])

    @property
    def modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(m for call in self.calls for m in call.modules))

    def node(self, key: str) -> CallNode | None:
        """The node of this key, if it is on the way to those that are wanted, or one of them."""
        for call in self.calls:
            for leaf in call.leaves:
                if isinstance(leaf, CallNode) and leaf.key == key:
                    return leaf
        return next((node for node in self.wanted if node.key == key), None)

    @property
    def place(self) -> tuple[str, ...]:
        """The calls of modules in it."""
        return tuple([call.key for call in self.calls if call.modules])

    def compute(
        self,
        keep: bool = False,
        rows: Sequence[int] = (),
        given: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """The values of the nodes.

        Args:
            keep: also keep all that is computed on the way, for who reads it later in this step.
            rows: which rows of the inputs to take, as many as there are; empty for all in order.
            given: values of nodes on the way that are known, by their keys.
        """
        made: dict[Call, list[Any]] = {}
        run = current_run()
        outer, run.keeper = run.keeper, None
        try:
            for call in self._needed(given or {}):
                if keep and call.outputs is not None:
                    made[call] = call.outputs
                    continue
                call.make([self._value(leaf, made, rows, given or {}) for leaf in call.leaves])
                assert call.outputs is not None
                made[call] = call.outputs
                if not keep:
                    call.outputs = None
            return [settle(made[node.call][node.i]) for node in self.wanted]
        finally:
            run.keeper = outer

    def _needed(self, given: dict[str, Tensor]) -> list[Call]:
        needed: set[Call] = set()
        queue = [node.call for node in self.wanted]
        while queue:
            call = queue.pop()
            if call in needed:
                continue
            needed.add(call)
            for leaf in call.leaves:
                if isinstance(leaf, CallNode) and leaf.value is None and leaf.key not in given:
                    queue.append(leaf.call)
        return [call for call in self.calls if call in needed]

    def _value(
        self, leaf: Any, made: dict[Call, list[Any]], rows: Sequence[int], given: dict[str, Tensor]
    ) -> Any:
        if not isinstance(leaf, Node):
            return leaf
        if isinstance(leaf, CallNode) and leaf.value is None:
            return given[leaf.key] if leaf.key in given else made[leaf.call][leaf.i]
        value = leaf.now()
        if rows and value.ndim and len(value) == len(rows):
            return take_rows(value, row_numbers(rows, value.device))
        return value


def autocast_state() -> tuple[Any, ...]:
    return tuple(
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    )


def _is_in_place(function: Any, args: Any, kwargs: Any) -> bool:
    if "inplace" in kwargs:
        return bool(kwargs["inplace"])
    return function in _MAY_BE_IN_PLACE and any(a is True for a in args[1:])


def _may_become(target: Any) -> bool:
    """Whether a pending value that is written to may simply be another one from now on."""
    if not _is_put_off(target) or target.node.value is not None:
        return False
    call = target.node.call
    return not (call.taken or call.is_view)


def _is_put_off(value: Any) -> bool:
    return type(value) is Pending and isinstance(value.node, CallNode)


def _meta(value: Any) -> Any:
    known = isinstance(value, Tensor)
    return (value.shape, value.dtype, value.device) if known else value


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


def _has_hooks_inside(module: nn.Module) -> bool:
    """Whether something in a module has hooks; those of its own are called as ever."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in module.modules()
        if m is not module
    )


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
