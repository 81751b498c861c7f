"""SGD plans whose tables live on the device: a step is one launch, and may be captured in a graph.

The device counts the steps and computes the next one's learning rates itself, so that a captured
step replays a schedule. Gradients' addresses are all that a step brings.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from array import array
from collections.abc import Hashable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastfreeze.ops._plans import (
    HYPERS,
    SCALAR_TYPES,
    Hypers,
    PlanSpec,
    PointerPlan,
    buffer_dtype,
    lrs_at,
    segment_table,
)
from fastfreeze.ops._rates import SegmentTable

# A row of the table of runs; SgdRun in csrc/cuda/fused_sgd.cuh.
_RUN = np.dtype(
    [
        ("param", "<i8"),
        ("buffer", "<i8"),
        ("tensor", "<i4"),
        ("index", "<i4"),
        ("group", "<i4"),
        ("size", "<i4"),
    ]
)


class DevicePlan(PointerPlan):
    """The tables that both device backends read.

    Attributes:
        run_elements: how many elements are updated together; a run never spans two tensors.
        runs: int64 [num_runs, 4], rows of ``_RUN``.
        hypers: float64 [num_groups, len(HYPERS)].
        states: float64 [num_groups, 2], learning rate and whether frozen, of the next step.
        started: uint8 [num_tensors, 1], whether a momentum buffer has had its first step.
        counters: int64 [2, 1], the next step, and how many blocks have finished this one.
    """

    on_device: ClassVar[bool] = True
    run_elements: ClassVar[int] = 2048
    table_from: ClassVar[int] = 0  # number of tensors above which gradients need a device table

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec)
        self.device = spec.params[0].device
        self.param_dtype = spec.params[0].dtype
        self.buffer_dtype = next(
            (b.dtype for b in spec.buffers if b is not None),
            buffer_dtype(spec.params[0], spec.momentum_dtype),
        )
        self.eta_min, self.scheduled = spec.eta_min, spec.scheduled
        self.runs = self._upload(_runs(spec, self.run_elements))
        segments, begin = segment_table(spec.segments)
        self.segments, self.segment_begin = segments.to(self.device), begin.to(self.device)
        groups, tensors = len(spec.segments), len(spec.params)
        self.tensor_groups = self._upload(np.array(spec.groups, np.int32).reshape(-1, 1))
        self.hypers = torch.zeros(groups, len(HYPERS), dtype=torch.float64, device=self.device)
        self.states = torch.zeros(groups, 2, dtype=torch.float64, device=self.device)
        self.started = self._upload(np.array(spec.first, np.uint8).reshape(-1, 1) ^ 1)
        self.counters = torch.zeros(2, 1, dtype=torch.int64, device=self.device)
        self.grad_table = torch.zeros(tensors, dtype=torch.int64, device=self.device)
        # A buffer that an overflow leaves without its first step is then zeros, not garbage.
        fresh = [b for b, f in zip(spec.buffers, spec.first, strict=True) if f and b is not None]
        if fresh:
            torch._foreach_zero_(fresh)
        self._rates = SegmentTable(spec.segments, spec.eta_min) if spec.scheduled else None
        self._hypers: Hypers | None = None  # as uploaded
        self._grads = array("q")  # as uploaded
        # The device's step, as far as the host knows.
        self._position: int | None = None if self.scheduled else 0
        self._unsure = False  # whether only the device knows who has started
        self._replays = False  # whether there is a graph that may step without the host
        self._captured: list[Tensor] = []  # host memory that graphs read
        self._spare = self._pinned()

    @staticmethod
    def key(param: Tensor, buffer_dtype: torch.dtype) -> Hashable:
        return param.device, param.dtype, buffer_dtype

    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: Hypers,
        step: int,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> list[float]:
        self._set_hypers(hypers)
        if step != self._position:
            self.seek(step)
        if self._spare is None:
            self._spare = self._pinned()
        self._run(grads, grad_scale, found_inf, track=self._unsure or bool(self._unstarted))
        if found_inf is None and not self._unsure:
            self._started_now()
        else:
            self._unsure = self._unsure or bool(self._unstarted)
        self._position = step + 1
        return lrs_at(self._rates, hypers, step + 1)

    def capture(
        self,
        grads: Sequence[Tensor | None],
        hypers: Hypers,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> None:
        """Record a step in the graph that is being captured; each replay takes the next step.

        Raises:
            RuntimeError: a table would have to change, which needs a step outside the capture.
        """
        if self._hypers is None or not np.array_equal(self._hypers, hypers):
            raise RuntimeError(
                "hyperparameters have changed since the last step: take a step before capturing one"
            )
        self._run(grads, grad_scale, found_inf, track=True)
        self._replays = self._unsure = True

    def unstarted(self) -> set[int]:
        if self._unsure:
            started = self.started.flatten().tolist()
            self._unstarted = {
                i for i, b in enumerate(self.buffers) if b is not None and not started[i]
            }
            self._unsure = self._replays
        return self._unstarted

    def position(self) -> int:
        """The device's step: how many it has taken, replays included. Waits for the device."""
        self._position = int(self.counters[0].item())
        return self._position

    def seek(self, step: int) -> None:
        """Go to a step of the schedule."""
        self._seek(step)
        self._position = step

    @abstractmethod
    def _seek(self, step: int) -> None: ...

    @abstractmethod
    def _launch(
        self,
        grads: array[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        track: bool,
    ) -> None: ...

    def _run(
        self,
        grads: Sequence[Tensor | None],
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
        track: bool,
    ) -> None:
        grad_addresses = self._gathered()
        if len(grad_addresses) > self.table_from:
            self._set_grads(grad_addresses)
        self._launch(grad_addresses, self._scalar(grad_scale), self._scalar(found_inf), track)
        self._note_step()

    def _set_hypers(self, hypers: Hypers) -> None:
        if self._hypers is not None and self._hypers.tobytes() == hypers.tobytes():
            return
        self._hypers = hypers.copy()
        self.hypers.copy_(torch.from_numpy(self._hypers), non_blocking=True)
        if self.scheduled:
            self._position = None  # the device's rates were computed from the old ones

    def _set_grads(self, grads: array[int]) -> None:
        """Write the table of gradients' addresses; a captured graph writes it at each replay."""
        host = torch.frombuffer(grads, dtype=torch.int64)
        if self._capturing():
            if self._spare is None:
                raise RuntimeError("take a step between two captures of this optimizer's step")
            host, self._spare = self._spare.copy_(host), None
            self._captured.append(host)
        elif grads == self._grads and not self._captured:
            return
        self.grad_table.copy_(host, non_blocking=True)
        self._grads = grads

    def _scalar(self, value: Tensor | float | None) -> Tensor | None:
        if value is None or isinstance(value, Tensor):
            return None if value is None else value.to(self.device, torch.float32)
        return torch.full((), value, dtype=torch.float32, device=self.device)

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _pinned(self) -> Tensor | None:
        """Memory for the addresses that a graph will read; there is no way to get it in one."""
        if len(self.params) <= self.table_from or self.device.type != "cuda":
            return None
        return torch.empty(len(self.params), dtype=torch.int64, device="cpu", pin_memory=True)

    def _upload(self, table: np.ndarray) -> Tensor:
        return torch.from_numpy(table).to(self.device)


class CudaPlan(DevicePlan):
    """One launch of csrc/cuda/fused_sgd.cuh."""

    table_from: ClassVar[int] = 480  # kSgdArguments

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec)
        self._handle = self._make()

    def _make(self) -> int:
        handle: int = torch.ops.fastfreeze.cuda_sgd_plan.default(
            self.runs,
            self.hypers,
            self.states,
            self.segments,
            self.segment_begin,
            self.tensor_groups,
            self.started,
            self.counters,
            self.eta_min,
            self.scheduled,
            SCALAR_TYPES[self.param_dtype],
            SCALAR_TYPES[self.buffer_dtype],
        )
        weakref.finalize(self, torch.ops.fastfreeze.cuda_sgd_plan_free, handle)
        return handle

    def _seek(self, step: int) -> None:
        torch.ops.fastfreeze.cuda_sgd_seek.default(self._handle, step)

    def _launch(
        self,
        grads: array[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        track: bool,
    ) -> None:
        torch.ops.fastfreeze.cuda_sgd_step.default(
            self._handle,
            grads.buffer_info()[0],
            self.grad_table.data_ptr() if len(grads) > self.table_from else 0,
            0 if found_inf is None else found_inf.data_ptr(),
            0 if grad_scale is None else grad_scale.data_ptr(),
            track,
        )


class TritonPlan(DevicePlan):
    """One launch of the kernel in fastfreeze/ops/_triton_sgd.py."""

    def _seek(self, step: int) -> None:
        from fastfreeze.ops import _triton_sgd

        _triton_sgd.seek(self, step)

    def _launch(
        self,
        grads: array[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        track: bool,
    ) -> None:
        from fastfreeze.ops import _triton_sgd

        _triton_sgd.step(self, grad_scale, found_inf, track)


def _runs(spec: PlanSpec, run_elements: int) -> np.ndarray:
    """The table of runs: int64 [num_runs, 4]."""
    sizes = np.array([p.numel() for p in spec.params], np.int64)
    counts = -(-sizes // run_elements)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    index = np.arange(len(tensor)) - first
    table = np.zeros(len(tensor), _RUN)
    table["tensor"], table["index"] = tensor, index
    table["group"] = np.array(spec.groups, np.int64)[tensor]
    table["size"] = np.minimum(run_elements, sizes[tensor] - index * run_elements)
    for name, tensors in (("param", spec.params), ("buffer", spec.buffers)):
        base = np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64)[tensor]
        item = np.array([0 if t is None else t.element_size() for t in tensors], np.int64)[tensor]
        table[name] = base + index * run_elements * item
    return table.view(np.int64).reshape(-1, 4)
