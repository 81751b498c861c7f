"""Which backends there are, and what an explicit choice does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastfreeze
from fastfreeze.errors import BackendUnavailableError
from fastfreeze.kernels import library
from fastfreeze.kernels.choice import choose_backends
from fastfreeze.kernels.rules import ADAM, SGD
from tests.conftest import needs_cpu_kernels

SOURCES = Path(__file__).parents[2] / "csrc"


def test_every_backend_says_whether_and_why():
    states = fastfreeze.backends()
    assert list(states) == ["cuda", "triton", "cpu", "reference"]
    assert states["reference"].available
    assert all(state.reason for state in states.values())
    for state in states.values():
        assert str(state).startswith("not available: ") != state.available
    states.clear()
    assert fastfreeze.backends()


def test_require_names_the_alternatives(monkeypatch):
    states = {**library.backends(), "cuda": library.Availability(False, "no device")}
    monkeypatch.setattr(library, "_BACKENDS", states)
    with pytest.raises(
        BackendUnavailableError, match=r"'cuda' cannot run here .*no device.*reference"
    ):
        library.require("cuda")
    with pytest.raises(ValueError, match="backend must be one of"):
        library.require("tpu")


def test_a_library_that_is_missing_or_broken_has_a_reason(tmp_path, monkeypatch):
    (tmp_path / "libbroken.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "kernels/library.py"))
    assert "was not built" in library._load("absent").reason
    assert re.search("does not load: .*(too short|invalid ELF)", library._load("broken").reason)
    assert not library._load("broken").available


@needs_cpu_kernels
def test_a_library_of_older_sources_is_not_used(monkeypatch):
    newer = torch.library.Library("fastfreeze", "FRAGMENT")
    newer.define("zzz_newer(Tensor x) -> Tensor")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(library._LIBRARY, "_op_defs", library._LIBRARY._op_defs | newer._op_defs)
            found = library._load("fastfreeze_cpu")
    finally:
        newer._destroy()
    assert not found.available
    assert "is older than its sources, and lacks zzz_newer: build again" in found.reason
    assert library._load("fastfreeze_cpu").available


def test_a_second_copy_is_refused():
    code = (
        "import importlib.util as u, sys; import fastfreeze.kernels.library as first\n"
        "spec = u.spec_from_file_location('again', first.__file__)\n"
        "spec.loader.exec_module(u.module_from_spec(spec))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Only a single TORCH_LIBRARY" in done.stderr


@needs_cpu_kernels
def test_an_instruction_set_the_machine_lacks_is_refused():
    with pytest.raises(RuntimeError, match="is not one this machine has"):
        torch.ops.fastfreeze.cpu_isa(99)


@pytest.mark.skipif(not SOURCES.exists(), reason="tests run outside the source tree")
@pytest.mark.parametrize(
    ("header", "columns"), [("sgd_math.h", SGD.hypers), ("adam_math.h", ADAM.hypers)]
)
def test_the_columns_of_hyperparameters_are_those_of_cpp(header, columns):
    (names,) = re.findall(r"enum \{(.*?),\s*kCount\s*\}", (SOURCES / header).read_text(), re.DOTALL)
    found = re.findall(r"k(\w+)", names)
    assert [re.sub(r"\B([A-Z])", r"_\1", name).lower() for name in found] == list(columns)


ONES = torch.ones(4)
UNSUITABLE = {
    "dtype": (ONES.cfloat(), None, [], "its dtype is torch.complex64, expected one of"),
    "layout": (ONES.to_sparse(), None, [], "its layout is torch.sparse_coo"),
    "overlap": (ONES[:1].expand(4), None, [], r"its elements overlap or have gaps .* \(0,\)"),
    "gaps": (ONES[::2], None, [], r"its elements overlap or have gaps \(shape \(2,\)"),
    "negated": (torch._neg_view(ONES), None, [], "its memory does not hold its values"),
    "sparse gradient": (ONES, ONES.to_sparse(), [], "its gradient is torch.float32 and torch.spa"),
    "wide gradient": (ONES, ONES.double(), [], "its gradient is torch.float64"),
    "wide state": (ONES, None, [ONES.double()], "its state is torch.float64 and torch.strided"),
    "shared": (ONES, ONES, [], "it, its gradient or its state shares memory with another"),
}


@needs_cpu_kernels
@pytest.mark.parametrize(("param", "grad", "state", "why"), UNSUITABLE.values(), ids=UNSUITABLE)
def test_what_no_kernel_takes_goes_to_the_reference_unless_one_is_asked_for(
    param, grad, state, why
):
    other = torch.ones(3)
    given = [[other, param], [None, grad], [(), state]]
    assert choose_backends(*given, None) == ["cpu", "reference"]
    assert choose_backends(*given, "reference") == ["reference"] * 2
    with pytest.raises(ValueError, match=f"backend='cpu' cannot take parameter 1: {why}"):
        choose_backends(*given, "cpu")
