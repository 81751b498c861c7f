"""What runs when: a model's modules and parameters in the order of one execution.

The order comes from a run on example inputs, or from the graph that torch.fx traces. Either gives
:class:`Event` s, from which :mod:`fastfreeze.layers.split` makes layers.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
# Besides views: what only moves a parameter's values is no use of it, and what reads the result is.
_MOVES = {_ATEN.cat, _ATEN.clone, _ATEN.repeat, _ATEN.stack, _ATEN._to_copy}
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


class _Nowhere:
    """For a FLOP counter, in the place of hooks on all modules, which fail on some inputs."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Recorder(TorchDispatchMode):
    """Records the events of one run, and follows which parameters each tensor depends on."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events = [Event("")]
        self._counter = counter
        self._running = [""]
        self._names = parameter_names(model)
        self._trainable = sum(gradient_bits(model).values())
        self._upstream = WeakTensorKeyDictionary()
        self._moved = WeakTensorKeyDictionary()  # results of moves, to the parameters in them
        self._model = model
        self._written: dict[str, torch.Tensor] = {}  # what parameters held before
        bits = parameter_bits(model)
        for name, parameter in model.named_parameters():
            self._upstream[parameter] = bits[name]

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within the context, the model's modules tell when they start and return."""

        def returned(*_: Any) -> None:
            self._running.pop()
            self.events.append(Event(self._running[-1]))

        with ExitStack() as hooks:
            for name, module in model.named_modules():

                def started(*_: Any, name: str = name) -> None:
                    self._running.append(name)
                    self.events.append(Event(name))

                before = module.register_forward_pre_hook(started)
                hooks.callback(before.remove)
                after = module.register_forward_hook(returned, always_call=True)
                hooks.callback(after.remove)
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = _tensors((args, kwargs))
        self._keep(func, args, kwargs or {})
        moved = self._read(func, tensors)
        upstream = matrices = 0
        for tensor in tensors:
            bits = self._upstream.get(_owner(tensor), 0)
            upstream |= bits
            matrices += bits & self._trainable != 0 and tensor.ndim >= 2
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        flops = self._counter.get_total_flops() - before
        event = self.events[-1]
        event.upstream |= upstream
        event.forward_flops += flops
        event.backward_flops += flops * min(matrices, 2)
        for result in _tensors(out):
            owner = _owner(result)
            self._upstream[owner] = self._upstream.get(owner, 0) | upstream
            if moved:
                self._moved[result] = moved
        return out

    def restore(self) -> None:
        """Undo what was written to parameters."""
        for name, value in self._written.items():
            self._model.get_parameter(name).data.copy_(value)

    def _keep(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before an operation: what the parameters hold that it writes to."""
        schema = getattr(func, "_schema", None)
        if schema is None or not schema.is_mutable:
            return
        given = [*args, *(kwargs.get(a.name) for a in schema.arguments[len(args) :])]
        for argument, value in zip(schema.arguments, given, strict=True):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in _tensors(value):
                owner = self._names.get(id(_owner(tensor)))
                for name in self._moved.get(tensor, ()) if owner is None else (owner,):
                    if name not in self._written:
                        self._written[name] = self._model.get_parameter(name).detach().clone()

    def _read(self, func: Any, tensors: list[torch.Tensor]) -> list[str]:
        """Record what an operation reads; the parameters that it moves and does no more."""
        carried = [tensor for tensor in tensors if tensor in self._moved]
        names = [name for tensor in carried for name in self._moved[tensor]]
        own = [self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names]
        moves = len(carried) + len(own) == len(tensors) and _moves(func)
        for name in dict.fromkeys(own if moves else names + own):
            self.events.append(Event(self._running[-1], name))
        if moves:
            return names + own
        for tensor in carried:  # the first use gives the place
            self._moved.pop(tensor, None)
        return []


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]


def _owner(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that a view is of: what is written to the one is read in the other."""
    return tensor if tensor._base is None else tensor._base


def _moves(func: Any) -> bool:
    return bool(getattr(func, "is_view", False)) or getattr(func, "overloadpacket", None) in _MOVES


def arguments(name: str, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, of the argument ``name`` that says so."""
    if any(isinstance(leaf, np.ndarray) for leaf in tree_leaves(inputs)):
        raise TypeError(f"{name} must hold tensors, got a NumPy array: use torch.from_numpy")
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    raise TypeError(
        f"{name} must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments, got {type(inputs).__name__}"
    )


def run_events(model: nn.Module, example_inputs: Any, training: bool = True) -> list[Event]:
    """The events of a run on the inputs."""
    args, keywords = arguments("example_inputs", example_inputs)
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
        stack.callback(recorder.restore)
        stack.enter_context(recorder.watching(model))
        stack.enter_context(recorder)
        try:
            model(*args, **keywords)
        except Exception as error:
            raise ValueError(
                f"model does not run on example_inputs in {'training' if training else 'eval'} "
                f"mode (single modules in eval mode): {type(error).__name__}: {error}"
            ) from error
    return recorder.events


class Undo:
    """What it takes to call a model again: random number generators, and some tensors.

    Args:
        tensors: which.
        gpus: whose generators.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], gpus: Iterable[int]) -> None:
        self._tensors = [(t, t.detach().clone()) for t in tensors]
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self._torch = torch.get_rng_state()
        self._gpus = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}

    def restore(self) -> None:
        """Have all as it was."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self._torch)
        for gpu, state in self._gpus.items():
            torch.cuda.set_rng_state(state, gpu)
        with torch.no_grad():
            for tensor, values in self._tensors:
                if not _is_equal(tensor, values):  # a write would invalidate saved tensors
                    tensor.copy_(values)


class Snapshot(Undo):
    """A model's attributes, buffers and training flags as well.

    Attributes that are containers or generators are restored, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners = [(type(m).__name__, vars(m), dict(vars(m))) for m in model.modules()]
        held = [(f"{o}.{n}", v) for o, _, seen in self.owners for n, v in seen.items()]
        self.containers = [
            (name, value, copy.copy(value))
            for name, value in held
            if type(value) in (list, dict, OrderedDict)  # hooks are in the last
        ]
        self._restorers = [restore for _, value in held if (restore := restorer(value))]
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        super().__init__(model.buffers(), gpus)

    def restore(self) -> None:
        for _, own, seen in self.owners:
            own.clear()
            own.update(seen)
        for restore in self._restorers:
            restore()
        super().restore()


