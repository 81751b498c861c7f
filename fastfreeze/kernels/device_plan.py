"""Plans whose tables live on the device: a step is one launch, and may be captured in a graph.

The device counts the steps and computes their learning rates where it uses them, so that a captured
step replays a schedule. Gradients' addresses are all that a step brings.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Hashable, Sequence
from itertools import chain, pairwise
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfreeze.kernels.library import is_capturing
from fastfreeze.kernels.placements import Handle
from fastfreeze.kernels.plans import (
    SCALAR_TYPES,
    Hypers,
    PlanSpec,
    PointerPlan,
    dtype_of_state,
    lrs_at,
    rates_of,
    segment_table,
)
from fastfreeze.schedule import Segment

_RUN_ELEMENTS = (512, 1024, 2048)
_WARPS = 16  # of the CUDA kernel on a multiprocessor, at least


class DevicePlan(PointerPlan):
    """The tables that both device backends read, and what the host knows of them.

    Attributes:
        run_elements: how many elements are updated together; a run never spans two tensors.
        runs: int64 [num_runs, number of moments + 3], rows of ``runs_dtype``.
        hypers: float64 [num_groups, number of the rule's columns].
        segments: float64 [num_segments, 3], start, length and scale, of one group after the other.
        segment_begin: int64 [num_groups + 1, 1], where each group's segments begin.
        tensor_groups: int32 [num_tensors, 1].
        progress: [num_tensors, 1], 0 where the moments have had no first step: float32, the
            state's own counts, for a rule that counts, else uint8.
        counters: int64 [2, 1], the next step, and how many blocks have read the tables for it.
        grad_table: int64 [num_tensors], addresses of gradients, where a launch cannot bring them.
    """

    on_device: ClassVar[bool] = True
    table_from: ClassVar[int] = 0  # number of tensors above which gradients need a device table

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec)
        moments = list(spec.moments.values())
        self.device = spec.params[0].device
        self.param_dtype = spec.params[0].dtype
        self.state_dtype = next(
            (t.dtype for t in chain(*moments) if t is not None),
            dtype_of_state(spec.params[0], spec.state_dtype),
        )
        self.eta_min, self.warmup_steps = spec.eta_min, spec.warmup_steps
        self._kept = [t is not None for t in moments[0]]
        sizes = np.array([p.numel() for p in spec.params], np.int64)
        self.run_elements = self._run_elements(sizes)
        segments, begin = segment_table(spec.segments)
        (
            self.runs,
            self.hypers,
            self.segments,
            self.segment_begin,
            self.tensor_groups,
            self.counters,
            self.grad_table,
            *copied,
        ) = _copied_to(
            self.device,
            _runs(spec, moments, sizes, self.run_elements),
            np.zeros((len(spec.segments), len(self.rule.hypers))),
            segments.numpy(),
            begin.numpy(),
            np.array(spec.groups, np.int32).reshape(-1, 1),
            np.zeros((2, 1), np.int64),
            np.zeros(len(sizes), np.int64),
            *([np.array(spec.first, np.uint8).reshape(-1, 1) ^ 1] if spec.steps is None else []),
        )
        self.progress = copied[0] if spec.steps is None else spec.steps.view(-1, 1)
        # An overflow may keep them from their first step: they are zeros then, not garbage.
        fresh = [t for of in moments for i in self._unstarted if (t := of[i]) is not None]
        if fresh:
            torch._foreach_zero_(fresh)
        self._rates = rates_of(spec)
        self._hypers: Hypers | None = None  # as uploaded
        self._grads = array("q")  # as uploaded
        self._position = 0  # the device's step, as far as the host knows
        self._last_thaw = max((_last_thaw(spec.segments[g]) for g in set(spec.groups)), default=0)
        self._unsure = False  # whether only the device knows who has started
        self._replays = False  # whether there is a graph that may change that without the host
        self._captured: list[Tensor] = []  # host memory that graphs read
        self._spare = self._pinned()
        self._streams = {self._stream()}  # that the tables' memory is kept for

    def _run_elements(self, sizes: npt.NDArray[np.int64]) -> int:
        return _RUN_ELEMENTS[-1]

    @staticmethod
    def key(param: Tensor, state_dtype: torch.dtype) -> Hashable:
        return param.device, param.dtype, state_dtype

    def step(
        self,
        grads: Sequence[Tensor],
        hypers: Hypers,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        if not self._has(hypers):
            self._hypers = hypers.copy()
            self.hypers.copy_(self._staged(torch.from_numpy(self._hypers)), non_blocking=True)
        if step != self._position:
            self.counters[0].fill_(step)
        if self._spare is None:
            self._spare = self._pinned()
        self._run(grad_scale, found_inf, track=self._may_start())
        if found_inf is None and not self._unsure:
            self._unstarted.difference_update(self._given.index)
        else:
            self._unsure = self._unsure or bool(self._unstarted)
        self._position = step + 1
        return lrs_at(self._rates, hypers, step + 1)

    def capture(
        self,
        grads: Sequence[Tensor],
        hypers: Hypers,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> None:
        """Record a step in the graph that is being captured; each replay takes the next step.

        Raises:
            RuntimeError: a table would have to change, which needs a step outside the capture.
        """
        if not self._has(hypers):
            raise RuntimeError(
                "hyperparameters have changed since the last step: take a step before capturing one"
            )
        # A layer that freezes and thaws by itself has its state start anew.
        track = self._may_start() or self._position < self._last_thaw
        self._run(grad_scale, found_inf, track)
        self._replays = self._replays or track
        self._unsure = self._unsure or track

    def unstarted(self) -> set[int]:
        if self._unsure:
            progress = self.progress.flatten().tolist()
            asked = range(len(progress)) if self._replays else self._unstarted
            self._unstarted = {i for i in asked if self._kept[i] and not progress[i]}
            self._unsure = self._replays
        return self._unstarted

    def position(self) -> int:
        """The device's step: how many it has taken, replays included. Waits for the device."""
        self._position = int(self.counters[0].item())
        return self._position

    def _may_start(self) -> bool:
        return self._unsure or bool(self._unstarted)

    @abstractmethod
    def _launch(self, grad_scale: Tensor | None, found_inf: Tensor | None, track: bool) -> None: ...

    def _run(
        self, grad_scale: Tensor | float | None, found_inf: Tensor | None, track: bool
    ) -> None:
        if len(self.params) > self.table_from:
            self._set_grads(self._addresses)
        self._keep_for(self._stream())
        grad_scale, found_inf = self._scalar(grad_scale), self._scalar(found_inf)
        self._launch(grad_scale, found_inf, track or self.rule.counts)
        torch.autograd.graph.increment_version(self._updated)

    def _has(self, hypers: Hypers) -> bool:
        """Whether these are on the device."""
        return self._hypers is not None and self._hypers.tobytes() == hypers.tobytes()

    def _set_grads(self, grads: array[int]) -> None:
        """Write the table of gradients' addresses; a captured graph writes it at each replay."""
        host = torch.frombuffer(grads, dtype=torch.int64)
        if is_capturing(self.device):
            if self._spare is None:
                raise RuntimeError("take a step between two captures of this optimizer's step")
            host, self._spare = self._spare.copy_(host), None
            self._captured.append(host)
        elif grads == self._grads and not self._captured:
            return
        else:
            host = self._staged(host)
        self.grad_table.copy_(host, non_blocking=True)
        self._grads = grads

    def _scalar(self, value: Tensor | float | None) -> Tensor | None:
        if value is None or isinstance(value, Tensor):
            return None if value is None else value.to(self.device, torch.float32)
        return torch.full((), value, dtype=torch.float32, device=self.device)  # waits for nothing

    def _staged(self, host: Tensor) -> Tensor:
        """Where a copy to the device can read it later; torch keeps that memory until it has."""
        return host.pin_memory() if self.device.type == "cuda" else host

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _keep_for(self, stream: torch.cuda.Stream | None) -> None:
        """Let the tables' memory wait for this stream too, when they are given up."""
        if stream is None or stream in self._streams or is_capturing(self.device):
            return  # a graph's optimizer keeps its plans
        for table in (self.runs, self.progress):  # with all that lies in the same memory
            table.record_stream(stream)
        self._streams.add(stream)

    def _pinned(self) -> Tensor | None:
        """Memory for the addresses that a graph will read; a capture allows no pinning."""
        if len(self.params) <= self.table_from or self.device.type != "cuda":
            return None
        return torch.empty(len(self.params), dtype=torch.int64, device="cpu", pin_memory=True)


class CudaLaunch(DevicePlan):
    """One launch of csrc/cuda/step.cuh."""

    table_from: ClassVar[int] = 480  # kGradArguments

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec)
        self._make()

    def _run_elements(self, sizes: npt.NDArray[np.int64]) -> int:
        """The fewest with which all warps find room on the device at once, or the most."""
        room = self._multiprocessors() * _WARPS
        fit = (n for n in _RUN_ELEMENTS if (-(-sizes // n)).sum() <= room)
        return next(fit, _RUN_ELEMENTS[-1])

    def _multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def _make(self) -> None:
        self._step = getattr(torch.ops.fastfreeze, f"cuda_{self.rule.name}_step").default
        self._plan = Handle(
            f"cuda_{self.rule.name}_plan",
            self.runs,
            self.hypers,
            self.segments,
            self.segment_begin,
            self.tensor_groups,
            self.progress,
            self.counters,
            self.run_elements,
            self.eta_min,
            self.warmup_steps,
            SCALAR_TYPES[self.param_dtype],
            SCALAR_TYPES[self.state_dtype],
        )

    def _launch(self, grad_scale: Tensor | None, found_inf: Tensor | None, track: bool) -> None:
        self._step(
            self._plan.number,
            self._addresses.buffer_info()[0],
            self.grad_table.data_ptr() if len(self.params) > self.table_from else 0,
            0 if found_inf is None else found_inf.data_ptr(),
            0 if grad_scale is None else grad_scale.data_ptr(),
            track,
        )


class TritonLaunch(DevicePlan):
    """One launch of the kernel in fastfreeze/kernels/step_triton.py."""

    def _launch(self, grad_scale: Tensor | None, found_inf: Tensor | None, track: bool) -> None:
        from fastfreeze.kernels import step_triton

        step_triton.launch(self, grad_scale, found_inf, track)


def runs_dtype(num_moments: int) -> np.dtype:
    """A row of the table of runs; Run in csrc/cuda/step.cuh."""
    return np.dtype(
        [
            ("param", "<i8"),
            ("moments", "<i8", (num_moments,)),
            ("tensor", "<i4"),
            ("index", "<i4"),
            ("group", "<i4"),
            ("size", "<i4"),
        ]
    )


def _runs(
    spec: PlanSpec,
    moments: Sequence[list[Tensor | None]],
    sizes: npt.NDArray[np.int64],
    run_elements: int,
) -> np.ndarray:
    """The table of runs: int64 [num_runs, len(moments) + 3]."""
    counts = -(-sizes // run_elements)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    index = np.arange(len(tensor)) - first
    table = np.zeros(len(tensor), runs_dtype(len(moments)))
    table["tensor"], table["index"] = tensor, index
    table["group"] = np.array(spec.groups, np.int64)[tensor]
    table["size"] = np.minimum(run_elements, sizes[tensor] - index * run_elements)

    def addresses(tensors: Sequence[Tensor | None]) -> npt.NDArray[np.int64]:
        base = np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64)[tensor]
        item = np.array([0 if t is None else t.element_size() for t in tensors], np.int64)[tensor]
        found: npt.NDArray[np.int64] = base + index * run_elements * item
        return found

    table["param"] = addresses(spec.params)
    for i, tensors in enumerate(moments):
        table["moments"][:, i] = addresses(tensors)
    return table.view(np.int64).reshape(-1, len(moments) + 3)


def _copied_to(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """The arrays in one piece of the device's memory, by one copy that nobody waits for."""
    tables = list(map(torch.from_numpy, arrays))
    ends = np.cumsum([-(-t.nbytes // 16) * 16 for t in tables]).tolist()
    pinned = device.type == "cuda"
    host = torch.zeros(ends[-1], dtype=torch.uint8, device="cpu", pin_memory=pinned)

    def parts(memory: Tensor) -> list[Tensor]:
        return [
            memory[begin : begin + t.nbytes].view(t.dtype).view(t.shape)
            for begin, t in zip([0, *ends], tables, strict=False)
        ]

    for part, table in zip(parts(host), tables, strict=True):
        part.copy_(table)
    return parts(host.to(device, non_blocking=True))


def _last_thaw(segments: Sequence[Segment]) -> int:
    """The last step at which a group goes on to train; 0 if it never does."""
    thaws = [b.start for a, b in pairwise(segments) if a.frozen and not b.frozen]
    return max(thaws, default=0)
