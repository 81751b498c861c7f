"""Other ways to run members than one after the other, and a short measurement of which is best."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map_only

from fastfreeze.clock import Clock
from fastfreeze.ensemble._checks import logits_of
from fastfreeze.ensemble.members import (
    CannotCopyError,
    MembersState,
    copy_of,
    difference,
    held_again,
    owners_of,
)
from fastfreeze.text import format_table
from fastfreeze.trimming.state import record_stream, tensors_in

Way = Literal["loop", "graph", "vmap", "compiled", "streams", "cuda_graph"]
WAYS: tuple[Way, ...] = get_args(Way)
_WARM_UPS = 3  # calls before a capture, in which libraries choose kernels and make workspaces


def checked_way(how: Way | None) -> Way | None:
    if how is not None and how not in WAYS:
        raise ValueError(f"how must be None or one of {', '.join(WAYS)}, got {how!r}")
    return how


class Stacked:
    """All members in one batched call of one of them, by ``torch.func.vmap``.

    Pays where a call is short beside its overhead: batches of few samples. Holds copies of the
    members' tensors, of those that are equal in all one.

    Raises:
        ValueError: members have hooks, differ in more than parameters and buffers, or have no copy.
    """

    def __init__(self, members: nn.ModuleList) -> None:
        self._members_state = MembersState(members)
        if name := self._members_state.hooked:
            raise ValueError(f"how='vmap' cannot run: {name} has hooks")
        if what := difference(list(members)):
            raise ValueError(f"how='vmap' cannot run: {what}")
        again, own = held_again(members[0]), chain(members[0].parameters(), members[0].buffers())
        if names := [again[id(t)] for t in own if id(t) in again]:
            raise ValueError(f"how='vmap' cannot run: {names[0]} holds a parameter or buffer again")
        try:
            self._skeleton = copy_of(members[0])  # also what all members have in common
        except CannotCopyError as error:
            raise ValueError(f"how='vmap' cannot run: {error}") from error
        held = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in members]
        owners = owners_of(list(members))
        with torch.no_grad():
            self._state = {
                name: torch.stack([tensors[name] for tensors in held])
                for name in held[0]
                if any(owners[name])
            }
        self._numbers = torch.arange(len(members))  # batched where nothing else is
        self._lock = threading.Lock()  # a call puts tensors into the skeleton

    def fits(self, members: nn.ModuleList) -> bool:
        """Whether the members are still those that it was made of."""
        return self._members_state.lasts(members)

    def __call__(self, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        """The members' logits [M, ...]."""

        def call(state: dict[str, Tensor], _: Tensor) -> Tensor:
            output = functional_call(self._skeleton, state, inputs, keywords)
            logits: Tensor = logits_of(output)
            return logits

        with self._lock:
            stacked: Tensor = vmap(call, randomness="different")(self._state, self._numbers)
        return stacked


def on_streams(
    members: Sequence[nn.Module], inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> list[Any]:
    """The members' outputs, each computed in a CUDA stream of its own, beside the others.

    Raises:
        ValueError: a tensor of the call is not on a CUDA device.
    """
    device = _cuda_device("streams", list(tensors_in((inputs, keywords))))
    now = torch.cuda.current_stream(device)
    calls = [tree_map_only(Tensor, torch.clone, (inputs, keywords)) for _ in members]
    streams = [torch.cuda.Stream(device) for _ in members]  # of torch's pool
    outputs = []
    with _no_autocast_cache():  # else one stream would read the weights that another casts
        for member, stream, (args, kwargs) in zip(members, streams, calls, strict=True):
            stream.wait_stream(now)
            record_stream((args, kwargs), stream)
            with torch.cuda.stream(stream):
                outputs.append(member(*args, **kwargs))
    for stream in streams:
        now.wait_stream(stream)
    record_stream(outputs, now)
    return outputs


class Captured:
    """A module's call as a CUDA graph, for tensors of the example's shapes and strides.

    Raises:
        ValueError: a tensor is not on a CUDA device.
        RuntimeError: the call cannot be captured, as torch says it.
    """

    def __init__(self, module: nn.Module, example: Sequence[Tensor]) -> None:
        device = _cuda_device("cuda_graph", example)
        self._lock = threading.Lock()  # all calls use one graph's memory
        self._inputs = [t.detach().clone() for t in example]
        self._graph = torch.cuda.CUDAGraph()
        beside, now = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        # Of a cache of casts, the graph would keep addresses that are given back.
        with torch.cuda.device(device), torch.no_grad(), _no_autocast_cache():
            beside.wait_stream(now)
            with torch.cuda.stream(beside):
                for _ in range(_WARM_UPS):
                    module(*self._inputs)
            now.wait_stream(beside)
            # Other threads, such as a loader's that pins memory, go on meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output: Tensor = module(*self._inputs)
        self._module = module  # whose weights the graph reads
        self._device = device
        self._done = now.record_event()  # of the latest call, in whatever stream

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        now = torch.cuda.current_stream(self._device)
        with self._lock, torch.no_grad():
            now.wait_event(self._done)
            for own, tensor in zip(self._inputs, tensors, strict=True):
                own.copy_(tensor)
            self._graph.replay()
            output = self._output.clone()
            self._done = now.record_event()
        return output


def _cuda_device(how: Way, tensors: Sequence[Tensor]) -> torch.device:
    devices = {t.device for t in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(
            f"how={how!r} cannot run: it needs tensors on one CUDA device, got {found}"
        )
    return devices.pop()


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@dataclass(frozen=True)
class Measured:
    """How long a call takes in each way.

    Attributes:
        how: the fastest.
        seconds: of a call, the median, by way.
        unavailable: why the others cannot run, by way.
    """

    how: Way
    seconds: Mapping[Way, float]
    unavailable: Mapping[Way, str]

    def __str__(self) -> str:
        rows = [(way, f"{1e3 * s:.3g} ms", "") for way, s in self.seconds.items()]
        rows += [(way, "-", reason) for way, reason in self.unavailable.items()]
        return format_table(("way", "a call", "why not"), rows)


def measure(
    call: Callable[[Way], Any], ways: Sequence[Way], device: torch.device, seconds: float
) -> Measured:
    """Time ``call`` in each way, in turns, after a first call of each that does not count.

    Raises:
        ValueError: no way can run; the message says why.
    """
    unavailable: dict[Way, str] = {}
    for way in ways:
        try:
            call(way)
        except Exception as error:  # of whatever kind: the table tells
            unavailable[way] = f"{type(error).__name__}: {error}".split("\n")[0]
    left = [way for way in ways if way not in unavailable]
    if not left:
        raise ValueError(f"no way can run: {unavailable}")
    clock, times = Clock(device), {way: list[float]() for way in left}
    end = time.perf_counter() + seconds
    while len(times[left[-1]]) < 3 or time.perf_counter() < end:
        for way in left:
            start = clock.now()
            call(way)
            times[way].append(clock.seconds(start, clock.now()))
    medians = {way: statistics.median(found) for way, found in times.items()}
    return Measured(min(medians, key=medians.__getitem__), medians, unavailable)
