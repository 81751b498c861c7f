"""Compiles what the Triton launchers launch, for GPUs that need not be there.

``python -m tests.kernels.triton_matrix sm_90`` prints as JSON what became of each launch, and
with ``captures`` whether captured steps launch kernels that were compiled before. To be run without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from fastfreeze.kernels import library, softmax_triton, step_triton
from fastfreeze.kernels.device_plan import TritonLaunch
from fastfreeze.kernels.placements import Given
from fastfreeze.optim import SGD, Adam, AdamW, FusedOptimizer
from fastfreeze.schedule import Cosine, FreezeOut
from tests.kernels import compiled
from tests.kernels.steps import CASES as CASES_OF_STEPS
from tests.kernels.steps import spec_of, table_of

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


def step(name, dtype, wide=None, scaled=False):
    """Of one tensor, with what its plan's making launches."""
    case = CASES_OF_STEPS[name]._replace(wide=wide)
    counts = torch.zeros(1) if case.rule == "adam" else None
    segments = [Cosine(100).segments()]
    spec = spec_of([torch.zeros(5000, dtype=dtype)], case, segments=segments, steps=counts)
    amp = torch.ones(()) if scaled else None
    plan = TritonLaunch(spec)
    grads = [torch.ones_like(p) for p in spec.params]
    plan.step(plan.align(spec.params, grads, Given(grads)), table_of(case), 0, amp, amp)


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
    **{f"SGD {name}": partial(step, "momentum", d) for name, d in FLOATS.items()},
    "SGD bf16, wide": lambda: step("momentum", torch.bfloat16, torch.float32),
    "SGD fp32, scaled": lambda: step("momentum", torch.float32, scaled=True),
    **{f"Adam {name}": partial(step, "amsgrad", d) for name, d in FLOATS.items()},
    "Adam bf16, wide": lambda: step("amsgrad", torch.bfloat16, torch.float32),
    "Adam fp32, scaled": lambda: step("amsgrad", torch.float32, scaled=True),
    **{f"softmax {name}": partial(softmax, d, 64, 1024) for name, d in FLOATS.items()},
    "softmax fp32, few classes": lambda: softmax(torch.float32, 256, 16),
    "softmax fp32, many classes": lambda: softmax(torch.float32, 8, 4096),
    "softmax fp32, log": lambda: softmax(torch.float32, 64, 1024, log=True),
    "statistics fp32": lambda: statistics(torch.float32, 64, 1024),
    "statistics bf16": lambda: statistics(torch.bfloat16, 64, 1024),
    "softmax_add fp32": lambda: softmax_add(torch.float32, 64, 1024),
}
SEEDED: dict[str, Callable[[], None]] = {
    "spilling": lambda: _spilling_kernel[(1,)](torch.zeros(32768), 32768, num_warps=1),
    "narrow": lambda: _narrow_kernel[(1,)](torch.zeros(1, dtype=torch.int64), 9, 1024),
}


def optimizer_of(make, schedule=None):
    """Three layers, each with a gradient."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5000, 3, 2048)]
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": [p], "layer_index": i, "num_layers": 3} for i, p in enumerate(params)]
    return make(groups, schedule=schedule, backend="triton")


def stepped(optimizer, found_inf=None, grad_scale=None):
    """After one more step, with what a GradScaler leaves to the optimizer."""
    optimizer.found_inf, optimizer.grad_scale = found_inf, grad_scale
    optimizer.step()
    return optimizer


def resumed(recorder, make, schedule=None):
    """One step after a state was loaded, whose moments have all had their first."""
    state = stepped(optimizer_of(make, schedule)).state_dict()
    recorder.launched.clear()
    optimizer = optimizer_of(make, schedule)
    optimizer.load_state_dict(state)
    return stepped(optimizer)


def with_a_layer_frozen(recorder, make):
    """One step after the first layer has frozen."""
    optimizer = optimizer_of(make, FREEZES)
    while not optimizer.frozen_layers:
        stepped(optimizer)
    recorder.launched.clear()
    return stepped(optimizer)


def with_a_late_scaler(recorder, make):
    """As it must not be: only the captured step looks for an overflow."""
    optimizer = stepped(optimizer_of(make))
    optimizer.found_inf = torch.zeros(())
    return optimizer


FREEZES = FreezeOut(20, t_0=0.5)
SCALER = torch.zeros(()), torch.full((), 2.0**16)
# What is done before the captured step.
CAPTURES = {
    "the first step": lambda _, make: stepped(optimizer_of(make)),
    "layers to freeze": lambda _, make: stepped(optimizer_of(make, FREEZES)),
    "resumed": resumed,
    "resumed, layers to freeze": partial(resumed, schedule=FREEZES),
    "a layer frozen": with_a_layer_frozen,
    "scaled": lambda _, make: stepped(optimizer_of(make), *SCALER),
    "unscaled": lambda _, make: stepped(optimizer_of(make, FREEZES), SCALER[0]),
    "a late scaler": with_a_late_scaler,
}
MAKES = {
    "SGD": partial(SGD, lr=0.1, momentum=0.9),
    "SGD without momentum": partial(SGD, lr=0.1),
    "Adam": Adam,
    "AdamW, amsgrad": partial(AdamW, amsgrad=True),
}


def captures(recorder: Recorder) -> dict:
    """Whether the steps before have compiled the one kernel that a captured step launches."""
    library.interpreting = lambda: True  # Triton's kernels then take tensors of the CPU
    library._BACKENDS["triton"] = library.Availability(True, "compiled and not run")
    found: dict = {}
    for name, before in CAPTURES.items():
        for which, make in MAKES.items():
            recorder.launched.clear()
            optimizer = before(recorder, make)
            known, recorder.launched = recorder.launched, []
            with mock.patch.object(FusedOptimizer, "_is_capturing", return_value=True):
                optimizer.step()
            (launched,) = recorder.launched
            found.setdefault(name, {})[which] = any(launched is one for one in known)
    return found


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
        recorder.targets.append(target_of("sm_90" if name == "captures" else name))
        step_triton.warp_size = recorder.targets[-1].warp_size
        if name == "captures":
            result[name] = captures(recorder)
            continue
        result[name] = {}
        for case, launch in {**CASES, **SEEDED}.items():
            recorder.launched.clear()
            launch()
            result[name][case] = [made_of(k) for k in recorder.launched]
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
