"""Compiles what the Triton launchers launch, for GPUs that need not be there.

``python -m tests.kernels.triton_matrix sm_90 gfx942`` prints as JSON what became of each launch.
To be run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from fastfreeze.kernels import softmax_triton, step_triton
from fastfreeze.kernels.adam_device import AdamTritonPlan
from fastfreeze.kernels.adam_plans import ADAM_HYPERS
from fastfreeze.kernels.placements import Given
from fastfreeze.kernels.plans import PlanSpec
from fastfreeze.kernels.sgd_device import SgdTritonPlan
from fastfreeze.kernels.sgd_plans import SGD_HYPERS
from fastfreeze.schedule import Cosine
from tests.kernels import compiled
from tests.kernels.adam_plans import spec_of

PTX_ACCESS = re.compile(r"\b((?:ld|st)\.(?:global|local)[\w.:]*)")
AMD_ACCESS = re.compile(r"\b((?:global|flat|scratch|buffer)_(?:load|store)_\w+)")
AMD_LOCAL = re.compile(
    r"\.(?:vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s+(\d+)"
)


class Recorder:
    """Stands in for a device's driver: what is launched is compiled for the target, and kept."""

    def __init__(self) -> None:
        self.targets: list[GPUTarget] = []
        self.launched: list[CompiledKernel] = []

    def get_current_device(self) -> int:
        return len(self.targets) - 1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.targets[-1]

    def take_over(self) -> None:
        """From the device's driver, and from ``kernel[grid]``."""

        def launcher(kernel: KernelInterface, grid: object) -> Callable[..., None]:
            def launch(*args, **kwargs):
                self.launched.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

            return launch

        driver.set_active(self)
        KernelInterface.__getitem__ = launcher


def taken(plan_class, spec, num_hypers, scaled):
    """A step, with what its plan's making launches."""
    grads = [torch.ones_like(p) for p in spec.params]
    amp = torch.ones(()) if scaled else None
    plan = plan_class(spec)
    aligned = plan.align(spec.params, grads, Given(grads))
    plan.step(aligned, torch.zeros(1, num_hypers).double().numpy(), 0, amp, amp)


def sgd_step(dtype, momentum_dtype=None, scaled=False):
    """Of one tensor."""
    param, buffer = (torch.zeros(5000, dtype=d) for d in (dtype, momentum_dtype or dtype))
    segments = Cosine(100).segments()
    moments = {"momentum_buffer": [buffer]}
    spec = PlanSpec([param], moments, [True], [0], [segments], 0.0, 0, momentum_dtype)
    taken(SgdTritonPlan, spec, len(SGD_HYPERS), scaled)


def adam_step(dtype, state_dtype=None, scaled=False):
    """The same, with amsgrad."""
    param = torch.zeros(5000, dtype=dtype)
    segments = Cosine(100).segments()
    spec = spec_of([param], amsgrad=True, segments=[segments], state_dtype=state_dtype)
    taken(AdamTritonPlan, spec, len(ADAM_HYPERS), scaled)


def softmax(dtype, rows, classes, log=False):
    members = [torch.zeros(rows, classes, dtype=dtype) for _ in range(3)]
    softmax_triton.ensemble_softmax(members, None, 1.0, log)


def statistics(dtype, rows, classes):
    members = [torch.zeros(rows, classes, dtype=dtype) for _ in range(3)]
    labels = torch.zeros(rows, dtype=torch.int64)
    softmax_triton.ensemble_statistics(members, None, 1.0, labels)


def softmax_add(dtype, rows, classes):
    total, entropy = torch.zeros(rows, classes), torch.zeros(rows)
    logits = torch.zeros(rows, classes, dtype=dtype)
    softmax_triton.softmax_add(torch.empty_like(total), entropy, total, logits, 0.5, 1.0)


@triton.jit
def _spilling_kernel(p, N: tl.constexpr):
    x = tl.load(p + tl.arange(0, N))
    tl.store(p + tl.arange(0, N), x - tl.max(x))  # a row of more than the registers hold


@triton.jit
def _narrow_kernel(table, n, N: tl.constexpr):
    p = tl.load(table).to(tl.pointer_type(tl.float32))
    mask = tl.arange(0, N) < n
    tl.store(p + tl.arange(0, N), tl.load(p + tl.arange(0, N), mask=mask) + 1, mask=mask)


FLOATS = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
CASES: dict[str, Callable[[], None]] = {
    **{f"SGD {name}": lambda d=d: sgd_step(d) for name, d in FLOATS.items()},
    "SGD bf16, momentum fp32": lambda: sgd_step(torch.bfloat16, torch.float32),
    "SGD fp32, scaled": lambda: sgd_step(torch.float32, scaled=True),
    **{f"Adam {name}": lambda d=d: adam_step(d) for name, d in FLOATS.items()},
    "Adam bf16, moments fp32": lambda: adam_step(torch.bfloat16, torch.float32),
    "Adam fp32, scaled": lambda: adam_step(torch.float32, scaled=True),
    **{f"softmax {name}": lambda d=d: softmax(d, 64, 1024) for name, d in FLOATS.items()},
    "softmax fp32, few classes": lambda: softmax(torch.float32, 256, 16),
    "softmax fp32, many classes": lambda: softmax(torch.float32, 8, 50304),
    "softmax fp32, log": lambda: softmax(torch.float32, 64, 1024, log=True),
    "statistics fp32": lambda: statistics(torch.float32, 64, 1024),
    "statistics bf16": lambda: statistics(torch.bfloat16, 64, 1024),
    "softmax_add fp32": lambda: softmax_add(torch.float32, 64, 1024),
}
SEEDED: dict[str, Callable[[], None]] = {
    "spilling": lambda: _spilling_kernel[(1,)](torch.zeros(32768), 32768, num_warps=1),
    "narrow": lambda: _narrow_kernel[(1,)](torch.zeros(1, dtype=torch.int64), 9, 1024),
}


def made_of(kernel: CompiledKernel) -> dict:
    """What the compiler made; local: bytes of local memory, or registers spilled."""
    facts = {
        "kernel": kernel.name,
        "shared": kernel.metadata.shared,
        "threads": kernel.metadata.num_warps * kernel.metadata.target.warp_size,
    }
    if kernel.metadata.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        facts["local"] = sum(map(int, AMD_LOCAL.findall(text)))
        return {**facts, "accesses": Counter(AMD_ACCESS.findall(text))}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        (use,) = compiled.resource_usage(cubin).values()
    facts |= {"local": use.stack + use.local, "registers": use.registers}
    return {**facts, "accesses": Counter(PTX_ACCESS.findall(kernel.asm["ptx"]))}


def target_of(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def main() -> None:
    recorder = Recorder()
    recorder.take_over()
    result = {}
    for name in sys.argv[1:]:
        recorder.targets.append(target_of(name))
        step_triton.warp_size = recorder.targets[-1].warp_size
        result[name] = {}
        for case, launch in {**CASES, **SEEDED}.items():
            recorder.launched.clear()
            launch()
            result[name][case] = [made_of(k) for k in recorder.launched]
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
