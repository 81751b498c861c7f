"""The frozen prefix of the next batch, run during the backward of the present one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.trim.state import HeldState, record_stream
from fastfreeze.graph.call import Call
from fastfreeze.graph.prefix import Prefix, Values, autocasts

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Begun:
    """A prefix that has been started, and what it was started from."""

    prefix: Prefix
    state: HeldState
    circumstances: Any
    inputs: list[Tensor]
    values: Values
    done: torch.cuda.Event | None


class Ahead:
    """Runs what follows a call's forward as soon as that is queued.

    On a GPU in a stream of its own, beside the backward; on the CPU in turn.

    Attributes:
        following: the arguments of the next call, or None.
    """

    def __init__(self) -> None:
        self.following: Arguments | None = None
        self._begun: _Begun | None = None
        self._stream: torch.cuda.Stream | None = None

    def run(self, call: Call, begin: Callable[[Any, Any], Call]) -> Any:
        """The call's output; ``begin`` gives the next call."""
        output = self._run(call)
        if self.following is not None and torch.is_grad_enabled():
            following, self.following = begin(*self.following), None
            self._begun = self._start(following)
        return output

    def _run(self, call: Call) -> Any:
        begun, self._begun = self._begun, None
        if begun is None or begun.prefix is not call.prefix or not begun.state.lasts():
            return call.run()
        if begun.circumstances != _circumstances(call):
            return call.run()
        if any(a is not b for a, b in zip(begun.inputs, call.inputs, strict=True)):
            warnings.warn(
                "the network is not called with the tensors that were announced, so that nothing "
                "can run ahead: batches must be on the network's device already",
                FastfreezeWarning,
                stacklevel=6,
            )
            return call.run()
        if begun.done is not None:
            stream = torch.cuda.current_stream(begun.inputs[0].device)
            stream.wait_event(begun.done)
            record_stream(begun.values, stream)
        return call.finish(begun.values)

    def _start(self, call: Call) -> _Begun | None:
        if call.prefix is None or not call.inputs:
            return None
        device = call.inputs[0].device
        if device.type != "cuda":
            values, done = call.prefix.run(call.tensors), None
        else:
            values, done = self._run_beside(call.prefix, call.tensors, device)
        state, circumstances = call.prefix.state(), _circumstances(call)
        return _Begun(call.prefix, state, circumstances, call.inputs, values, done)

    def _run_beside(
        self, prefix: Prefix, tensors: list[Tensor], device: torch.device
    ) -> tuple[Values, torch.cuda.Event]:
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            values = prefix.run(tensors)
            record_stream(tensors, self._stream)
            return values, self._stream.record_event()


def _circumstances(call: Call) -> Any:
    """What the values depend on besides the prefix: what is in the inputs, and autocast."""
    versions = [None if t.is_inference() else t._version for t in call.inputs]
    return versions, autocasts(call.inputs)
