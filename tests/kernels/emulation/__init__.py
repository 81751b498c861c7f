"""CUDA kernels compiled by g++ and run on the CPU: an emulation (cuda_emulation.h), not a GPU run.

A harness, one .cpp file here, becomes a library that ctypes calls and two programs: one under
AddressSanitizer and UndefinedBehaviorSanitizer, one under ThreadSanitizer. Both read their inputs
from a file, each into a block of exactly its size, and leave what is in their buffers in another.
"""

from __future__ import annotations

import ctypes
import functools
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc"
SANITIZERS = (None, "address", "thread")
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
_FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
_FLAGS += ["-fvisibility=hidden", "-fno-omit-frame-pointer"]
_FLAGS += [f"-I{HERE}", f"-I{SOURCES}"]
_RUNTIME = ("scheduler.cpp", "harness_main.cpp")
_DEFINES = {
    None: [],
    "address": ["-DEMULATION_ADDRESS", "-DEMULATION_PROGRAM"],
    "thread": ["-DEMULATION_THREAD", "-DEMULATION_PROGRAM"],
}
_CHECKS = {
    None: [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
_TIMEOUT = 120
_FRAMES_BETWEEN = re.compile(
    r"^ +#\d+ .*(std::|emulation::(emulate|SanitizerFiber|Identities)|thread_main|start_fiber)"
    r"|fully support makecontext"
)
_REPORT = 3000  # characters of a sanitizer's report that say what went wrong


class EmulationError(AssertionError):
    """A kernel broke a rule: the emulator's own message, or a sanitizer's report."""


@dataclass(frozen=True)
class Addresses:
    """An int64 table of addresses in the other buffers, 0 being none: all, or some columns."""

    table: Tensor
    columns: tuple[int, ...] | None = None

    def places(self) -> list[int]:
        """The indices of the elements that are addresses."""
        assert self.table.dtype == torch.int64
        assert self.table.is_contiguous()
        width = self.table.shape[-1]
        chosen = range(width) if self.columns is None else self.columns
        flat = self.table.flatten().tolist()
        return [i for i, address in enumerate(flat) if i % width in chosen and address != 0]


def dtype_code(dtype: torch.dtype) -> int:
    """What emulation::with_type takes."""
    return [torch.float32, torch.float64, torch.float16, torch.bfloat16].index(dtype)


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


class _Scalar(ctypes.Structure):
    _fields_ = [("is_real", ctypes.c_int64), ("integer", ctypes.c_int64), ("real", ctypes.c_double)]


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("buffers", ctypes.POINTER(_Buffer)),
        ("num_buffers", ctypes.c_int64),
        ("scalars", ctypes.POINTER(_Scalar)),
        ("num_scalars", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
    ]


Argument = Tensor | Addresses | None


def _extent(argument: Argument) -> _Buffer:
    """All bytes from a tensor's first element to its last."""
    if argument is None:
        return _Buffer(None, 0)
    tensor = argument.table if isinstance(argument, Addresses) else argument
    assert tensor.device.type == "cpu"
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = 0 if tensor.numel() == 0 else (last + 1) * tensor.element_size()
    return _Buffer(tensor.data_ptr() or None, size)  # nullptr where there is no element


def _find(address: int, extents: Sequence[_Buffer], table: int) -> tuple[int, int]:
    """The buffer that an address lies in, and how far from its start."""
    for i, extent in enumerate(extents):
        if i != table and extent.bytes > 0 and 0 <= address - extent.data < extent.bytes:
            return i, address - extent.data
    raise ValueError(f"an address of table {table} lies in none of the buffers")


@dataclass(frozen=True)
class Program:
    """A built harness."""

    path: Path
    sanitizer: str | None

    def run(
        self,
        function: str,
        buffers: Sequence[Argument],
        scalars: Sequence[float] = (),
        seed: int = 0,
    ) -> None:
        """Calls a function of the harness, which writes into the tensors.

        Raises:
            EmulationError: The emulator or a sanitizer found something; it says what.
        """
        name, extents = function.encode(), [_extent(buffer) for buffer in buffers]
        numbers = [
            _Scalar(1, 0, v) if isinstance(v, float) else _Scalar(0, int(v), 0.0) for v in scalars
        ]
        if self.sanitizer is None:
            self._call(name, extents, numbers, seed)
            return
        relocations = [
            (i, place, *_find(buffer.table.flatten()[place].item(), extents, i))
            for i, buffer in enumerate(buffers)
            if isinstance(buffer, Addresses)
            for place in buffer.places()
        ]
        with tempfile.TemporaryDirectory() as folder:
            case, result = Path(folder, "case"), Path(folder, "result")
            case.write_bytes(b"".join(_packed(name, extents, relocations, numbers, seed)))
            self._execute(case, result)
            content = io.BytesIO(result.read_bytes())
        for buffer, extent in zip(buffers, extents, strict=True):
            found = content.read(extent.bytes)
            if isinstance(buffer, Tensor) and found:
                ctypes.memmove(extent.data, found, extent.bytes)

    def _call(self, name: bytes, extents: list[_Buffer], scalars: list[_Scalar], seed: int) -> None:
        call = ctypes.CDLL(str(self.path)).emulation_call
        call.restype = ctypes.c_char_p
        buffers, numbers = (_Buffer * len(extents))(*extents), (_Scalar * len(scalars))(*scalars)
        arguments = _Arguments(buffers, len(extents), numbers, len(scalars), seed)
        error = call(name, ctypes.byref(arguments))
        if error is not None:
            raise EmulationError(error.decode())

    def _execute(self, case: Path, result: Path) -> None:
        done = subprocess.run(
            [*_fixed_addresses(), str(self.path), str(case), str(result)],
            env={**os.environ, **_OPTIONS, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
        if done.returncode != 0:
            raise EmulationError(f"exit status {done.returncode}\n{_shortened(done.stderr)}")


def _packed(
    name: bytes,
    extents: list[_Buffer],
    relocations: list[tuple[int, ...]],
    scalars: list[_Scalar],
    seed: int,
) -> Iterator[bytes]:
    """As harness_main.cpp reads a case."""
    yield struct.pack("q", len(name)) + name + struct.pack("qq", seed, len(extents))
    for extent in extents:
        yield struct.pack("qq", extent.bytes, (extent.data or 0) % 16)
        yield ctypes.string_at(extent.data, extent.bytes) if extent.bytes > 0 else b""
    yield struct.pack("q", len(relocations))
    yield from (struct.pack("qqqq", *relocation) for relocation in relocations)
    yield struct.pack("q", len(scalars)) + b"".join(map(bytes, scalars))


def _shortened(report: str) -> str:
    """A sanitizer's report without bytes, and frames between the kernel and the scheduler."""
    said = report.split("\nShadow bytes", maxsplit=1)[0].splitlines()
    lines = [line for line in said if not _FRAMES_BETWEEN.search(line)]
    return "\n".join(lines)[:_REPORT]


@functools.cache
def _fixed_addresses() -> list[str]:
    """Older ThreadSanitizers cannot start where the kernel scatters addresses widely."""
    command = ["setarch", "-R"]
    if shutil.which("setarch") is None:
        return []
    works = subprocess.run([*command, "true"], timeout=_TIMEOUT, check=False).returncode == 0
    return command if works else []


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastfreeze_emulation_")


def _compile(arguments: list[str]) -> None:
    command = [str(COMPILER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:_REPORT]}")


def _compile_object(source: Path, sanitizer: str | None, checks: list[str]) -> Path:
    path = Path(_folder().name, f"{source.stem}_{sanitizer or 'plain'}.o")
    _compile([*_FLAGS, *_DEFINES[sanitizer], *checks, "-c", str(source), "-o", str(path)])
    return path


@functools.cache
def _runtime(sanitizer: str | None) -> list[Path]:
    """What every harness is linked with. It is not what is checked: see scheduler.h."""
    return [_compile_object(HERE / name, sanitizer, []) for name in _RUNTIME]


@functools.cache
def _build(source: Path, sanitizer: str | None) -> Program:
    checks = _CHECKS[sanitizer]
    scheduler, main = map(str, _runtime(sanitizer))
    kernels = _compile_object(source, sanitizer, checks)
    path = kernels.with_suffix(".so" if sanitizer is None else ".exe")
    shared = ["-shared"] if sanitizer is None else []
    # The order of these three is what shared_begin and shared_end rest on.
    _compile([*checks, *shared, scheduler, str(kernels), main, "-o", str(path)])
    return Program(path, sanitizer)


def build(harness: str, sanitizer: str | None) -> Program:
    """A harness of this folder, built once per session; skips where there is no compiler."""
    if COMPILER is None:
        pytest.skip("emulating CUDA takes Linux and g++")
    if not SOURCES.exists():
        pytest.skip("the CUDA sources are not here: tests run outside the source tree")
    return _build(HERE / harness, sanitizer)
