"""The cuda backend's SGD plan on the CPU: its tables as they are, its kernels emulated."""

from __future__ import annotations

import torch

from fastfreeze.ops import _library
from fastfreeze.ops import sgd as sgd_ops
from fastfreeze.ops._device_sgd import CudaPlan
from tests.emulation import Addresses, build, dtype_code


class EmulatedPlan(CudaPlan):
    """A CudaPlan whose launches go to the harness."""

    sanitizer: str | None = None
    seed = 0
    multiprocessors = 0

    def _make(self):
        self.program = build("sgd_harness.cpp", self.sanitizer)
        return 0

    def _multiprocessors(self):
        return self.multiprocessors

    def _run_harness(self, function, extra_buffers, scalars):
        type(self).seed += 1
        buffers = [self.runs, self.hypers, self.segments, self.segment_begin]
        buffers += [self.tensor_groups, self.started, self.counters, *extra_buffers]
        if self.sanitizer is not None:  # another process: addresses must be translated
            buffers[0] = Addresses(self.runs, columns=(0, 1))
            buffers += [*self.params, *(b for b in self.buffers if b is not None)]
        warmup_steps = float(self.warmup_steps)
        scalars = [self.run_elements, float(self.eta_min), warmup_steps, *scalars]
        self.program.run(function, buffers, scalars, self.seed)

    def _launch(self, grads, grad_scale, found_inf, track):
        addresses = torch.tensor(list(grads), dtype=torch.int64)
        pointees = []
        if self.sanitizer is not None:
            pointees = [g for g in self.grads if g is not None]
            addresses = Addresses(addresses)
        wide = self.buffer_dtype != self.param_dtype
        in_arguments = len(grads) <= self.table_from
        self._run_harness(
            "sgd_step",
            [addresses, found_inf, grad_scale, *pointees],
            [dtype_code(self.param_dtype), wide, track, in_arguments],
        )

    def align(self, params, grads, given):
        self.grads = super().align(params, grads, given)
        return self.grads


def install(monkeypatch, sanitizer=None, multiprocessors=0):
    """Until the test's end, backend="cuda" takes tensors of the CPU and runs emulated; its plan.

    Args:
        multiprocessors: of the device, each with room for 16 runs.
    """
    build("sgd_harness.cpp", sanitizer)  # or skip
    facts = {"sanitizer": sanitizer, "multiprocessors": multiprocessors}
    plan = type("EmulatedPlan", (EmulatedPlan,), facts)
    refuses = _library.refuses_device
    emulated = {**_library.backends(), "cuda": _library.Availability(True, "emulated")}
    monkeypatch.setitem(sgd_ops.PLANS, "cuda", plan)
    monkeypatch.setattr(_library, "_BACKENDS", emulated)
    monkeypatch.setattr(
        _library, "refuses_device", lambda b, d: None if b == "cuda" else refuses(b, d)
    )
    return plan
