"""A model as a graph of its operations, traced once for each kind of call.

``torch.fx`` records a model's forward without running it, and by default loses some of what it
cannot see. Here in-place operators and newly made tensors become nodes, and modules without child
modules are nodes too. A forward is refused if a graph cannot repeat what it does: change the grad
mode or autocast, apply a custom autograd function, draw from Python's random, assign an attribute.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import partialmethod
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute, Proxy
from torch.overrides import TorchFunctionMode

from fastfreeze.layers.execution import preserved
from fastfreeze.trimming.state import tensors_in

_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_PLACE = object()  # stands in the place of a tensor in the arguments of a call


class NoGraphError(Exception):
    """There is no graph, or no folded one; the message says why."""


@contextmanager
def refused() -> Iterator[None]:
    """Whatever the model raises, as a NoGraphError: the model itself will tell."""
    try:
        yield
    except NoGraphError:
        raise
    except Exception as error:  # of whatever kind
        reason = str(error).strip().split("\n")[0]
        raise NoGraphError(f"{type(error).__name__}: {reason}") from error


@dataclass(frozen=True)
class Call:
    """A call of a model.

    Attributes:
        arguments: positional and keyword arguments without the tensors.
        tensors: the tensors among them, in order.
        kind: what a graph depends on: the arguments; of each tensor whether it has no row, one or
            more, its other sizes, strides, dtype and device; the device and dtype of the model's
            first parameter, which forwards read; and what autocast does.
    """

    arguments: Any
    tensors: list[Tensor]
    kind: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call with these arguments.

        Raises:
            NoGraphError: an argument is of a type that a graph cannot hold.
        """
        tensors: list[Tensor] = []

        def visit(value: Any) -> Any:
            if isinstance(value, Tensor) and value.layout == torch.strided:
                tensors.append(value)
                return _PLACE
            if not isinstance(value, _CONSTANTS):
                raise NoGraphError(f"an argument of type {type(value).__name__}")
            return value

        arguments = map_aggregate((args, kwargs), visit)
        forms = tuple(
            (min([2, *t.shape[:1]]), t.shape[1:], t.stride(), t.dtype, t.device) for t in tensors
        )
        placement = tuple((p.device, p.dtype) for p in islice(model.parameters(), 1))
        return cls(arguments, tensors, (repr(arguments), forms, placement, _autocast_state()))


class Attributes:
    """The attributes of modules at a moment: hooks, submodules, and the contents of containers."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        own = [vars(m) for m in modules]
        containers = (list, dict, set, OrderedDict)
        self._live = [*own, *(v for d in own for v in d.values() if type(v) in containers)]
        self._seen = [copy.copy(v) for v in self._live]

    def changed(self) -> bool:
        try:
            return self._live != self._seen  # identical values are not compared further
        except (RuntimeError, TypeError, ValueError):  # two tensors or arrays have no single truth
            return True


def generator_states() -> tuple[Any, bytes, list[bytes]]:
    """The states of Python's random, numpy.random, and torch's generators."""
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    own = [state.numpy().tobytes() for state in (torch.get_rng_state(), *of_gpus)]
    return random.getstate(), pickle.dumps(np.random.get_state()), own


def trace(model: nn.Module, call: Call) -> fx.Graph:
    """The graph of a model's call: placeholders for the call's tensors, other targets by name.

    Raises:
        NoGraphError: a graph cannot repeat what the model does.
    """
    attributes, (*draws, _) = Attributes(model.modules()), generator_states()
    with preserved(model), torch.enable_grad(), _custom_functions_refused():
        tracer = _Tracer(model, call.arguments)
        with refused(), _Factories(tracer):
            graph = tracer.trace(model)
        if attributes.changed():
            raise NoGraphError("forward changes attributes of the model")
        if list(generator_states()[:2]) != draws:
            raise NoGraphError("forward draws from Python's random or numpy.random")
    return graph


class _Value(Proxy):
    """A proxy that records writes, while fx's own turns ``x += y`` into ``x = x + y``."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise NoGraphError(f"forward assigns attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)


class _Attribute(_Value, Attribute):
    """An attribute of a recorded value."""


def _recorded(value: _Value, name: str, *args: Any) -> Any:
    return value.tracer.create_proxy("call_method", name, (value, *args), {})


for _name in (
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__"),
    *("__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
    "__setitem__",
):
    setattr(_Value, _name, partialmethod(_recorded, _name))


class _Tracer(fx.Tracer):
    """fx's tracer without its silent losses."""

    def __init__(self, model: nn.Module, arguments: Any) -> None:
        super().__init__()
        self._arguments = arguments
        self._state = _ambient_state()
        self._names: dict[int, str] = {}
        for prefix, module in model.named_modules():
            owned = {**vars(module), **module._buffers, **module._parameters}
            for name, value in owned.items():
                if isinstance(value, Tensor):
                    self._names.setdefault(id(value), f"{prefix}.{name}".lstrip("."))

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        numbers = count(1)

        def place(value: Any) -> Any:
            if value is not _PLACE:
                return value
            return self.create_proxy("placeholder", f"input_{next(numbers)}", (), {})

        args, kwargs = map_aggregate(self._arguments, place)
        return lambda root: root.forward(*args, **kwargs), [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not m._modules:  # its own Python may then do as it likes
            return True
        of_torch = type(m).__module__.startswith(("torch.nn", "torch.ao.nn"))
        return of_torch and not isinstance(m, nn.Sequential)

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
            raise NoGraphError("forward changes grad mode or autocast")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> Proxy:
        return _Value(node, self)

    def _recorded_dict(self, value: Any) -> fx.Node:
        given: tuple[Any, Any] = (list(value.items()),), {}
        if is_dataclass(value):
            given = (), {f.name: getattr(value, f.name) for f in fields(value)}
        return self.create_proxy("call_function", type(value), *given).node

    def _name_of(self, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            raise NoGraphError("forward uses a tensor that is not the model's own")
        return self._names[id(tensor)]


class _Factories(TorchFunctionMode):
    """Records functions that make a tensor of no recorded value: fx would keep it as a constant."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name.endswith("_") and not name.endswith("__") and any(tensors_in((args, kwargs))):
            raise NoGraphError(f"forward applies {name} to a tensor of the model")
        result = func(*args, **kwargs)
        if name == "__get__" or not any(True for _ in tensors_in(result)):
            return result
        return self._tracer.create_proxy("call_function", func, args, kwargs)


def _ambient_state() -> tuple[Any, ...]:
    """What a ``with`` block in a forward may change, unseen by a graph."""
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return (*modes, *_autocast_state())


def _autocast_state() -> tuple[Any, ...]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)


@contextmanager
def _custom_functions_refused() -> Iterator[None]:
    """Refuse custom autograd functions: fx would keep their forward, and drop their backward."""
    original = vars(torch.autograd.Function)["apply"]

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise NoGraphError(f"forward applies the autograd function {cls.__name__}")

    torch.autograd.Function.apply = classmethod(refuse)
    try:
        yield
    finally:
        torch.autograd.Function.apply = original
