"""setup.py: what is built, what is left out, and what turns leaving out into an error."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.compiled import NO_NVCC, find_nvcc

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="tests run outside the source tree"
)
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason=NO_NVCC)
TOOLKIT = {"CUDA_HOME": str(Path(nvcc).parent.parent)} if (nvcc := find_nvcc()) else {}
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
PROBE = """
#include "schedule_math.h"
__global__ void probe(double* out) {
  const fastfreeze::Segment segment{0, 10, 1};
  *out = fastfreeze::segment_lr(segment, 5, 0.1, 0);
}
extern "C" __attribute__((visibility("default"))) int fastfreeze_probe() { return 42; }
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build needs."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fastfreeze").mkdir()
    shutil.copy(ROOT / "fastfreeze/_version.py", tmp_path / "fastfreeze")
    (tmp_path / "fastfreeze/__init__.py").touch()
    return tmp_path


def build(tree, **environment):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
        cwd=tree,
        env={**os.environ, **TOOLKIT, "FASTFREEZE_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    built = sorted(p.name for p in (tree / "out").rglob("*.so"))
    return done.returncode, built, done.stdout + done.stderr


def test_without_a_compiler_the_library_is_left_out_aloud(tree):
    code, built, output = build(tree, **NO_COMPILER)
    assert (code, built) == (0, [])
    assert "libfastfreeze_cpu was not built and is left out" in output


def test_the_switch_turns_leaving_out_into_an_error(tree):
    code, built, _ = build(tree, FASTFREEZE_BUILD_CPP="1", **NO_COMPILER)
    assert code != 0
    assert built == []


def test_the_switch_leaves_out(tree):
    assert build(tree, FASTFREEZE_BUILD_CPP="0")[:2] == (0, [])


@pytest.mark.parametrize("name", ["FASTFREEZE_BUILD_CPP", "FASTFREEZE_BUILD_CUDA"])
def test_an_unknown_switch_value_is_refused(tree, name):
    code, _, output = build(tree, **{name: "maybe"})
    assert code != 0
    assert f"{name} must be 0, 1 or auto, got 'maybe'" in output


def test_cuda_on_demand_needs_nvcc(tree):
    (tree / "csrc/cuda").mkdir(exist_ok=True)
    (tree / "csrc/cuda/probe.cu").write_text(PROBE)
    code, _, output = build(
        tree, FASTFREEZE_BUILD_CPP="0", FASTFREEZE_BUILD_CUDA="1", CUDA_HOME=str(tree)
    )
    assert code != 0
    assert "no nvcc in CUDA_HOME or on the PATH" in output


@needs_nvcc
def test_cuda_is_built_for_the_architectures_asked_for(tree):
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    shutil.rmtree(tree / "csrc/cuda", ignore_errors=True)
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/probe.cu").write_text(PROBE)
    only_cuda = {"FASTFREEZE_BUILD_CPP": "0", "FASTFREEZE_BUILD_CUDA": "1"}
    code, built, output = build(tree, TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX", **only_cuda)
    assert (code, built) == (0, ["libfastfreeze_cuda.so"]), output
    for flag in ("compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"):
        assert flag in output
    library = ctypes.CDLL(str(next((tree / "out").rglob("*.so"))))
    assert library.fastfreeze_probe() == 42


OTHER_TOOLKITS = {
    "too new": (
        "echo 'Cuda compilation tools, release 99.1, V99.1'",
        "is of CUDA 99, torch of CUDA",
    ),
    "too old": ("echo 'release 9.2' && test $1 = --version", "libfastfreeze_cuda was not built"),
    "unknown": ("echo 'a wrapper of another compiler'", "--version tells no release"),
    "broken": ("echo 'cannot execute' >&2; exit 126", "returned non-zero exit status 126"),
}


@pytest.mark.parametrize(("script", "why"), OTHER_TOOLKITS.values(), ids=OTHER_TOOLKITS)
@pytest.mark.parametrize("switch", ["auto", "1"])
def test_a_toolkit_that_does_not_fit(tree, switch, script, why):
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    (tree / "csrc/cuda/probe.cu").write_text(PROBE)
    nvcc = tree / "toolkit/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    environment = {"FASTFREEZE_BUILD_CPP": "0", "CUDA_HOME": str(tree / "toolkit")}
    environment["TORCH_CUDA_ARCH_LIST"] = "9.0"  # "auto" would leave CUDA out without a device
    code, built, output = build(tree, FASTFREEZE_BUILD_CUDA=switch, **environment)
    assert built == []
    assert (code == 0) == (switch == "auto")
    if switch == "auto":
        assert "libfastfreeze_cuda was not built and is left out" in output
        assert why in output


def test_the_source_distribution_holds_every_source(tree):
    shutil.copy(ROOT / "MANIFEST.in", tree)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "dist"]
    environment = {**os.environ, "FASTFREEZE_BUILD_CUDA": "0"}
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in sources} >= {".cpp", ".h", ".cu", ".cuh"}
    assert sources <= held


@needs_nvcc
def test_a_bad_architecture_is_refused(tree):
    (tree / "csrc/cuda").mkdir(exist_ok=True)
    (tree / "csrc/cuda/probe.cu").write_text(PROBE)
    only_cuda = {"FASTFREEZE_BUILD_CPP": "0", "FASTFREEZE_BUILD_CUDA": "1"}
    code, _, output = build(tree, TORCH_CUDA_ARCH_LIST="hopper", **only_cuda)
    assert code != 0
    assert "TORCH_CUDA_ARCH_LIST: expected such as '9.0' or '9.0+PTX', got 'hopper'" in output
