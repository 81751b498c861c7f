"""The cuda backend's plans on the CPU: their tables as they are, their kernels emulated."""

from __future__ import annotations

import torch

from fastfreeze.kernels import library
from fastfreeze.kernels.choice import PLANS
from fastfreeze.kernels.device_plan import CudaLaunch
from tests.kernels.emulation import Addresses, build, dtype_code


class EmulatedLaunch(CudaLaunch):
    """A plan whose launches go to the harness."""

    sanitizer: str | None = None
    seed = 0
    multiprocessors = 0

    def _make(self):
        self.program = build("step_harness.cpp", self.sanitizer)

    def _multiprocessors(self):
        return self.multiprocessors

    def _launch(self, grad_scale, found_inf, track):
        addresses = torch.tensor(list(self._addresses), dtype=torch.int64)
        runs, pointees = self.runs, []
        if self.sanitizer is not None:  # another process: addresses must be translated
            addresses = Addresses(addresses)
            runs = Addresses(runs, columns=tuple(range(1 + len(self.moments))))
            owned = [self.grads, self.params, *self.moments.values()]
            pointees = [t for tensors in owned for t in tensors if t is not None]
        buffers = [runs, self.hypers, self.segments, self.segment_begin, self.tensor_groups]
        buffers += [self.progress, self.counters, addresses, found_inf, grad_scale, *pointees]
        scalars = [self.run_elements, float(self.eta_min), float(self.warmup_steps)]
        scalars += [
            dtype_code(self.param_dtype),
            self.state_dtype != self.param_dtype,
            track,
            len(self.params) <= self.table_from,
        ]
        type(self).seed += 1
        self.program.run(f"{self.rule.name}_step", buffers, scalars, self.seed)

    def align(self, params, grads, given):
        self.grads = super().align(params, grads, given)
        return self.grads


def install(monkeypatch, sanitizer=None, multiprocessors=0):
    """Until the test's end, backend="cuda" takes tensors of the CPU, emulated.

    Skips where there is no compiler. multiprocessors: each has room for 16 runs.
    """
    build("step_harness.cpp", sanitizer)
    options = {"sanitizer": sanitizer, "multiprocessors": multiprocessors}
    refuses = library.refuses_device
    available = {**library.backends(), "cuda": library.Availability(True, "emulated")}
    monkeypatch.setitem(PLANS, "cuda", type("Emulated", (EmulatedLaunch,), options))
    monkeypatch.setattr(library, "_BACKENDS", available)
    monkeypatch.setattr(
        library, "refuses_device", lambda b, d: None if b == "cuda" else refuses(b, d)
    )
