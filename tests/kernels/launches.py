"""Launches Triton's kernels as on a GPU, through Triton's own C code, with a driver that has none.

``python -m tests.kernels.launches FOLDER quick`` (or ``rest``) prints as JSON what reached the
driver; FOLDER gets what is compiled. To be run without TRITON_INTERPRET, and without a GPU to be
seen. Memory of the host stands for the device's.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastfreeze.kernels import adam_triton, library, sgd_triton, softmax_triton
from fastfreeze.kernels.adam_device import AdamTritonPlan
from fastfreeze.kernels.device_plan import DevicePlan
from fastfreeze.kernels.plans import PlanSpec
from fastfreeze.kernels.sgd_device import SgdTritonPlan
from fastfreeze.optim import SGD, Adam, AdamW, FusedOptimizer
from fastfreeze.schedule import Cosine, FreezeOut
from tests.kernels import triton_matrix
from tests.kernels.adam_plans import named as named_moments

C_TYPES = {
    "*": ctypes.c_uint64,
    "u1": ctypes.c_uint8,
    "i1": ctypes.c_uint8,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


class Config(ctypes.Structure):
    """The beginning of CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
    ]


ON_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)


def flat(value: Any) -> list[Any]:
    """The numbers in nested tuples, in order."""
    return [n for v in value for n in flat(v)] if isinstance(value, tuple) else [value]


def named(names: list[str], signature: dict, values: tuple) -> list[tuple[str, str, Any]]:
    """Name, type and value of each argument that is no constant of the kernel."""
    found = []
    for name, value in zip(names, values, strict=True):
        if signature[name] == "constexpr":
            continue
        types = flat(signature[name])
        for i, (kind, one) in enumerate(zip(types, flat(value), strict=True)):
            if kind != "constexpr":
                found.append((name if len(types) == 1 else f"{name}[{i}]", kind, one))
    return found


def c_type(kind: str) -> Any:
    """What a kernel reads as an argument of this type of Triton's."""
    return C_TYPES["*" if kind[0] == "*" else kind]


def as_c(kind: str, value: Any) -> Any:
    return c_type(kind)(value.data_ptr() if isinstance(value, torch.Tensor) else value)


class StubDriver(nvidia.CudaDriver):
    """Triton's driver of NVIDIA GPUs, where no torch.cuda need be asked."""

    def __init__(self, folder: Path) -> None:
        self.libcuda = built(folder)
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = Launcher
        self.launched: list[dict] = []
        self._callback = ON_LAUNCH(self._on_launch)
        ctypes.c_void_p.in_dll(self.libcuda, "on_launch").value = ctypes.cast(
            self._callback, ctypes.c_void_p
        ).value

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @property
    def modules_loaded(self) -> int:
        """How often a kernel was loaded, for each one compiled or found in Triton's cache."""
        return ctypes.c_int.in_dll(self.libcuda, "modules_loaded").value

    def _on_launch(self, config: Any, function: int, parameters: Any) -> None:
        launch = self.launched[-1]
        launch["received"] = [
            [name, c_type(kind).from_address(parameters[i]).value]
            for i, (name, kind, _) in enumerate(launch.pop("arguments"))
        ]
        launch["grid"], launch["block"] = list(config[0].grid), list(config[0].block)
        launch["stream"] = config[0].stream


def built(folder: Path) -> ctypes.CDLL:
    """The stub driver, loaded under the name by which Triton's modules then find it."""
    library = folder / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    source = Path(__file__).parent / "stub_libcuda.c"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=120)
    return ctypes.CDLL(str(library))


