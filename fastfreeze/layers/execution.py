"""What runs when: a model's modules and parameters in the order of one execution.

The order comes from a run on example inputs, or from the graph that torch.fx traces. Either gives
:class:`Event` s, from which :mod:`fastfreeze.layers.split` makes layers.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

_ATEN = torch.ops.aten
# What moves values, as views do, is no use of a parameter. What reads the result is.
_MOVES = {_ATEN.cat, _ATEN.clone, _ATEN.repeat, _ATEN.stack, _ATEN._to_copy}
_ADD_PRODUCTS = {_ATEN.addmm, _ATEN.baddbmm}  # to their first argument
_MOVE_NAMES = {
    *("cat", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "getitem"),
    *("permute", "repeat", "reshape", "squeeze", "stack", "t", "to", "transpose", "unsqueeze"),
    "view",
}


@dataclass
class Event:
    """A module started to run or was returned to, or one of its operations read a parameter.

    Attributes:
        module: the innermost module that was running.
        parameter: the parameter that was read, None where a module started.
        upstream: bits (:func:`parameter_bits`) of the parameters on which the operations up to the
            next event depend.
        forward_flops, backward_flops: of the operations up to the next event.
    """

    module: str
    parameter: str | None = None
    upstream: int = 0
    forward_flops: int = 0
    backward_flops: int = 0


def parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def parameter_bits(model: nn.Module) -> dict[str, int]:
    """A bit for each parameter."""
    return {name: 1 << k for k, name in enumerate(parameter_names(model).values())}


def gradient_bits(model: nn.Module) -> dict[str, int]:
    """The bits of those parameters that require a gradient, 0 for the others."""
    bits = parameter_bits(model)
    return {n: bits[n] if p.requires_grad else 0 for n, p in model.named_parameters()}


class _Uses:
    """Makes the events of one execution, and follows its values: tensors, or nodes of a graph."""

    def __init__(self, model: nn.Module, values: Callable[[], MutableMapping[Any, Any]]) -> None:
        self.events = [Event("")]
        self.upstream = values()  # bits of the parameters on which a value depends
        self.held = values()  # names of the parameters of which a value is a copy or a view
        self._bits = parameter_bits(model)

    def begin(self, value: Any, name: str) -> None:
        """A value is the parameter of this name."""
        self.upstream[value], self.held[value] = self._bits[name], [name]

    def operation(
        self, module: str, inputs: Sequence[Any], moves: bool, own: Sequence[str] = ()
    ) -> tuple[int, list[str]]:
        """Record what an operation in ``module`` reads: ``inputs``, and ``own`` parameters besides.

        Returns the bits of what its results depend on, and the parameters that they hold.
        """
        held = [value for value in inputs if value in self.held]
        names = dict.fromkeys([*(name for value in held for name in self.held[value]), *own])
        self.events += [Event(module, name) for name in names]
        bits = [*(self.upstream.get(_owner(v), 0) for v in inputs), *(self._bits[n] for n in own)]
        upstream = reduce(or_, bits, 0)
        self.events[-1].upstream |= upstream
        if moves and len(held) == len(inputs):
            return upstream, list(names)
        for value in held:
            if not isinstance(value, nn.Parameter):  # the first use gives the place
                self.held.pop(value, None)
        return upstream, []

    def give(self, value: Any, upstream: int, held: list[str]) -> None:
        """A value is the result of an operation."""
        self.upstream[_owner(value)] = upstream
        if held:
            self.held[value] = held


class _Nowhere:
    """Takes the place of a FLOP counter's hooks on all modules, which fail on some inputs."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _WritesUndone(TorchDispatchMode):
    """Undoes, when it ends, what operations within it have written to a model's parameters."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._in_memory: dict[int | None, list[torch.Tensor]] = {}
        for parameter in model.parameters():
            self._in_memory.setdefault(_memory(parameter), []).append(parameter)
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.keep(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for parameter, values in self._before:
            parameter.data.copy_(values)

    def keep(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep what the parameters hold that an operation is about to write to."""
        schema = getattr(func, "_schema", None)
        if schema is None or not schema.is_mutable:
            return
        given = [*args, *(kwargs.get(a.name) for a in schema.arguments[len(args) :])]
        for argument, value in zip(schema.arguments, given, strict=True):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in _tensors(value):
                found = self._in_memory.pop(_memory(tensor), [])
                self._before += [(p, p.detach().clone()) for p in found]


