"""setup.py: what is built, what is left out, and what turns leaving out into an error."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.kernels.compiled import find_nvcc, needs_nvcc, nvcc_marks

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="tests run outside the source tree"
)
of_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build")
TOOLKIT = {"CUDA_HOME": str(Path(nvcc).parent.parent)} if (nvcc := find_nvcc()) else {}
ONLY_CUDA = {"FASTFREEZE_BUILD_CPP": "0", "FASTFREEZE_BUILD_CUDA": "1"}
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
PROBE = """
#include "schedule_math.h"
__global__ void probe(double* out) {
  const fastfreeze::Segment segment{0, 10, 1};
  *out = fastfreeze::segment_lr(segment, 5, 0.1, 0, 0);
}
extern "C" __attribute__((visibility("default"))) int fastfreeze_probe() { return 42; }
"""
# Everything whose name or text nvcc and g++ might derive from where and when they run.
NAMED_BY_PLACE = """
namespace {
struct Local { double value; };
__device__ double offset = 1;
__global__ void probe(Local* out) { out->value = offset; }
}
extern "C" __attribute__((visibility("default"))) const char* fastfreeze_probe(void* out) {
  probe<<<1, 1>>>(static_cast<Local*>(out));
  return __FILE__;
}
"""
TELLS_ITS_PLACE = """
#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY_FRAGMENT(fastfreeze_probe, library) { library.def(__FILE__); }
"""


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module, which builds nothing by itself."""
    spec = importlib.util.spec_from_file_location("fastfreeze_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build needs."""
    return copy_tree(tmp_path)


def copy_tree(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fastfreeze").mkdir()
    shutil.copy(ROOT / "fastfreeze/_version.py", tmp_path / "fastfreeze")
    (tmp_path / "fastfreeze/__init__.py").touch()
    return tmp_path


def setup_py(tree, *arguments, **environment):
    """Runs setup.py; CUDA is left out unless it is asked for."""
    environment = {**os.environ, **TOOLKIT, "FASTFREEZE_BUILD_CUDA": "0", **environment}
    command = [sys.executable, "setup.py", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, cwd=tree, env=environment, check=False, **options)


def build(tree, *options, **environment):
    done = setup_py(tree, "build_ext", "--build-lib", "out", *options, **environment)
    built = sorted(p.name for p in (tree / "out").rglob("*.so"))
    return done.returncode, built, done.stdout + done.stderr


def wheel_of(tree, **environment):
    """Builds a wheel, and gives its name and what it holds."""
    done = setup_py(tree, "-q", "bdist_wheel", "--dist-dir", "dist", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, {name: archive.read(name) for name in archive.namelist()}


def of_an_earlier_build(tree):
    """Libraries that must not stay where they are left out."""
    for folder in (tree / "out/fastfreeze", tree / "fastfreeze"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "libfastfreeze_cuda.so").touch()
        (folder / "libfastfreeze_cpu.so").touch()


def only_source(tree, name, text):
    """Puts one source in the place of all in its folder."""
    folder = tree / "csrc" / name
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.parent.mkdir()
    folder.write_text(text)


def fake_nvcc(tmp_path, script):
    nvcc = tmp_path / "toolkit/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_without_libraries_one_wheel_is_for_any_platform(tree):
    name, held = wheel_of(tree, FASTFREEZE_BUILD_CPP="0")
    assert name.endswith("-py3-none-any.whl")
    assert "fastfreeze/__init__.py" in held
    assert not [member for member in held if member.endswith(".so")]
    metadata = next(text for member, text in held.items() if member.endswith("/WHEEL"))
    assert b"Root-Is-Purelib: true" in metadata
    assert b"Tag: py3-none-any" in metadata


def test_with_a_library_it_is_for_one_platform_and_every_python(tree):
    only_source(tree, "cpu/probe.cpp", TELLS_ITS_PLACE)
    name, held = wheel_of(tree, FASTFREEZE_BUILD_CPP="1")
    assert "-py3-none-" in name
    assert "-any" not in name
    library = held["fastfreeze/libfastfreeze_cpu.so"]
    assert b"csrc/cpu/probe.cpp" in library
    assert b"torch/include/torch/csrc/stable" in library
    assert os.fsencode(Path(torch.__file__).parent) not in library


ARCHITECTURES = {
    12: ["75", "80", "86", "89", "90", "90 as PTX"],
    13: ["75", "80", "86", "89", "90", "100", "120", "120 as PTX"],
}


@pytest.mark.parametrize("major", ARCHITECTURES)
def test_the_toolkits_version_says_what_is_compiled_for(setup, tmp_path, monkeypatch, major):
    monkeypatch.setenv("FASTFREEZE_BUILD_CUDA", "1")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    flags = setup.nvcc_flags(fake_nvcc(tmp_path, f"echo release {major}.1, V{major}.1"))
    expected = [
        f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}"
        for number, _, ptx in (entry.partition(" as ") for entry in ARCHITECTURES[major])
    ]
    assert [flag for flag in flags if flag.startswith("-gencode")] == expected
    assert ("--compress-mode=size" in flags) == (major >= 13)
    assert not [flag for flag in flags if "seed" in flag or "strip" in flag]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    nvcc = str(tmp_path / "toolkit/bin/nvcc")
    added = ["--frandom-seed=fastfreeze", "-Xlinker=--strip-all"]
    assert setup.nvcc_flags(nvcc) == [*flags, *added]


def test_a_reproducible_build_names_its_sources_by_what_is_in_them(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    trees = [tmp_path / name for name in ("one", "another", "changed")]
    for tree in trees:
        (tree / "csrc/cuda").mkdir(parents=True)
        (tree / "csrc/cuda/probe.cu").write_text(f"// {tree.name == 'changed'} {tmp_path}")
    folders = []
    for tree in trees:
        with setup.nvcc_sources(tree) as folder:
            folders.append(folder)
            copy = folder / "csrc/cuda/probe.cu"
            assert copy.read_text() == (tree / "csrc/cuda/probe.cu").read_text()
            with pytest.raises(setup.BuildError, match=f"{folder} exists: .* remove it"):
                setup.nvcc_sources(tree).__enter__()
            assert copy.exists()
        assert not folder.exists()
    assert folders[0] == folders[1] != folders[2]
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    with setup.nvcc_sources(trees[0]) as folder:
        assert folder == trees[0]


@of_cuda
@needs_nvcc
def test_two_reproducible_builds_are_equal(tmp_path):
    libraries = []
    for name in ("one", "a/nother"):
        (tmp_path / name).mkdir(parents=True)
        tree = copy_tree(tmp_path / name)
        for source in (tree / "csrc/cuda").glob("*.cu"):
            if source.name != "step_kernel.cu":  # one is enough, for the time it takes
                source.unlink()
        (tree / "csrc/cuda/probe.cu").write_text(NAMED_BY_PLACE + f"// {tmp_path}")
        settings = {"TORCH_CUDA_ARCH_LIST": "9.0", "SOURCE_DATE_EPOCH": "1"}
        code, built, output = build(tree, **ONLY_CUDA, **settings)
        assert (code, built) == (0, ["libfastfreeze_cuda.so"]), output
        libraries.append(next((tree / "out").rglob("*.so")))
    first, second = (library.read_bytes() for library in libraries)
    assert first == second
    assert b"\0csrc/cuda/probe.cu\0" in first


NOT_C = "#error seeded"
KEPT = {
    # sources, FASTFREEZE_BUILD_CUDA, whether nvcc works; exit status, what is built
    "CUDA fails": (TELLS_ITS_PLACE, "auto", False, 0, ["libfastfreeze_cpu.so"]),
    "CUDA fails, demanded": (TELLS_ITS_PLACE, "1", False, 1, None),
    "C++ fails": (NOT_C, "auto", True, 0, ["libfastfreeze_cuda.so"]),
    "both fail": (NOT_C, "auto", False, 0, []),
}


@of_cuda
@pytest.mark.parametrize(("cpp", "cuda", "works", "status", "kept"), KEPT.values(), ids=KEPT)
def test_what_fails_does_not_take_the_rest_with_it(tree, cpp, cuda, works, status, kept):
    only_source(tree, "cpu/probe.cpp", cpp)
    only_source(tree, "cuda/probe.cu", "")
    major = torch.version.cuda.split(".")[0]
    compiles = 'for last; do :; done; : > "$last"' if works else "echo seeded >&2; exit 1"
    fake_nvcc(tree, f'echo "release {major}.0"; test "$1" = --version || {{ {compiles}; }}')
    of_an_earlier_build(tree)
    environment = {"CUDA_HOME": str(tree / "toolkit"), "TORCH_CUDA_ARCH_LIST": "9.0"}
    code, built, output = build(tree, "--inplace", FASTFREEZE_BUILD_CUDA=cuda, **environment)
    assert code == status
    if kept is None:
        return
    assert built == sorted(p.name for p in (tree / "fastfreeze").glob("*.so")) == kept
    for name in {"libfastfreeze_cpu", "libfastfreeze_cuda"} - {name[:-3] for name in kept}:
        assert f"warning: fastfreeze.{name} was not built and is left out" in output
    assert f"with {kept[0][:-3] if kept else 'no compiled library'}" in output.replace(
        "fastfreeze.", ""
    )


def test_the_switch_turns_leaving_out_into_an_error(tree):
    code, built, output = build(tree, **NO_COMPILER)
    assert (code, built) == (0, [])
    assert "FASTFREEZE_BUILD_CPP=1 makes this an error" in output
    code, built, _ = build(tree, FASTFREEZE_BUILD_CPP="1", **NO_COMPILER)
    assert code != 0
    assert built == []


def test_a_device_that_cannot_be_asked_is_none(setup, monkeypatch, capsys):
    def refuse(_):
        raise RuntimeError("the driver is too old")

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("FASTFREEZE_BUILD_CUDA", "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    monkeypatch.setattr(setup, "find_nvcc", lambda: "nvcc")
    assert [ext.name for ext in setup.extensions()] == ["fastfreeze.libfastfreeze_cpu"]
    assert "the driver is too old" in capsys.readouterr().err


def test_the_switch_leaves_out(tree):
    of_an_earlier_build(tree)
    assert build(tree, FASTFREEZE_BUILD_CPP="0")[:2] == (0, [])


ARCH = "TORCH_CUDA_ARCH_LIST: expected such as '9.0' or '9.0+PTX', got 'hopper'"
REFUSED = {
    "C++": ({"FASTFREEZE_BUILD_CPP": "maybe"}, "FASTFREEZE_BUILD_CPP must be 0, 1 or auto, got"),
    "CUDA": ({"FASTFREEZE_BUILD_CUDA": "maybe"}, "_BUILD_CUDA must be 0, 1 or auto, got 'maybe'"),
    "no nvcc": ({**ONLY_CUDA, "CUDA_HOME": "."}, "no nvcc in CUDA_HOME or on the PATH"),
    "architecture": pytest.param(
        {**ONLY_CUDA, "TORCH_CUDA_ARCH_LIST": "hopper"}, ARCH, marks=nvcc_marks()
    ),
}


@pytest.mark.parametrize(("environment", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tree, environment, words):
    only_source(tree, "cuda/probe.cu", PROBE)
    code, _, output = build(tree, **environment)
    assert code != 0
    assert words in output


@of_cuda
@needs_nvcc
def test_cuda_is_built_for_the_architectures_asked_for(tree):
    only_source(tree, "cuda/probe.cu", PROBE)
    code, built, output = build(tree, TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX", **ONLY_CUDA)
    assert (code, built) == (0, ["libfastfreeze_cuda.so"]), output
    for flag in ("compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"):
        assert flag in output
    library = ctypes.CDLL(str(next((tree / "out").rglob("*.so"))))
    assert library.fastfreeze_probe() == 42


OTHER_TOOLKITS = {
    "too new": ("echo 'Cuda tools, release 99.1, V99.1'", "is of CUDA 99, torch of CUDA"),
    "too old": ("echo 'release 9.2' && test $1 = --version", "libfastfreeze_cuda was not built"),
    "unknown": ("echo 'a wrapper of another compiler'", "--version tells no release"),
    "broken": ("echo 'cannot execute' >&2; exit 126", "returned non-zero exit status 126"),
}


@of_cuda
@pytest.mark.parametrize(("script", "why"), OTHER_TOOLKITS.values(), ids=OTHER_TOOLKITS)
@pytest.mark.parametrize("switch", ["auto", "1"])
def test_a_toolkit_that_does_not_fit(tree, switch, script, why):
    only_source(tree, "cuda/probe.cu", PROBE)
    fake_nvcc(tree, script)
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
    assert setup_py(tree, "-q", "sdist", "--dist-dir", "dist").returncode == 0
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in sources} >= {".cpp", ".h", ".cu", ".cuh"}
    assert sources <= held
    assert {"MANIFEST.in", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
