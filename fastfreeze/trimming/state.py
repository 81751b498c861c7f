"""What running a model changes besides its output: noticed, undone, or kept from happening."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from fastfreeze.execution import restorer

_MISSING = object()
_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
_SCALARS = (bool, int, float, complex, str, bytes)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def record_stream(value: Any, stream: torch.cuda.Stream) -> None:
    """Keep the memory of tensors in ``value`` for what ``stream`` does with them."""
    for tensor in tensors_in(value):
        if tensor.is_cuda:  # others, such as a number on the CPU, have no streams
            tensor.record_stream(stream)


def requires_grad(value: Any) -> bool:
    """Whether a tensor in ``value`` requires grad."""
    return any(tensor.requires_grad for tensor in tensors_in(value))


def autocasts(values: Sequence[Any]) -> bool:
    """Whether autocast is on, on a device of a tensor among ``values``."""
    return any(torch.is_autocast_enabled(v.device.type) for v in values if isinstance(v, Tensor))


def fp32_precision(device: torch.device) -> tuple[str, str, str]:
    """In what torch computes convolutions, matrix products and recurrent layers of fp32.

    "tf32" or "bf16"; in fp32 where it is another word.
    """
    # One by one: asked for all at once, torch raises where they have been set one by one.
    backends, on_gpu = torch.backends, device.type == "cuda"
    library = backends.cudnn if on_gpu else backends.mkldnn
    products = (backends.cuda if on_gpu else backends.mkldnn).matmul
    return tuple(x.fp32_precision for x in (library.conv, products, library.rnn))


def call_in_eval(call: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``call(*args, **kwargs)`` while ``module`` and all in it are in eval mode.

    The flags change for this call only, so that a module shared with the trainable part, a call
    of ``train()`` and a thaw need no further care.
    """
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        return call(*args, **kwargs)
    finally:
        for m in training:
            m.training = True


def copied(value: Any) -> Any:
    """Nested containers with their tensors cloned and detached."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


def in_checkpoint(outermost: CodeType) -> bool:
    """Whether a call between here and the function of code ``outermost`` is checkpointed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not outermost:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


class Watch:
    """Notices entries of dictionaries that were added, removed or rebound."""

    def __init__(self, live: Sequence[dict[Any, Any]]) -> None:
        self._live = list(live)
        self._seen = [dict(d) for d in live]

    def changed(self) -> bool:
        try:
            return self._live != self._seen  # identical values are not compared further
        except (RuntimeError, TypeError, ValueError):  # two tensors or arrays have no single truth
            return True


