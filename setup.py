"""Builds the C++ and CUDA libraries of fastfreeze against the LibTorch stable ABI.

FASTFREEZE_BUILD_CPP and FASTFREEZE_BUILD_CUDA are "auto" (the default: built when a compiler is
there and, for CUDA, a device; what fails is left out with a warning, and the rest is installed),
"1" (built, or the installation fails) or "0" (left out).
TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", chooses the CUDA architectures; without it "auto"
builds for this machine's devices, and "1" for all that the toolkit knows. With SOURCE_DATE_EPOCH
two builds of the same sources by the same compilers and torch are equal, wherever they are made.

Neither library holds a Python symbol, so one wheel serves every Python, and every torch from 2.10
on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPP_SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))
CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
HEADERS = sorted(
    str(p.relative_to(ROOT)) for suffix in ("h", "cuh") for p in ROOT.glob(f"csrc/**/*.{suffix}")
)
CPU_LIBRARY, CUDA_LIBRARY = "fastfreeze.libfastfreeze_cpu", "fastfreeze.libfastfreeze_cuda"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10

# What a CUDA toolkit of each major version can build for; the last also as PTX for newer devices.
CUDA_ARCHITECTURES = {12: "7.5;8.0;8.6;8.9;9.0+PTX", 13: "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"}


class BuildError(RuntimeError):
    """A library that was asked for cannot be built."""


def switch(name: str) -> str:
    """The value of an environment switch: "0", "1" or "auto"."""
    value = os.environ.get(name, "auto").lower()
    if value not in ("0", "1", "auto"):
        raise BuildError(f"{name} must be 0, 1 or auto, got {value!r}")
    return value


def warn(text: str) -> None:
    """Tell of what is not as a user may expect it."""
    print(f"fastfreeze: warning: {text}", file=sys.stderr, flush=True)


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc")


def nvcc_major(nvcc: str) -> int:
    """Major version of the CUDA toolkit."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.", text)
    if found is None:
        raise RuntimeError(f"{nvcc} --version tells no release: {text!r}")
    return int(found.group(1))


def check_toolkit(nvcc: str) -> None:
    """Raise unless what nvcc builds can run beside this torch.

    The library holds the toolkit's CUDA runtime, which wants a driver of its major version or a
    later one; torch vouches for a driver of torch's.
    """
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is built without CUDA")
    major = nvcc_major(nvcc)
    if major > int(torch.version.cuda.split(".")[0]):
        raise RuntimeError(f"{nvcc} is of CUDA {major}, torch of CUDA {torch.version.cuda}")


def wanted_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST; with "auto" and none, the architectures of this machine's devices."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked or switch("FASTFREEZE_BUILD_CUDA") != "auto":
        return asked
    try:
        import torch

        devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # such as of a driver too old for this torch
        warn(f"CUDA's devices cannot be asked for what they are: {error}")
        return ""
    return ";".join(sorted({f"{major}.{minor}" for major, minor in devices}))


def gencode_flags(nvcc: str) -> list[str]:
    """nvcc's -gencode flags for what is wanted, or for all that the toolkit is known for."""
    known = CUDA_ARCHITECTURES.get(nvcc_major(nvcc), CUDA_ARCHITECTURES[max(CUDA_ARCHITECTURES)])
    flags = []
    for entry in re.split(r"[;\s]+", wanted_architectures() or known):
        match = re.fullmatch(r"(\d+)\.(\d+)(a?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected such as '9.0' or '9.0+PTX', got {entry!r}"
            )
        number = match.group(1) + match.group(2) + match.group(3)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def nvcc_flags(nvcc: str) -> list[str]:
    """What is compiled for, how small, and what makes two builds equal."""
    flags = ["--threads=0", *gencode_flags(nvcc)]
    if nvcc_major(nvcc) >= 13:  # a third of the size; drivers of this version can read it
        flags.append("--compress-mode=size")
    if reproducible():  # or else the compiler's process number is in the names of symbols
        flags += ["--frandom-seed=fastfreeze", "-Xlinker=--strip-all"]
    return flags


def reproducible() -> bool:
    """Whether two builds are to be equal: SOURCE_DATE_EPOCH (reproducible-builds.org) is set."""
    return "SOURCE_DATE_EPOCH" in os.environ


@contextlib.contextmanager
def nvcc_sources(root: Path = ROOT) -> Iterator[Path]:
    """The folder that csrc is in while nvcc runs, which names symbols by its sources' real path.

    For a reproducible build it is a copy whose path depends on nothing but what is in it.

    Raises:
        BuildError: that copy is there already.
    """
    if not reproducible():
        yield root
        return
    digest = hashlib.sha256()
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    folder = Path(tempfile.gettempdir()).resolve() / f"fastfreeze-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise BuildError(
            f"{folder} exists: the same sources are being built, or a build of them was killed; "
            "in that case remove it"
        ) from None
    try:
        shutil.copytree(root / "csrc", folder / "csrc")
        yield folder
    finally:
        shutil.rmtree(folder)


