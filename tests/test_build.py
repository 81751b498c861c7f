"""setup.py: what is built, what is left out, and what turns leaving out into an error."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="tests run outside the source tree"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
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
        env={**os.environ, "FASTFREEZE_BUILD_CUDA": "0", **environment},
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


@needs_nvcc
def test_a_bad_architecture_is_refused(tree):
    (tree / "csrc/cuda").mkdir(exist_ok=True)
    (tree / "csrc/cuda/probe.cu").write_text(PROBE)
    code, _, output = build(tree, FASTFREEZE_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="hopper")
    assert code != 0
    assert "TORCH_CUDA_ARCH_LIST: expected such as '9.0' or '9.0+PTX', got 'hopper'" in output
