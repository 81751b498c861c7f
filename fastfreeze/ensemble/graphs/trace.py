"""The model as a graph of its operations, traced once per way of calling it.

``torch.fx`` records a model's forward without running it and, by default, loses some of what it
cannot see. Here in-place operators and freshly made tensors become nodes, modules without child
modules are not looked into, and a forward with an effect that a graph cannot repeat (a change of
grad mode or autocast, a custom autograd function, Python's randomness, an assigned attribute) is
refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute, Proxy
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from fastfreeze.ensemble.graphs.held import AttributeReads, changed
from fastfreeze.layers.execution import preserved
from fastfreeze.trimming.state import is_run_again, tensors_in

_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class UntraceableError(Exception):
    """The model cannot be had as a graph; the message says why."""


class _Tensor(Enum):
    TENSOR = "the place of a tensor"


TENSOR = _Tensor.TENSOR


@dataclass(frozen=True)
class CallPattern:
    """How a model is called: what a trace depends on.

    Attributes:
        arguments: positional and keyword arguments, ``TENSOR`` in the place of each tensor.
        types: types of the other values, since ``1 == True == 1.0``.
        placement: device and dtype of the model's first parameter, which forwards read, and what
            autocast does, which a block in a forward may change to what it was when traced.
    """

    arguments: Any
    types: tuple[type, ...]
    placement: tuple[Any, ...]

    @classmethod
    def of(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[CallPattern, list[Tensor]]:
        """The pattern of a call, and the call's tensors in order.

        Raises:
            UntraceableError: an argument is of a type that a graph cannot hold.
        """
        tensors: list[Tensor] = []
        types: list[type] = []

        def visit(value: Any) -> Any:
            if isinstance(value, Tensor):
                tensors.append(value)
                return TENSOR
            if not isinstance(value, _CONSTANTS):
                raise UntraceableError(f"an argument of type {type(value).__name__}")
            types.append(type(value))
            return value

        arguments = map_aggregate((args, kwargs), visit)
        first = next(model.parameters(), None)
        placement = () if first is None else (first.device, first.dtype)
        pattern = cls(arguments, tuple(types), (*placement, *_autocast_state()))
        try:
            hash(pattern)
        except TypeError as error:
            raise UntraceableError(f"an argument that has no hash: {error}") from error
        return pattern, tensors


@dataclass(frozen=True)
class Trace:
    """A model's graph and what it was baked from.

    Attributes:
        graph: one placeholder per tensor of the call; other targets are names in the model.
    """

    graph: fx.Graph
    _reads: AttributeReads

    def stale(self) -> bool:
        """Whether an attribute that a forward read, such as ``training``, has another value."""
        return self._reads.changed()


def trace(model: nn.Module, pattern: CallPattern) -> Trace:
    """Trace ``model`` as called by ``pattern``, in its present training mode.

    Raises:
        UntraceableError: a graph cannot repeat what the model does.
    """
    with preserved(model) as before, torch.enable_grad(), _custom_functions_refused():
        tracer, reads = _Tracer(model, pattern), AttributeReads()
        try:
            with _Factories(tracer), reads.recorded():
                graph = tracer.trace(model)
        except UntraceableError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise UntraceableError(f"{type(error).__name__}: {reason}") from error
        if effect := changed(before):
            raise UntraceableError(f"forward {effect}")
    return Trace(graph, reads)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module below the model is one node, called as it is."""
    if not module._modules:  # its own Python may then do as it likes
        return True
    of_torch = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
    return of_torch and not isinstance(module, nn.Sequential)


def hooked(modules: Iterable[nn.Module]) -> str:
    """The type of the first module with hooks, which a graph would not call; else empty."""
    if _has_any_global_hook():
        return "every module"
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return type(m).__name__
    return ""


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    operation = getattr(operator, name)

    def apply(a: Any, b: Any) -> Any:
        return operation(a, b)

    apply.__name__ = apply.__qualname__ = name
    return apply


_IN_PLACE = {
    f"__{name}__": _in_place(name)
    for name in (
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
}
IN_PLACE_FUNCTIONS = frozenset([*_IN_PLACE.values(), operator.setitem])


class _Value(Proxy):
    """A proxy that records writes; fx's own turns ``x += y`` into ``x = x + y``."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise UntraceableError(f"forward assigns attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Attribute(_Value, Attribute):
    """An attribute of a recorded value."""


def _record_in_place(name: str, function: Callable[[Any, Any], Any]) -> None:
    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_Value, name, method)


for _name, _function in _IN_PLACE.items():
    _record_in_place(_name, _function)


class _Tracer(fx.Tracer):
    """fx's tracer, less its silent losses."""

    def __init__(self, model: nn.Module, pattern: CallPattern) -> None:
        super().__init__()
        self._pattern = pattern
        self._state = _ambient_state()
        self._names: dict[int, str] = {}
        for prefix, module in model.named_modules():
            owned = {**vars(module), **module._buffers, **module._parameters}
            for name, value in owned.items():
                if isinstance(value, Tensor):
                    self._names.setdefault(id(value), f"{prefix}.{name}".lstrip("."))

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        count = 0

        def place(value: Any) -> Any:
            nonlocal count
            if value is not TENSOR:
                return value
            count += 1
            return self.create_proxy("placeholder", f"input_{count}", (), {})

        args, kwargs = map_aggregate(self._pattern.arguments, place)
        return lambda root: root.forward(*args, **kwargs), [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if not isinstance(attr_val, Tensor):
            return attr_val
        name = self._name_of(attr_val)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.create_node("get_attr", self._name_of(a), (), {})
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):  # fx makes it a dict
            return self._recorded_dict(a)
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient_state() != self._state:
            raise UntraceableError("forward changes grad mode or autocast")
        if is_run_again(trace.__code__):
            raise UntraceableError("forward uses activation checkpointing")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> Proxy:
        return _Value(node, self)

    def _recorded_dict(self, value: Any) -> fx.Node:
        if is_dataclass(value):
            given = {f.name: getattr(value, f.name) for f in fields(value)}
            return self.create_proxy("call_function", type(value), (), given).node
        return self.create_proxy("call_function", type(value), (list(value.items()),), {}).node

    def _name_of(self, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            raise UntraceableError("forward uses a tensor that is not the model's own")
        return self._names[id(tensor)]


class _Factories(TorchFunctionMode):
    """Records what makes tensors out of no recorded value, which fx would keep as constants."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name.endswith("_") and not name.endswith("__") and any(tensors_in((args, kwargs))):
            raise UntraceableError(f"forward applies {name} to a tensor of the model")
        result = func(*args, **kwargs)
        if name == "__get__" or not any(True for _ in tensors_in(result)):
            return result
        return self._tracer.create_proxy("call_function", func, args, kwargs)


def _ambient_state() -> tuple[Any, ...]:
    """What a ``with`` block in a forward may change and a graph does not see."""
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return (*modes, *_autocast_state())


def _autocast_state() -> tuple[Any, ...]:
    devices = ("cpu", torch.accelerator.current_accelerator(check_available=True))
    return tuple(
        (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
        for d in (d.type if isinstance(d, torch.device) else d for d in devices if d)
    )


@contextmanager
def _custom_functions_refused() -> Iterator[None]:
    """fx would trace through a custom function's forward and drop its backward."""
    original = vars(torch.autograd.Function)["apply"]

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise UntraceableError(f"forward applies the autograd function {cls.__name__}")

    torch.autograd.Function.apply = classmethod(refuse)
    try:
        yield
    finally:
        torch.autograd.Function.apply = original