def torch_paths() -> tuple[Path, Path]:
    """The directories of torch's headers and of its libraries."""
    import torch

    base = Path(torch.__file__).parent
    return base / "include", base / "lib"


class BuildLibraries(build_ext):
    """Compiles plain shared libraries that fastfreeze loads itself: no Python module among them."""

    extensions: list[Extension]
    parallel: int | None

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or len(self.extensions)  # g++ beside nvcc

    def build_extensions(self) -> None:
        """All, side by side; then `extensions` are those that were built."""
        self.left_out: list[Extension] = []
        super().build_extensions()
        self.extensions = [ext for ext in self.extensions if ext not in self.left_out]
        if self.left_out:
            missing = ", ".join(ext.name for ext in self.left_out)
            built = ", ".join(ext.name for ext in self.extensions) or "no compiled library"
            warn(f"goes on without {missing}, with {built}")

    def run(self) -> None:
        """Nothing of an earlier build stays where a library is not built now."""
        tried = {ext.name for ext in self.extensions or []}
        for name in (CPU_LIBRARY, CUDA_LIBRARY):
            if name not in tried:
                self._remove(name, Path(self.build_lib))
                if self.inplace or self.editable_mode:
                    self._remove(name, ROOT)
        super().run()

    def copy_extensions_to_source(self) -> None:
        """For an editable install: what was built, and nothing older of what was left out."""
        for ext in self.left_out:
            self._remove(ext.name, ROOT)
        super().copy_extensions_to_source()

    def _remove(self, name: str, folder: Path) -> None:
        (folder / self.get_ext_filename(name)).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.sources[0].endswith(".cu")
        name = "FASTFREEZE_BUILD_CUDA" if cuda else "FASTFREEZE_BUILD_CPP"
        Path(self._target(ext)).unlink(missing_ok=True)  # of an earlier build
        try:
            (self._build_cuda if cuda else self._build_cpp)(ext)
        except Exception as error:
            if switch(name) == "1" or isinstance(error, BuildError):
                raise
            warn(
                f"{ext.name} was not built and is left out ({name}=1 makes this an error): {error}"
            )
            self.left_out.append(ext)

    def _build_cpp(self, ext: Extension) -> None:
        include, lib = torch_paths()
        flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno"]
        flags += ["-fvisibility=hidden", "-g0"]
        flags.append(f"-fmacro-prefix-map={include}=torch/include")
        objects = self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            include_dirs=["csrc", str(include)],
            extra_postargs=[*flags, STABLE_ABI],
            depends=ext.depends,
        )
        self.compiler.link_shared_object(
            objects,
            self._target(ext),
            libraries=["torch_cpu", "torch"],
            library_dirs=[str(lib)],
            target_lang="c++",
        )

    def _build_cuda(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise FileNotFoundError("no nvcc in CUDA_HOME or on the PATH")
        check_toolkit(nvcc)
        include, lib = torch_paths()
        toolkit_lib = Path(nvcc).resolve().parent.parent / "lib"  # nvcc knows of lib64 alone
        with nvcc_sources() as folder:
            maps = f"-fmacro-prefix-map={include}=torch/include,-fmacro-prefix-map={folder}/="
            command = [nvcc, "-shared", "-std=c++20", "-O3", "--cudart=static", "-DUSE_CUDA"]
            command += [STABLE_ABI, *nvcc_flags(nvcc)]
            command += [f"-Xcompiler=-fPIC,-fvisibility=hidden,{maps}"]
            command += [f"-I{folder / 'csrc'}", f"-I{include}"]
            command += [str(folder / source) for source in ext.sources]
            command += [f"-L{toolkit_lib}", f"-L{lib}", "-ltorch_cpu", "-ltorch_cuda", "-ltorch"]
            self.spawn([*command, "-o", self._target(ext)])

    def _target(self, ext: Extension) -> str:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        return str(target)


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: compiled, but for no one Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def extensions() -> list[Extension]:
    """The libraries to try, as the switches say."""
    found = []
    if switch("FASTFREEZE_BUILD_CPP") != "0":
        found.append(Extension(CPU_LIBRARY, CPP_SOURCES, depends=HEADERS))
    cuda = switch("FASTFREEZE_BUILD_CUDA")
    possible = cuda == "auto" and find_nvcc() is not None and wanted_architectures() != ""
    if cuda == "1" or possible:
        found.append(Extension(CUDA_LIBRARY, CUDA_SOURCES, depends=HEADERS))
    return found


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    )
