"""The operators' schemas, the compiled libraries, and which backends can run here."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastfreeze.errors import BackendUnavailableError
from fastfreeze.text import some

Backend = Literal["cuda", "triton", "cpu", "reference"]

KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (7, 5)  # of CUDA devices that the kernels are compiled for

# One copy of fastfreeze a process: a second one fails here, before its libraries could load and
# crash. The C++ side only implements; these are the only declarations.
_LIBRARY = torch.library.Library("fastfreeze", "DEF")
_LIBRARY.define("cpu_isa(int level) -> int")
_LIBRARY.define("placements(Tensor[] tensors, bool keep) -> int")
_LIBRARY.define(
    "placements_look(int planned, int buffers, int gaps, Tensor[] params, Tensor[] grads, "
    "int index, int addresses) -> int"
)
# It returns no tensor. Autograd, which has nothing to note then, would still go through each.
_LIBRARY.impl("placements_look", torch.library.fallthrough_kernel, "Autograd")
_LIBRARY.define("placements_free(int handle) -> ()")
_LIBRARY.define("gaps(Tensor written, Tensor sizes) -> int")
_LIBRARY.define("gaps_free(int handle) -> ()")
for _rule in ("sgd", "adam"):
    _LIBRARY.define(
        f"{_rule}_plan(Tensor tensors, Tensor progress, Tensor segments, Tensor segment_begin, "
        "float eta_min, int warmup_steps) -> int"
    )
    _LIBRARY.define(
        f"{_rule}_step(int handle, int grads, int hypers, int step, float inv_grad_scale, "
        "bool store_grad, int lrs) -> ()"
    )
    _LIBRARY.define(
        f"cuda_{_rule}_plan(Tensor runs, Tensor hypers, Tensor segments, Tensor segment_begin, "
        "Tensor tensor_groups, Tensor(a!) progress, Tensor(b!) counters, int run_elements, "
        "float eta_min, int warmup_steps, int param_dtype, int state_dtype) -> int"
    )
    _LIBRARY.define(
        f"cuda_{_rule}_step(int handle, int grads, int grad_table, int found_inf, int grad_scale, "
        "bool track) -> ()"
    )
    for _prefix in ("", "cuda_"):
        _LIBRARY.define(f"{_prefix}{_rule}_plan_free(int handle) -> ()")
_LIBRARY.define(
    "affine_relu_cat(Tensor[] parts, Tensor scale, Tensor shift, bool channels_last, bool relu) "
    "-> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "winograd_conv2d(Tensor input, Tensor transformed, Tensor? bias, Tensor? residual, "
    "Tensor? input_scale, Tensor? input_shift, int pad_h, int pad_w, bool relu) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
for _prefix in ("", "triton_"):  # of C++, and of Triton, which torch.compile need not look into
    _LIBRARY.define(
        f"{_prefix}ensemble_softmax(Tensor[] members, float[]? weights, float temperature, "
        "bool log) -> Tensor",
        tags=torch.Tag.pt2_compliant_tag,
    )
    _LIBRARY.define(
        f"{_prefix}ensemble_statistics(Tensor[] members, float[]? weights, float temperature, "
        "Tensor? labels) -> (Tensor probabilities, Tensor max_probability, Tensor argmax, "
        "Tensor entropy, Tensor mutual_information, Tensor nll)",
        tags=torch.Tag.pt2_compliant_tag,
    )
    _LIBRARY.define(
        f"{_prefix}softmax_add(Tensor(a!) result, Tensor(b!)? entropy, Tensor? total, "
        "Tensor logits, float weight, float temperature) -> ()",
        tags=torch.Tag.pt2_compliant_tag,
    )


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here; if not, why."""

    available: bool
    reason: str

    def __str__(self) -> str:
        return self.reason if self.available else f"not available: {self.reason}"


_KEYS = ("CPU", "CompositeExplicitAutograd")  # under which a library has its kernels
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


def _load(name: str) -> Availability:
    path = Path(__file__).parent.parent / f"lib{name}.so"
    if not path.exists():
        return Availability(False, f"{path.name} was not built when fastfreeze was installed")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        why = error.__cause__ or error  # torch's own words name the file alone
        return Availability(False, f"{path.name} does not load: {why}")
    if lacking := _not_implemented(cuda=name == "fastfreeze_cuda"):
        return Availability(
            False, f"{path.name} is older than its sources, and lacks {some(lacking)}: build again"
        )
    return Availability(True, f"{path.name} is loaded")


