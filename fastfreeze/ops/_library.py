"""The operators' schemas, the compiled libraries, and which backends can run here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastfreeze.errors import BackendUnavailableError

Backend = Literal["cuda", "triton", "cpu", "reference"]

# One copy of fastfreeze a process: a second one fails here, before its libraries could load and
# crash. The C++ side only implements; these are the only declarations.
_LIBRARY = torch.library.Library("fastfreeze", "DEF")
_LIBRARY.define("cpu_isa(int level) -> int")
_LIBRARY.define(
    "sgd_plan(Tensor tensors, Tensor segments, Tensor segment_begin, float eta_min) -> int"
)
_LIBRARY.define(
    "sgd_step(int handle, int grads, int hypers, int step, float inv_grad_scale, "
    "bool store_grad, int lrs) -> ()"
)
_LIBRARY.define("sgd_plan_free(int handle) -> ()")
_LIBRARY.define("ensemble_softmax(Tensor[] members) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    "softmax_add(Tensor(a!) result, Tensor? total, Tensor logits) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here; if not, why."""

    available: bool
    reason: str

    def __str__(self) -> str:
        return self.reason if self.available else f"not available: {self.reason}"


def _load(name: str) -> Availability:
    path = Path(__file__).parent.parent / f"lib{name}.so"
    if not path.exists():
        return Availability(False, f"{path.name} was not built when fastfreeze was installed")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Availability(False, f"{path.name} does not load: {error}")
    return Availability(True, f"{path.name} is loaded")


def _cuda() -> Availability:
    library = _load("fastfreeze_cuda")
    if library.available and not torch.cuda.is_available():
        return Availability(False, "torch sees no CUDA device")
    return library


def _triton() -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "the package triton is not installed")
    return Availability(False, "this version of fastfreeze has no Triton kernels yet")


_BACKENDS: dict[Backend, Availability] = {
    "cuda": _cuda(),
    "triton": _triton(),
    "cpu": _load("fastfreeze_cpu"),
    "reference": Availability(True, "plain PyTorch, every device"),
}


def backends() -> dict[Backend, Availability]:
    """Every backend, fastest first, with whether it can run here and why not.

    Example:
        >>> for name, availability in fastfreeze.backends().items():
        ...     print(name, availability)
    """
    return dict(_BACKENDS)


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
