"""What running a model changes besides its output: noticed, undone, or kept from happening."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import function
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from fastfreeze.execution import restorer

_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


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


def fp32_precision(device: torch.device) -> tuple[str, str, str]:
    """In what torch computes convolutions, matrix products and recurrent layers of fp32.

    "tf32" or "bf16"; in fp32 where it is another word.
    """
    # One by one: asked for all at once, torch raises where they have been set one by one.
    backends, on_gpu = torch.backends, device.type == "cuda"
    library = backends.cudnn if on_gpu else backends.mkldnn
    products = (backends.cuda if on_gpu else backends.mkldnn).matmul
    return tuple(x.fp32_precision for x in (library.conv, products, library.rnn))


def copied(value: Any) -> Any:
    """Nested containers with their tensors cloned and detached."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


def in_checkpoint(outermost: CodeType) -> bool:
    """Whether a call between here and the function of code ``outermost`` is checkpointed."""
    return _is_inside((checkpoint.__file__,), outermost)


def is_run_again(outermost: CodeType) -> bool:
    """Whether it is, or in a custom autograd function, which may be a checkpoint of its own."""
    return _is_inside((checkpoint.__file__, function.__file__), outermost)


def _is_inside(files: Sequence[str], outermost: CodeType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not outermost:
        if frame.f_code.co_filename in files:
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


class Snapshot:
    """A model's attributes, buffers and training flags, and the host's random number generators.

    Attributes that are lists or dicts are copied one level deep.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners = [(type(m).__name__, vars(m), dict(vars(m))) for m in model.modules()]
        self.containers = [
            (f"{owner}.{name}", value, copy.copy(value))
            for owner, d, _ in self.owners
            for name, value in d.items()
            if type(value) in (list, dict, OrderedDict)  # hooks are in the last
        ]
        self._buffers = [(b, b.detach().clone()) for b in model.buffers()]
        self._restorers = [
            restore
            for _, _, seen in self.owners
            for value in seen.values()
            if isinstance(value, _GENERATORS) and (restore := restorer(value))
        ]
        self.python, self.numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        for _, d, seen in self.owners:
            d.clear()
            d.update(seen)
        for _, value, seen in self.containers:
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
        self._cuda = torch.cuda.get_rng_state() if asks else None

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        with torch.no_grad():
            for buffer, values in self._buffers:
                buffer.copy_(values)


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether one of some modules has hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(kind) for module in modules for kind in kinds)


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
