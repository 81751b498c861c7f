"""What compilers made of the GPU kernels, as cuobjdump tells, and how many warps have room then."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NO_NVCC = "no nvcc in CUDA_HOME, on the PATH or from nvidia-cuda-nvcc"
NO_CUOBJDUMP = "no cuobjdump on the PATH or in triton"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

_RESOURCES = re.compile(
    r"^ Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE
)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_ENTRY = re.compile(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", re.DOTALL)


@dataclass
class Kernel:
    """One kernel, compiled for one architecture.

    Attributes:
        stack, shared, local: bytes; of shared memory what is static.
        threads: to a block, at most; None: not told.
        opcodes: how often each instruction stands in the machine code, with its modifiers.
    """

    registers: int
    stack: int
    shared: int
    local: int
    threads: int | None = None
    opcodes: Counter[str] = field(default_factory=Counter)

    def uses_local_memory(self) -> bool:
        """Spilled registers, or arrays that are not in registers."""
        return bool(self.stack or self.local or self._count("LDL") or self._count("STL"))

    def has_generic_accesses(self) -> bool:
        """Loads or stores that find out at run time which memory they mean."""
        return bool(self._count("LD") or self._count("ST"))

    def wide_loads(self) -> int:
        return self._count("LDG", wide=True)

    def wide_stores(self) -> int:
        return self._count("STG", wide=True)

    def _count(self, mnemonic: str, wide: bool = False) -> int:
        total = 0
        for opcode, count in self.opcodes.items():
            name, *modifiers = opcode.split(".")
            if name == mnemonic and (not wide or {"128", "256"} & set(modifiers)):
                total += count
        return total


@dataclass(frozen=True)
class Multiprocessor:
    """What an SM has room for (CUDA C++ Programming Guide, technical specifications)."""

    warps: int
    blocks: int
    shared: int  # KB
    reserved: int = 1024  # bytes of shared memory that each block takes beside its own

    def occupancy(self, registers: int, shared: int, threads: int) -> float:
        """Share of the warps that are resident when blocks of this size fill an SM."""
        warps = -(-threads // 32)
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = 65536 // per_warp // 4 * 4 // warps  # four schedulers, a quarter each
        by_shared = self.shared * 1024 // max(1, shared + self.reserved)
        blocks = min(self.blocks, self.warps // warps, by_registers, by_shared)
        return blocks * warps / self.warps


MULTIPROCESSORS = {
    75: Multiprocessor(warps=32, blocks=16, shared=64, reserved=0),
    80: Multiprocessor(warps=64, blocks=32, shared=164),
    86: Multiprocessor(warps=48, blocks=16, shared=100),
    89: Multiprocessor(warps=48, blocks=24, shared=100),
    90: Multiprocessor(warps=64, blocks=32, shared=228),
    100: Multiprocessor(warps=64, blocks=32, shared=228),
    120: Multiprocessor(warps=48, blocks=24, shared=100),
}


def find_nvcc() -> str | None:
    """nvcc where setup.py looks for it, or from the PyPI package nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or _in_package("nvidia", "cu13/bin/nvcc")


def nvcc_marks() -> list[pytest.MarkDecorator]:
    """Skip a test where there is no nvcc; .ci/run takes these once more where there is one."""
    return [pytest.mark.skipif(find_nvcc() is None, reason=NO_NVCC), pytest.mark.nvcc]


def needs_nvcc(test: Callable[..., None]) -> Callable[..., None]:
    for mark in nvcc_marks():
        test = mark(test)
    return test


def find_cuobjdump() -> str | None:
    """cuobjdump on the PATH, or the one inside Triton."""
    return shutil.which("cuobjdump") or _in_package("triton", "backends/nvidia/bin/cuobjdump")


def kernels_of(binary: Path, arch: int) -> dict[str, Kernel]:
    """The kernels in a cubin, object or library, for one architecture, by readable name."""
    kernels = resource_usage(binary, arch)
    for function, text in _functions(_cuobjdump(binary, f"-arch=sm_{arch}", "--dump-sass")):
        kernels[function].opcodes.update(_INSTRUCTION.findall(text))
    for function, threads in _ENTRY.findall(_cuobjdump(binary, "--dump-ptx")):
        if function in kernels:
            kernels[function].threads = int(threads)
    return dict(zip(_demangled(list(kernels)), kernels.values(), strict=True))


def resource_usage(binary: Path, arch: int | None = None) -> dict[str, Kernel]:
    """Registers and memory of each kernel, by its name in the binary."""
    only = [] if arch is None else [f"-arch=sm_{arch}"]
    text = _cuobjdump(binary, *only, "--dump-resource-usage")
    return {name: Kernel(*map(int, numbers)) for name, *numbers in _RESOURCES.findall(text)}


def contents(library: Path) -> set[str]:
    """What machine code and PTX it holds: such as "sm_90.cubin", "sm_120.ptx"."""
    listed = _cuobjdump(library, "--list-elf") + _cuobjdump(library, "--list-ptx")
    return set(re.findall(r"sm_\w+\.(?:cubin|ptx)", listed))


def _functions(sass: str) -> Iterator[tuple[str, str]]:
    for part in sass.split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        yield name.strip(), text


def _demangled(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.splitlines()


def _cuobjdump(binary: Path, *options: str) -> str:
    program = find_cuobjdump()
    assert program is not None
    command = [program, *options, str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def _in_package(package: str, path: str) -> str | None:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = shutil.which(str(Path(folder, path)))
        if found:
            return found
    return None
