"""python -m benchmarks.gpu: build, test and measure on a machine with a GPU; one file of results.

Works offline and within a time limit. The results file is written anew after each step, so that
whatever cuts the script off leaves what was known by then.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.outcomes import summary
from benchmarks.results import read_json, write_json

ROOT = Path(__file__).parent.parent
MINUTES = 9.5  # in all
# Seconds a stage may take; what one leaves over is the next one's.
BUILD_LIMIT, TEST_LIMIT = 200, 260
BENCHMARK_RESERVE = 90  # that the stages before leave to the benchmarks
TAIL = 4000  # characters of a stage's output that are kept


class Report:
    """The results, and their file."""

    def __init__(self, path: Path, results: dict) -> None:
        self.path, self.results = path, results
        self.save()

    def save(self) -> None:
        write_json(self.path, self.results)

    def set(self, key: str, value: object) -> None:
        self.results[key] = value
        self.save()


class Budget:
    """What is left of the time."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self._now())

    def stage(self, limit: float, reserve: float) -> float:
        """Seconds for a stage that may take ``limit`` and has to leave ``reserve``."""
        return max(0.0, min(limit, self.left() - reserve))


def run_stage(
    command: Sequence[str],
    seconds: float,
    folder: Path,
    environment: dict[str, str],
    tick: Callable[[], None] = lambda: None,
) -> dict:
    """Run a command in its own process group, at most so long; ``tick`` is called meanwhile."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = _wait(process, start + seconds, tick)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    tick()
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": seconds, "output": text[-TAIL:]}


def _wait(process: subprocess.Popen, deadline: float, tick: Callable[[], None]) -> str:
    while time.monotonic() < deadline:
        try:
            return "ok" if process.wait(timeout=1) == 0 else "failed"
        except subprocess.TimeoutExpired:
            tick()
    return "cut off"


def machine(device: str) -> dict:
    """What the numbers were measured on."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "nvcc": (_output([*_nvcc(), "--version"]) or "").splitlines()[-1:],
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
    }
    if importlib.util.find_spec("triton"):
        import triton

        facts["triton"] = triton.__version__
    return facts


def commit() -> str | None:
    """The commit, with "-dirty" behind if files differ from it; None without git."""
    return _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"])


def _nvcc() -> list[str]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return [str(Path(home, "bin/nvcc"))] if home else ["nvcc"]


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def build_command(wheel: Path | None) -> list[str]:
    """pip's, which neither asks a registry nor touches what is installed."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    if wheel is not None:
        return [*pip, "--no-index", "--force-reinstall", str(wheel.resolve())]
    return [*pip, "--no-index", "-e", "."]


def build_environment(device: str) -> dict[str, str]:
    """Both libraries or a failure; for the device that is there."""
    if device != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {
        "FASTFREEZE_BUILD_CPP": "1",
        "FASTFREEZE_BUILD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}+PTX",
    }


def test_command(processes: int) -> list[str]:
    """pytest over everything."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if processes > 1:
        command += ["-n", str(processes)]
    return [*command, "-p", "benchmarks.outcomes", "tests"]


def test_environment(processes: int, outcomes: Path) -> dict[str, str]:
    """The processes share the CPUs."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {"FASTFREEZE_OUTCOMES": str(outcomes), "OMP_NUM_THREADS": str(threads)}


def test_processes() -> int:
    """More than one where xdist is installed."""
    return min(8, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1


def benchmark_command(out: Path, device: str, seconds: float, rounds: int | None) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_bench", "--out", str(out)]
    command += ["--device", device, "--seconds", str(seconds)]
    return command if rounds is None else [*command, "--rounds", str(rounds)]


def outside_the_sources(scratch: Path) -> Path:
    """A folder from which the installed package is imported, not the sources beside it."""
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, scratch / name)
    shutil.copy(ROOT / "pyproject.toml", scratch)
    return scratch


def run(arguments: argparse.Namespace, scratch: Path) -> Report:
    """All stages; a failed one does not keep the next from running."""
    budget = Budget(arguments.minutes * 60)
    facts = {"status": "running", "machine": machine(arguments.device), "commit": commit()}
    report = Report(arguments.out, facts)
    installed = arguments.no_build or arguments.wheel is not None
    folder = outside_the_sources(scratch) if installed else ROOT
    if not arguments.no_build:
        seconds = budget.stage(BUILD_LIMIT, BENCHMARK_RESERVE)
        environment = build_environment(arguments.device)
        built = run_stage(build_command(arguments.wheel), seconds, ROOT, environment)
        report.set("build", {**built, "environment": environment})
    if not arguments.no_tests:
        outcomes = scratch / "outcomes.jsonl"
        processes = test_processes()
        environment = test_environment(processes, outcomes)
        tick = _saving(report, "tests", lambda: summary(outcomes))
        seconds = budget.stage(TEST_LIMIT, BENCHMARK_RESERVE)
        tested = run_stage(test_command(processes), seconds, folder, environment, tick)
        report.set("tests", {**tested, **summary(outcomes)})
    partial = scratch / "benchmarks.json"
    tick = _saving(report, "benchmarks", lambda: read_json(partial))
    seconds = max(0.0, budget.left() - 10)  # to end by itself
    command = benchmark_command(partial, arguments.device, seconds - 20, arguments.rounds)
    measured = run_stage(command, seconds, folder, {}, tick)
    report.set("benchmarks", {**measured, **read_json(partial)})
    report.set("status", "complete")
    return report


def _saving(report: Report, key: str, state: Callable[[], dict]) -> Callable[[], None]:
    return lambda: report.set(key, {"status": "running", **state()})


def failures(results: dict) -> list[str]:
    """What went wrong, a line each."""
    found = []
    for stage in ("build", "tests", "benchmarks"):
        status = results.get(stage, {}).get("status", "ok")
        if status != "ok":
            found.append(f"{stage}: {status}")
    for name, case in results.get("benchmarks", {}).get("cases", {}).items():
        if case["status"] != "measured":
            found.append(f"{name}: {case['status']}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--wheel", type=Path, help="install this instead of building")
    parser.add_argument("--no-build", action="store_true", help="use what is installed")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu-results.json"))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--rounds", type=int, help="measurements of each run")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a small dry run"
    )
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu makes a small dry run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))  # by way of the finally's
    with tempfile.TemporaryDirectory() as scratch:
        report = run(arguments, Path(scratch))
    bad = failures(report.results)
    print(*bad, f"results: {arguments.out}", sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