class Held:
    """Parameters and buffers under the names by which modules hold them.

    Args:
        modules: whose own, and whose submodules', are meant.

    Attributes:
        modules: these and their submodules, each once.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list({m: None for module in modules for m in module.modules()})
        owners = [d for m in self.modules for d in (m._parameters, m._buffers)]
        self._places = [(d, name) for d in owners for name in d]

    def tensors(self) -> list[Tensor]:
        """What is there now."""
        found = [d.get(name) for d, name in self._places]
        return [t for t in found if t is not None]

    def states(self) -> list[tuple[int, int, int]] | None:
        """What changes when a tensor is written to or replaced; None for tensors without memory."""
        try:
            return [(id(t), t.data_ptr(), t._version) for t in self.tensors()]
        except RuntimeError:  # of torch.func's transforms, or fake
            return None


class HeldState:
    """What modules held at a moment, and their attributes and submodules.

    The tensors and their memory are kept: no others can get their ids and addresses.
    """

    def __init__(self, held: Held) -> None:
        self._held, self._states = held, held.states()
        tensors = [] if self._states is None else held.tensors()
        self._pinned = [alias for t in tensors for alias in (t, t.detach())]
        owners = [d for module in held.modules for d in (vars(module), module._modules)]
        self._attributes = Watch(owners)

    def lasts(self) -> bool:
        """Whether nothing has been written to or replaced since; False if that cannot be told."""
        same = self._states is not None and self._held.states() == self._states
        return same and not self._attributes.changed()


class AttributeReads:
    """The attributes that modules' Python reads while recorded, and their values then.

    A write into an attribute's value is noticed if the value is a list, dict or set.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        every_modules = set(dir(nn.Module())) - {"training", "forward"}

        def record(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if name not in every_modules:
                attributes = object.__getattribute__(module, "__dict__")
                seen = attributes.get(name, _MISSING)
                seen = copy.copy(seen) if type(seen) in (list, dict, set) else seen
                self._seen.setdefault((id(attributes), name), (attributes, seen))
            return value

        nn.Module.__getattribute__ = record  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del nn.Module.__getattribute__

    def changed(self) -> bool:
        try:
            return any(
                (now := attributes.get(name, _MISSING)) is not seen and now != seen
                for (_, name), (attributes, seen) in self._seen.items()
            )
        except (RuntimeError, TypeError, ValueError):  # two tensors or arrays have no single truth
            return True


class Snapshot:
    """A model's attributes, buffers and training flags, and the host's random number generators.

    Attributes that are lists or dicts are copied one level deep.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners = [(type(m).__name__, vars(m), dict(vars(m))) for m in model.modules()]
        self._containers = [
            (f"{owner}.{name}", value, copy.copy(value))
            for owner, d, _ in self._owners
            for name, value in d.items()
            if type(value) in (list, dict, OrderedDict)  # hooks are in the last
        ]
        self._buffers = [(b, b.detach().clone()) for b in model.buffers()]
        self._restorers = [
            restore
            for _, _, seen in self._owners
            for value in seen.values()
            if isinstance(value, _GENERATORS) and (restore := restorer(value))
        ]
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def changed(self) -> str:
        """What has changed, buffers' values aside; empty if nothing has."""
        if random.getstate() != self._python:
            return "draws from Python's random"
        if pickle.dumps(np.random.get_state()) != pickle.dumps(self._numpy):
            return "draws from numpy.random"
        for owner, d, seen in self._owners:
            for name in d.keys() | seen.keys():
                if name not in d or name not in seen or not _same(d[name], seen[name]):
                    return f"assigns {owner}.{name}"
        for name, value, seen in self._containers:
            if len(value) != len(seen) or any(map(_differ, _items(value), _items(seen))):
                return f"changes {name}"
        return ""

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        for _, d, seen in self._owners:
            d.clear()
            d.update(seen)
        for _, value, seen in self._containers:
            value.clear()
            value.extend(seen) if isinstance(value, list) else value.update(seen)
        for restore in self._restorers:
            restore()
        with torch.no_grad():
            for buffer, values in self._buffers:
                if not torch.equal(buffer, values):  # a write would invalidate saved tensors
                    buffer.copy_(values)


class Undo:
    """What it takes to call a model again: random number generators, and some buffers."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = [(b, b.clone()) for b in buffers]
        self._python, self._numpy, self._cpu = (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
        )
        asks = torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing()
        self._cuda = torch.cuda.get_rng_state_all() if asks else []

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        with torch.no_grad():
            for buffer, values in self._buffers:
                buffer.copy_(values)


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether one of some modules has hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(kind) for module in modules for kind in kinds)


@contextmanager
def unobserved() -> Iterator[None]:
    """Autograd on, whatever the mode outside; an activation checkpoint outside sees nothing."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        with suppress(RuntimeError):  # torch.func's transforms allow no such hooks, nor outside
            # A node that kept its own output itself would never be freed.
            hooks = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t)
            stack.enter_context(hooks)
        yield


@contextmanager
def preserved(model: nn.Module) -> Iterator[Snapshot]:
    """Undo, on leaving, what runs of the model do to it and to random number generators."""
    snapshot = Snapshot(model)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield snapshot
        finally:
            snapshot.restore()
            torch.clear_autocast_cache()  # casts made under no_grad have no gradient


def _items(value: list[Any] | dict[Any, Any]) -> list[Any]:
    return list(value.items()) if isinstance(value, dict) else value


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) != len(b) or any(map(_differ, a, b))
    return not _same(a, b)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _SCALARS) and a == b)