class _Recorder(_WritesUndone):
    """Records the events of one run, with the FLOPs that a counter finds."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__(model)
        self.uses = _Uses(model, WeakTensorKeyDictionary)
        self._counter = counter
        self._running = [""]
        self._trainable = sum(gradient_bits(model).values())
        for name, parameter in model.named_parameters():
            self.uses.begin(parameter, name)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within the context, the model's modules tell when they start and return."""

        def started(name: str, *_: Any) -> None:
            self._running.append(name)
            self.uses.events.append(Event(name))

        def returned(*_: Any) -> None:
            self._running.pop()
            self.uses.events.append(Event(self._running[-1]))

        with ExitStack() as hooks:
            for name, module in model.named_modules():
                before = module.register_forward_pre_hook(partial(started, name))
                after = module.register_forward_hook(returned, always_call=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = _tensors((args, kwargs))
        self.keep(func, args, kwargs or {})
        upstream, held = self.uses.operation(self._running[-1], tensors, _moves(func))
        factors = tensors[1:] if getattr(func, "overloadpacket", None) in _ADD_PRODUCTS else tensors
        known = (self.uses.upstream.get(_owner(t), 0) for t in factors if t.ndim >= 2)
        matrices = sum(bits & self._trainable != 0 for bits in known)
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        flops = self._counter.get_total_flops() - before
        self.uses.events[-1].forward_flops += flops
        self.uses.events[-1].backward_flops += flops * min(matrices, 2)
        for result in _tensors(out):
            self.uses.give(result, upstream, held)
        return out


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int | None:
    """What tensors that share memory have in common; None if it has no memory of one piece."""
    try:
        address: int = tensor.untyped_storage()._cdata
        return address
    except (NotImplementedError, RuntimeError):
        return None


def _owner(value: Any) -> Any:
    """The tensor whose memory a view shares; a value that is no view itself."""
    base = getattr(value, "_base", None)
    return value if base is None else base


def _moves(func: Any) -> bool:
    return bool(getattr(func, "is_view", False)) or getattr(func, "overloadpacket", None) in _MOVES


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, by position and by name."""
    if any(isinstance(leaf, np.ndarray) for leaf in tree_leaves(inputs)):
        raise TypeError("example_inputs must hold tensors, got a NumPy array: use torch.from_numpy")
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    raise TypeError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments, got {type(inputs).__name__}"
    )


def run_events(model: nn.Module, example_inputs: Any, training: bool = True) -> list[Event]:
    """The events of a run on the inputs."""
    args, keywords = _arguments(example_inputs)
    with ExitStack() as stack:
        stack.enter_context(_left_as_found(model, training))
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the model's own, which come again when it trains
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):  # fused, they are not counted
            mkldnn = torch.backends.mkldnn
            stack.enter_context(mkldnn.flags(enabled=False, allow_tf32=mkldnn.allow_tf32))
            # cudnn.flags() raises where precisions were set one by one, cudnn.enabled = False where
            # torch's flags are frozen: this is what both call.
            stack.callback(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled())
            torch._C._set_cudnn_enabled(False)
        args, keywords = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), (args, keywords))
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
        recorder = _Recorder(model, stack.enter_context(counter))
        stack.enter_context(recorder.watching(model))
        stack.enter_context(recorder)
        try:
            model(*args, **keywords)
        except Exception as error:
            raise ValueError(
                f"model does not run on example_inputs in {'training' if training else 'eval'} "
                f"mode (single modules in eval mode): {type(error).__name__}: {error}"
            ) from error
    return recorder.uses.events


class Undo:
    """Brings random number generators, those of ``gpus`` too, and tensors back to this moment."""

    def __init__(self, tensors: Iterable[torch.Tensor], gpus: Iterable[int]) -> None:
        self._restorers: list[Callable[[], object]] = [
            partial(random.setstate, random.getstate()),
            partial(np.random.set_state, np.random.get_state()),
            partial(torch.set_rng_state, torch.get_rng_state()),
            *(partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(i), i) for i in gpus),
            *(partial(_write_back, tensor, tensor.detach().clone()) for tensor in tensors),
        ]

    def restore(self) -> None:
        for restore in self._restorers:
            restore()


@torch.no_grad()
def _write_back(tensor: torch.Tensor, values: torch.Tensor) -> None:
    with suppress(RuntimeError):  # not all tensors can be compared
        if torch.equal(tensor, values):  # a write would invalidate saved tensors
            return
    tensor.copy_(values)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Undo, on leaving, what runs of the model do to it and to random number generators.

    The model gets back its attributes, the contents of containers and generators among them, its
    buffers and its training flags.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    undo = Undo(model.buffers(), gpus)
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    held = [value for _, seen in attributes for value in seen.values()]
    restorers = [restore for value in held if (restore := _restorer(value))]
    try:
        yield
    finally:
        for own, seen in attributes:
            own.clear()
            own.update(seen)
        for restore in restorers:
            restore()
        undo.restore()
        torch.clear_autocast_cache()  # casts made under no_grad have no gradient


@contextmanager
def _left_as_found(model: nn.Module, training: bool) -> Iterator[None]:
    """A mode for one run, which leaves no trace.

    Only modules with submodules are in training mode: they decide what runs, while a norm in
    training mode would refuse a batch of one.
    """
    with preserved(model):
        for module in model.modules():
            own = vars(module)
            own["training"] = training and any(True for _ in module.children())
            for name, value in own.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    own[name] = value.clone()
        yield


def _restorer(value: Any) -> Callable[[], object] | None:
    """What gives an attribute its present contents again; None if it is of no known kind."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, list | deque | dict | set):
        return partial(_refill, value, copy.copy(value))
    return None


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    (container.update if isinstance(container, dict | set) else container.extend)(contents)


def graph_events(model: nn.Module, training: bool = True) -> list[Event]:
    """The events in the order of the model's graph, without FLOPs."""
    try:
        with _left_as_found(model, training), _WritesUndone(model):
            graph = fx.Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"the order of the model's layers needs example_inputs: torch.fx cannot trace "
            f"{type(model).__name__} ({type(error).__name__}: {error})"
        ) from error
    names, owned = parameter_names(model), dict(model.named_parameters(remove_duplicate=False))
    uses = _Uses(model, dict)
    written = 0
    for node in graph.nodes:
        target, module, own = str(node.target), _module_of(node), []
        if node.op == "get_attr" and target in owned:
            uses.begin(node, names[id(owned[target])])
            continue
        if node.op == "call_module":
            module = target
            own = [names[id(p)] for p in model.get_submodule(target).parameters()]
        if node.op == "call_module" or module != uses.events[-1].module:  # it was returned to
            uses.events.append(Event(module))
        inputs = node.all_input_nodes
        upstream, held = uses.operation(module, inputs, _moves_node(node), own)
        uses.give(node, upstream | written, held)
        uses.events[-1].upstream |= written
        if node.op in ("call_function", "call_method") and not node.users:
            written |= upstream  # in place, and any later node may read it
    return uses.events


def _moves_node(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _MOVE_NAMES


def _module_of(node: fx.Node) -> str:
    """Name of the innermost module whose forward made the node."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""
