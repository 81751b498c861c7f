"""Other ways to run members than one after the other, and a short measurement of which is best."""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fastfreeze.clock import Clock
from fastfreeze.ensemble._members import MembersState, difference
from fastfreeze.text import format_table

Way = Literal["loop", "graph", "vmap", "compiled"]
WAYS: tuple[Way, ...] = get_args(Way)


def checked_way(how: Way | None) -> Way | None:
    if how is not None and how not in WAYS:
        raise ValueError(f"how must be None or one of {', '.join(WAYS)}, got {how!r}")
    return how


class Stacked:
    """All members in one batched call of one of them, by ``torch.func.vmap``.

    Pays where a call is short beside its overhead: batches of few samples. Holds copies of the
    members' tensors.

    Raises:
        ValueError: members have hooks, or differ in more than parameters and buffers.
    """

    def __init__(self, members: nn.ModuleList) -> None:
        self._members_state = MembersState(members)
        if name := self._members_state.hooked:
            raise ValueError(f"how='vmap' cannot run: {name} has hooks")
        if what := difference(list(members)):
            raise ValueError(f"how='vmap' cannot run: {what}")
        with torch.no_grad():
            self._state = stack_module_state(list(members))
        self._skeleton = copy.deepcopy(members[0])
        self._lock = threading.Lock()  # a call puts tensors into the skeleton

    def fits(self, members: nn.ModuleList) -> bool:
        """Whether the members are still those that it was made of."""
        return self._members_state.lasts(members)

    def __call__(self, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        """The members' outputs [M, ...]."""

        def call(state: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
            output: Tensor = functional_call(self._skeleton, state, inputs, keywords)
            return output

        with self._lock:
            stacked: Tensor = vmap(call, randomness="different")(self._state)
        return stacked


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
