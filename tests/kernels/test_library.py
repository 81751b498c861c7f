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
from fastfreeze.kernels.adam import ADAM_HYPERS
from fastfreeze.kernels.sgd import SGD_HYPERS
from tests.conftest import needs_cpu_kernels

SOURCES = Path(__file__).parents[2] / "csrc"


def test_every_backend_says_whether_and_why():
    states = fastfreeze.backends()
    assert list(states) == ["cuda", "triton", "cpu", "reference"]
    assert states["reference"].available
    assert all(state.reason for state in states.values())
    for state in states.values():
        assert str(state).startswith("not available: ") != state.available


def test_the_answer_is_a_copy():
    fastfreeze.backends().clear()
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
    ("header", "columns"), [("sgd_math.h", SGD_HYPERS), ("adam_math.h", ADAM_HYPERS)]
)
def test_the_columns_of_hyperparameters_are_those_of_cpp(header, columns):
    (names,) = re.findall(r"enum \{(.*?),\s*kCount\s*\}", (SOURCES / header).read_text(), re.DOTALL)
    found = re.findall(r"k(\w+)", names)
    assert [re.sub(r"\B([A-Z])", r"_\1", name).lower() for name in found] == list(columns)