def _not_implemented(cuda: bool) -> list[str]:
    """Operators that the loaded library, CUDA's or the CPU's, should implement and does not."""
    names = sorted(n.removeprefix("fastfreeze::") for n in _LIBRARY._op_defs)
    own = [n for n in names if n.startswith("cuda_") == cuda and not n.startswith("triton_")]
    return [n for n in own if not any(_has_kernel(f"fastfreeze::{n}", key) for key in _KEYS)]


def _has_gpu() -> bool:
    # device_count() asks the driver's management library where it can: unlike is_available() it
    # leaves CUDA uninitialised, so that a process may still fork.
    return torch.cuda.device_count() > 0


def _cuda() -> Availability:
    library = _load("fastfreeze_cuda")
    if library.available and torch.version.cuda is None:
        return Availability(False, "this torch is built without CUDA")
    if library.available and not _has_gpu():
        return Availability(False, "torch sees no CUDA device")
    return library


def _triton() -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "the package triton is not installed")
    if interpreting():
        return Availability(True, "Triton's interpreter (TRITON_INTERPRET=1), for checking only")
    if not _has_gpu():
        return Availability(False, "torch sees no CUDA or ROCm device")
    return Availability(True, "compiled for the device when first used")


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, which takes tensors of the CPU too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_BACKENDS: dict[Backend, Availability] = {
    "cuda": _cuda(),
    "triton": _triton(),
    "cpu": _load("fastfreeze_cpu"),
    "reference": Availability(True, "plain PyTorch, every device"),
}


def backends() -> dict[Backend, Availability]:
    """Every backend, fastest first, with whether it can run here and why not.

    Example:
        >>> print(fastfreeze.backends()["reference"])
        plain PyTorch, every device
    """
    return dict(_BACKENDS)


def choose(
    backend: Backend | None,
    device: torch.device,
    what: str,
    refuses: Callable[[Backend], str | None],
) -> Backend:
    """The backend asked for, or the fastest that can take ``what`` on ``device``.

    Args:
        backend: the one asked for; None: any but an interpreter.
        device: where it is.
        what: the word for it in errors.
        refuses: tells why a backend's kernels cannot take it; None if they can.

    Raises:
        ValueError, BackendUnavailableError: the one asked for cannot run, or cannot take it.
    """
    if backend is None:
        kinds: list[Backend] = ["cuda", "triton"] if device.type == "cuda" else ["cpu"]
        usable = (n for n in kinds if refuses_device(n, device) is None and refuses(n) is None)
        return next(usable, "reference")
    require(backend)
    reason = None if backend == "reference" else refuses_device(backend, device) or refuses(backend)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot take {what}: {reason}")
    return backend


def refuses_device(backend: Backend, device: torch.device) -> str | None:
    """Why the kernels of ``backend`` cannot take tensors on ``device``; None if they can."""
    if not _BACKENDS[backend].available:
        return _BACKENDS[backend].reason
    kinds = {"cuda": ["cuda"], "triton": ["cuda"], "cpu": ["cpu"]}.get(backend, [device.type])
    if backend == "triton" and interpreting():
        kinds = ["cpu"]
    if device.type not in kinds:
        return f"it is on {device}"
    if device.type == "cuda" and torch.version.cuda is not None:
        capability = _capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"{device} has compute capability {capability}, expected {OLDEST_CAPABILITY}"
    return None


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes ``device`` the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether what ``device`` is given now goes into a graph."""
    if device.type != "cuda":
        return False
    with current(device):
        return torch.cuda.is_current_stream_capturing()


# Not for torch.compile to trace: a device stays what it is.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def require(backend: Backend) -> None:
    """Raise unless ``backend`` is a backend's name and can run here.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailableError: it cannot run here; the message says what can, and why not.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {list(_BACKENDS)} or None, got {backend!r}")
    if not _BACKENDS[backend].available:
        rest = "; ".join(f"{name}: {state}" for name, state in _BACKENDS.items())
        raise BackendUnavailableError(f"backend {backend!r} cannot run here ({rest})")