@contextmanager
def preserved(model: nn.Module) -> Iterator[Snapshot]:
    """Undo, on leaving, what runs of the model do to it and to random number generators."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    finally:
        snapshot.restore()
        torch.clear_autocast_cache()  # casts made under no_grad have no gradient


@contextmanager
def _left_as_found(model: nn.Module, training: bool) -> Iterator[None]:
    """A mode without its traces: afterwards modules, buffers and generators are as before.

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


def _is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except RuntimeError:  # not for such tensors
        return False


def restorer(value: Any) -> Callable[[], object] | None:
    """What gives a module's attribute its present contents again; None where that is known of none.

    Hooks, parameters and submodules are in such attributes, too.
    """
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
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
        with _left_as_found(model, training):
            graph = fx.Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"the order of the model's layers needs example_inputs: torch.fx cannot trace "
            f"{type(model).__name__} ({type(error).__name__}: {error})"
        ) from error
    names, bits = parameter_names(model), parameter_bits(model)
    events = [Event("")]
    upstream: dict[fx.Node, int] = {}
    written = 0
    owned = dict(model.named_parameters(remove_duplicate=False))
    attributes: dict[fx.Node, list[str]] = {}
    moved: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        target, module, inputs = str(node.target), _module_of(node), node.all_input_nodes
        read = [name for n in inputs for name in moved.get(n) or attributes.get(n, [])]
        if node.op == "get_attr" and target in owned:
            attributes[node] = [names[id(owned[target])]]
        elif node.op == "call_module":
            module = target
            events.append(Event(module))
            read += [names[id(p)] for p in model.get_submodule(target).parameters()]
        elif _moves_node(node) and all(n in moved or n in attributes for n in inputs):
            moved[node] = read
        if node not in moved:  # the first use gives the place
            moved |= {n: [] for n in inputs if n in moved}
        upstream[node] = reduce(or_, (upstream[n] for n in inputs), written)
        upstream[node] |= reduce(or_, (bits[name] for name in read), 0)
        if node.op in ("call_function", "call_method") and not node.users:
            written = upstream[node]  # in place, and any later node may read it
        if module != events[-1].module:  # it was returned to
            events.append(Event(module))
        events += [Event(module, name) for name in dict.fromkeys(read)]
        events[-1].upstream |= upstream[node]
    return events


def _moves_node(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _MOVE_NAMES


def _module_of(node: fx.Node) -> str:
    """Name of the innermost module whose forward made the node."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""