class Launcher(nvidia.CudaLauncher):
    """Triton's, which notes what it is given."""

    def __init__(self, src: Any, metadata: Any) -> None:
        super().__init__(src, metadata)
        self.kernel, self.names, self.types = src.name, src.fn.arg_names, src.signature
        self.warps = metadata.num_warps

    def __call__(self, *given: Any) -> None:
        arguments = named(self.names, self.types, given[-len(self.names) :])
        launch = {"kernel": self.kernel, "arguments": arguments}
        launch["passed"] = [[name, as_c(kind, value).value] for name, kind, value in arguments]
        launch["programs"], launch["warps"] = list(given[:3]), self.warps
        driver.active.launched.append(launch)
        super().__call__(*given)


def statistics(members: list[torch.Tensor]) -> None:
    labels = torch.zeros(len(members[0]), dtype=torch.int64)
    softmax_triton.ensemble_statistics(members, None, 1.0, labels)


def softmax(members: list[torch.Tensor], *rest: Any) -> None:
    softmax_triton.ensemble_softmax(members, *rest)


def split_softmax_add() -> None:
    result, total = torch.zeros(2, 5000), torch.zeros(2, 5000)
    softmax_triton.softmax_add(result, None, None, total, 0.5, 1.0)


QUICK: dict[str, Callable[[], None]] = {
    "one class": lambda: softmax([torch.zeros(4, 1)] * 3, [0.5, 0.25, 0.25], 2.0, True),
    "two rows of fp64, split": lambda: statistics([torch.zeros(2, 5000).double()] * 3),
    "softmax_add fp32": triton_matrix.CASES["softmax_add fp32"],
}
REST: dict[str, Callable[[], None]] = {
    "33 members": lambda: statistics([torch.zeros(3, 17) for _ in range(33)]),
    "one row for all": lambda: softmax([torch.zeros(1, 40).expand(9, 40)] * 3, None, 1.0, False),
    "softmax_add without entropies": split_softmax_add,
    **{name: case for name, case in triton_matrix.CASES.items() if name not in QUICK},
}


def launches(cases: dict[str, Callable[[], None]]) -> dict[str, list[dict]]:
    """What each case launches."""
    found = {}
    for name, case in cases.items():
        driver.active.launched = []
        case()
        found[name] = driver.active.launched
    return found


def arguments_of(plan: DevicePlan) -> dict[str, dict]:
    """What a step that tracks nothing and one that tracks get, and what they must get."""
    grad_scale, found_inf = torch.ones(()), torch.zeros(())
    driver.active.launched = []
    for track in (False, True):
        plan._launch(array("q"), grad_scale, found_inf, track)
    tables = {
        "runs": plan.runs,
        "grads": plan.grad_table,
        "hypers": plan.hypers,
        "segments": plan.segments,
        "begin": plan.segment_begin,
        "tensor_groups": plan.tensor_groups,
        "progress": plan.progress,
        "counters": plan.counters,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
    }
    expected = {name: table.data_ptr() for name, table in tables.items()}
    expected |= {"eta_min": 0.1, "warmup_steps": 7.0, "num_runs": len(plan.runs), "num_tensors": 2}
    return {
        name: {"expected": expected | {"track": int(name == "tracks" or plan.counts)}, **launch}
        for name, launch in zip(("step", "tracks"), driver.active.launched, strict=True)
    }


def step_arguments() -> dict[str, dict]:
    """Of a plan of SGD and one of Adam."""
    params, *moments = ([torch.ones(5000), torch.ones(3)] for _ in range(4))
    rest = [[True] * 2, [0, 0], [Cosine(100).segments()], 0.1, 7, None]
    of_adam = PlanSpec(params, named_moments(*moments), *rest, steps=torch.zeros(2))
    plans = {
        "SGD": SgdTritonPlan(PlanSpec(params, {"momentum_buffer": moments[0]}, *rest)),
        "Adam": AdamTritonPlan(of_adam),
    }
    return {
        f"{rule}, {name}": launch
        for rule, plan in plans.items()
        for name, launch in arguments_of(plan).items()
    }


Make = Callable[..., FusedOptimizer]
sgd = partial(SGD, lr=0.1, momentum=0.9)


