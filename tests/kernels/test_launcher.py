"""Triton's own launcher takes our arguments, and a captured step finds its kernels loaded.

A stub stands for the GPU's driver (tests/kernels/launches.py): nothing is computed.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

from tests.kernels.test_compile_matrix import needs_triton
from tests.snippets import ROOT

pytestmark = [
    needs_triton,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc"),
]
STREAM = 77


@functools.cache
def driven(which):
    """What tests.kernels.launches prints."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | hidden
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.launches", folder, which]
        options = {"cwd": ROOT, "env": environment, "timeout": 600, "text": True}
        done = subprocess.run(command, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("which", ["quick", pytest.param("rest", marks=pytest.mark.slow)])
def test_the_driver_gets_what_the_launcher_was_given(which):
    for case, launches in driven(which)["launches"].items():
        assert launches, case
        for launch in launches:
            assert launch["received"] == launch["passed"], case
            assert launch["grid"] == launch["programs"], case
            assert launch["block"] == [32 * launch["warps"], 1, 1], case
            assert launch["stream"] == STREAM, case


@pytest.mark.parametrize("name", ["SGD, step", "SGD, tracks", "Adam, step", "Adam, tracks"])
def test_the_driver_gets_the_tables_of_a_plan(name):
    launch = driven("quick")["arguments"][name]
    received, expected = dict(launch["received"]), launch["expected"]
    assert {n: received[n] for n in expected} == expected


def test_a_captured_step_loads_no_kernel():
    captures = driven("quick")["captures"]
    late = captures.pop("a scaler that comes late")  # shows that a load would be seen
    assert late == {make: {"loaded": 1, "launched": 1} for make in late}
    for name, found in captures.items():
        assert found == {make: {"loaded": 0, "launched": 1} for make in late}, name
