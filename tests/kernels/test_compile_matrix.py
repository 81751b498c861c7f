"""What compilers make of the GPU kernels, for GPUs that need not be there.

CUDA C++: the machine code in the library that was built. Triton: what its launchers launch,
compiled here. Neither says that a kernel is right; that is for the tests of the kernels.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fastfreeze
from tests.kernels.compiled import (
    ARCHITECTURES,
    MULTIPROCESSORS,
    NO_CUOBJDUMP,
    contents,
    find_cuobjdump,
    kernels_of,
)

ROOT = Path(__file__).parents[2]
LIBRARY = Path(fastfreeze.__file__).parent / "libfastfreeze_cuda.so"
QUICK = 90  # the rest is slow

# Which template argument is the number of elements in a vector.
VECTOR_ARGUMENT = {
    "softmax_lanes_kernel": 2,
    "softmax_block_kernel": 2,
    "softmax_split_sum_kernel": 1,
    "softmax_split_mean_kernel": 2,
}
# Loads and stores of a step: of parameter, gradient and moments, all but the gradient written.
STEP_ACCESSES = {"SGD": (3, 2), "Adam": (5, 4)}

needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason=NO_CUOBJDUMP)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


def slow_but(quick, name):
    return pytest.param(name, marks=[] if name == quick else pytest.mark.slow)


def built_for(arch):
    """The kernels in the library; skips where there are none to look at."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built")
    sources = [p for p in (ROOT / "csrc").rglob("*") if "cpu" not in p.parts and p.is_file()]
    if LIBRARY.parent.parent == ROOT and any(
        p.stat().st_mtime > LIBRARY.stat().st_mtime for p in sources
    ):
        pytest.skip(f"{LIBRARY.name} is older than csrc: python setup.py build_ext --inplace")
    if f"sm_{arch}.cubin" not in contents(LIBRARY):
        pytest.skip(f"{LIBRARY.name} was not built for sm_{arch}")
    return _kernels(LIBRARY, arch)


_kernels = functools.cache(kernels_of)


def arguments_of(name):
    """A kernel's own name and its template arguments."""
    plain, template = re.match(r"(?:void )?fastfreeze::(\w+)(?:<(.*)>)?\(", name).groups()
    return plain, (template or "").split(", ")


def expected_wide(name):
    """How many 128-bit loads and stores a kernel has at least."""
    plain, arguments = arguments_of(name)
    if plain == "step_kernel":
        return STEP_ACCESSES["Adam" if "AdamRule" in name else "SGD"]
    if plain in VECTOR_ARGUMENT and arguments[VECTOR_ARGUMENT[plain]] != "1":
        return 1, int(plain != "softmax_split_sum_kernel")
    return 0, 0


def least_share(name):
    """Of an SM's warps. fp64: twice the registers, and bound by arithmetic long before."""
    return 0.125 if "double" in name or "fp64" in name else 0.25


every_architecture = pytest.mark.parametrize("arch", [slow_but(QUICK, a) for a in ARCHITECTURES])


@needs_cuobjdump
@every_architecture
def test_cuda_kernels(arch):
    """They stay in registers, know global memory, make whole transactions and fill the device."""
    kernels = built_for(arch)
    assert not [name for name, k in kernels.items() if k.uses_local_memory()]
    assert not [name for name, k in kernels.items() if k.has_generic_accesses()]
    wide = {name: expected_wide(name) for name in kernels if expected_wide(name) != (0, 0)}
    assert {arguments_of(name)[0] for name in wide} == {"step_kernel", *VECTOR_ARGUMENT}
    for name, (loads, stores) in wide.items():
        assert kernels[name].wide_loads() >= loads, name
        assert kernels[name].wide_stores() >= stores, name
    if not any(name.endswith(".ptx") for name in contents(LIBRARY)):
        pytest.skip(f"{LIBRARY.name} holds no PTX, which tells the threads of a block")
    for name, k in kernels.items():
        share = MULTIPROCESSORS[arch].occupancy(k.registers, k.shared, k.threads)
        assert share >= least_share(name), (name, k.registers, share)


@needs_cuobjdump
@pytest.mark.slow
def test_the_library_runs_on_later_gpus():
    for arch in ARCHITECTURES:
        built_for(arch)
    assert "sm_120.ptx" in contents(LIBRARY)


TRITON_QUICK = "sm_90"
TRITON_TARGETS = [*(f"sm_{a}" for a in ARCHITECTURES), "gfx942"]
every_target = pytest.mark.parametrize(
    "target", [slow_but(TRITON_QUICK, t) for t in TRITON_TARGETS]
)
TRITON_WIDE = re.compile(r"\.v4\.\w?32|\.v2\.\w?64|\.v8\.\w?32|\.v4\.\w?64|_dwordx4")


@functools.cache
def compiled_by_triton(target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_matrix", target]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[target]


def wide_accesses(kernels):
    """128-bit loads and stores of all kernels together."""
    accesses = sum((Counter(k["accesses"]) for k in kernels), Counter())
    wide = {name: n for name, n in accesses.items() if TRITON_WIDE.search(name)}
    loads = sum(n for name, n in wide.items() if "ld." in name or "load" in name)
    return loads, sum(wide.values()) - loads


def fills_vectors(target, case):
    """Whether a program has 16 bytes of a row for each of its threads."""
    sixteen_bits = case.endswith(("fp16", "bf16"))
    return case != "softmax fp32, few classes" and not (sixteen_bits and target == "gfx942")


@needs_triton
@needs_cuobjdump
@every_target
def test_triton_kernels(target):
    """They stay in registers, make whole transactions and fill the device."""
    made = compiled_by_triton(target).copy()
    spilling, narrow = made.pop("spilling"), made.pop("narrow")  # the checks can fail
    assert spilling[0]["local"] > 0
    assert wide_accesses(narrow) == (0, 0)
    for case, kernels in made.items():
        assert max(k["local"] for k in kernels) == 0, case
        if fills_vectors(target, case):
            loads, stores = wide_accesses(kernels)
            least = STEP_ACCESSES.get(case.split()[0], (1, 1))
            assert loads >= least[0], (case, loads)
            assert stores >= least[1], (case, stores)
        for k in kernels if target.startswith("sm_") else ():
            multiprocessor = MULTIPROCESSORS[int(target.removeprefix("sm_"))]
            share = multiprocessor.occupancy(k["registers"], k["shared"], k["threads"])
            assert share >= least_share(case), (case, k["kernel"], k["registers"], share)


@needs_triton
def test_a_captured_step_compiles_no_kernel():
    """Nor loads one, which a capture forbids."""
    captures = compiled_by_triton("captures")
    late = captures.pop("a late scaler")  # shows that it would be seen
    assert not any(late.values())
    for name, found in captures.items():
        assert all(found.values()), name