def optimizer_of(make: Make, schedule: Any = None) -> FusedOptimizer:
    """Three layers, each with a gradient."""
    params = [nn.Parameter(torch.ones(n)) for n in (5000, 3, 2048)]
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": [p], "layer_index": i, "num_layers": 3} for i, p in enumerate(params)]
    return make(groups, schedule=schedule, backend="triton")


def stepped(optimizer: FusedOptimizer, **scaler: torch.Tensor) -> FusedOptimizer:
    """After one more step, with what a GradScaler leaves to the optimizer."""
    for name, value in scaler.items():
        setattr(optimizer, name, value)
    optimizer.step()
    return optimizer


def resumed(make: Make, schedule: Any = None) -> FusedOptimizer:
    """One step after a state was loaded, whose moments have all had their first."""
    state = stepped(optimizer_of(make, schedule)).state_dict()
    forget_kernels()
    optimizer = optimizer_of(make, schedule)
    optimizer.load_state_dict(state)
    return stepped(optimizer)


def with_a_layer_frozen(make: Make) -> FusedOptimizer:
    """One step after the first layer has frozen."""
    optimizer = optimizer_of(make, FREEZES)
    while not optimizer.frozen_layers:
        stepped(optimizer)
    forget_kernels()
    return stepped(optimizer)


def scaler_that_comes_late(make: Make) -> FusedOptimizer:
    """As it must not be: only the captured step looks for an overflow."""
    optimizer = stepped(optimizer_of(make))
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    return optimizer


FREEZES = FreezeOut(20, t_0=0.5)
SCALE = torch.full((), 2.0**16)
# Of each class; what is done before the captured step.
CAPTURES: dict[str, Callable[[Make], FusedOptimizer]] = {
    "the first step": lambda make: stepped(optimizer_of(make)),
    "resumed": resumed,
    "resumed, layers to freeze": lambda make: resumed(make, FREEZES),
    "layers to freeze": lambda make: stepped(optimizer_of(make, FREEZES)),
    "a layer frozen": with_a_layer_frozen,
    "scaled": lambda make: stepped(optimizer_of(make), grad_scale=SCALE, found_inf=torch.zeros(())),
    "unscaled": lambda make: stepped(optimizer_of(make, FREEZES), found_inf=torch.zeros(())),
    "a scaler that comes late": scaler_that_comes_late,
}
MAKES: dict[str, Make] = {
    "SGD": sgd,
    "SGD without momentum": partial(sgd, momentum=0.0),
    "Adam": Adam,
    "AdamW, amsgrad": partial(AdamW, amsgrad=True),
}


def forget_kernels() -> None:
    """Has every kernel loaded anew."""
    for kernel in (*vars(sgd_triton).values(), *vars(adam_triton).values()):
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()


def captures() -> dict[str, dict[str, dict[str, int]]]:
    """How many kernels a step loads while it is captured, and how many it launches."""
    # Triton's kernels for tensors of the CPU, as with its interpreter.
    library.interpreting = lambda: True
    library._BACKENDS["triton"] = library.Availability(True, "with the stub driver")
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (which, make), (name, before) in product(MAKES.items(), CAPTURES.items()):
        forget_kernels()
        optimizer = before(make)
        loaded, driver.active.launched = driver.active.modules_loaded, []
        with mock.patch.object(FusedOptimizer, "_is_capturing", return_value=True):
            optimizer.step()
        loaded = driver.active.modules_loaded - loaded
        launched = len(driver.active.launched)
        found.setdefault(name, {})[which] = {"loaded": loaded, "launched": launched}
    return found


def main() -> None:
    folder, which = Path(sys.argv[1]), sys.argv[2]
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}
    driver.set_active(StubDriver(folder))
    found = {"launches": launches(QUICK if which == "quick" else REST)}
    if which == "quick":
        found |= {"arguments": step_arguments(), "captures": captures()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
