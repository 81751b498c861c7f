"""python -m benchmarks.gpu: what a GPU has to say, in the minutes that one is lent.

Works offline and ends by itself. The results (results.json in the folder OUT) are written anew
about once a second, and each stage's whole output is beside them, so that whatever ends the script
leaves what was known by then. --plan tells what would run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.clock import output_of
from benchmarks.gpu_tests import DRY_SELECTIONS, SELECTIONS, collected, run_tests
from benchmarks.jobs import Job, Running, run_jobs, while_it_gets_on
from benchmarks.results import read_json, write_json

ROOT = Path(__file__).parent.parent
MINUTES = 9.25  # in all: with the start of Python and torch less than ten
TAIL = 10  # seconds in which a stage may end what it has begun, and this script itself
SOURCES = ("csrc", "fastfreeze", "setup.py", "pyproject.toml", "README.md", "LICENSE")


class Report:
    """The results, and their file."""

    def __init__(self, path: Path, results: dict) -> None:
        self.path, self.results = path, results
        self.save()

    def save(self) -> None:
        write_json(self.path, self.results)

    def set(self, stage: str, found: dict) -> None:
        self.results["stages"].setdefault(stage, {}).update(found)
        self.save()


@dataclass
class Run:
    """What stages need.

    Attributes:
        device: "cuda" or "cpu": a dry run.
        report: of the results.
        scratch: a folder that goes with the run.
        folder: where tests and benchmarks are run.
        environment: with the path to the package.
        wheel: to install, or None.
        build: whether the package is installed first; else the sources are used as they are.
        background: the build that goes on beside the stages.
    """

    device: str
    report: Report
    scratch: Path
    folder: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)
    wheel: Path | None = None
    build: bool = True
    background: Running | None = None

    def log(self, stage: str) -> Path:
        """Few files travel more easily: stages of a kind share one."""
        return self.report.path.parent / f"{stage.partition('-')[0]}.log"

    def tell(self, stage: str, found: dict) -> None:
        """Note what is known of a stage, and of the build in the background."""
        if self.background is not None and self.background.ended():
            self.end_background()
        self.report.set(stage, found)

    def end_background(self) -> None:
        if self.background is not None:
            result, self.background = self.background.result(), None
            self.report.set("build from source", result)

    def python(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", *arguments]

    def module(self, stage: str, seconds: float, *arguments: str) -> dict:
        """One of our modules, which writes its results to a file, as a stage.

        If it dies of a case, a new process goes on from what is in the file.
        """
        part = self.scratch / f"{stage}.json"
        command = self.python(*arguments, "--device", self.device, "--out", str(part))
        environment = {**self.environment, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        gets_on = while_it_gets_on(lambda: len(read_json(part).get("cases", {})))
        job = Job(stage, command, environment, self.folder, gets_on)
        tick = lambda: self.tell(stage, read_json(part))  # noqa: E731
        done = run_jobs([job], seconds, self.log(stage), tick)
        return {**done["jobs"][stage], **read_json(part)}


def install(run: Run, seconds: float) -> dict:
    """The wheel, or the sources built for this device, into a folder of its own."""
    if not run.build:
        return {"status": "left out"}
    site = run.scratch / "site"
    environment = {} if run.wheel is not None else build_environment(run.device)
    source = str(run.wheel) if run.wheel is not None else str(copy_of_sources(run.scratch))
    job = Job("install", pip_command(site, source), environment, run.scratch)
    done = run_jobs([job], seconds, run.log("build"))
    run.folder = outside_the_sources(run.scratch / "tree")
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    run.environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return done["jobs"]["install"]


def pip_command(site: Path, source: str) -> list[str]:
    """pip's, which neither asks a registry nor touches what is installed."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    return [sys.executable, "-m", "pip", "install", *options, source]


def build_environment(device: str) -> dict[str, str]:
    """Both libraries or a failure; for the device that is there."""
    if device != "cuda":
        return {"FASTFREEZE_BUILD_CPP": "1", "FASTFREEZE_BUILD_CUDA": "0"}
    major, minor = torch.cuda.get_device_capability()
    return {
        "FASTFREEZE_BUILD_CPP": "1",
        "FASTFREEZE_BUILD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}+PTX",
    }


def copy_of_sources(scratch: Path) -> Path:
    """What the package is built from, without what was built before."""
    folder = scratch / "sources"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def outside_the_sources(folder: Path) -> Path:
    """A folder from which the installed package is imported, not the sources beside it."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("tests", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def smoke(run: Run, seconds: float) -> dict:
    """A few results of each backend; then the build from source begins, if it is not done yet."""
    found = run.module("smoke", seconds, "benchmarks.gpu_smoke")
    if run.build and run.wheel is not None:
        command = pip_command(run.scratch / "built", str(copy_of_sources(run.scratch)))
        environment = build_environment(run.device)
        job = Job("build from source", ["nice", *command], environment, run.scratch)
        run.background = Running(job, run.log("build"))
    return found


def tests(stage: str) -> Stage:
    def run_stage(run: Run, seconds: float) -> dict:
        selection = (SELECTIONS if run.device == "cuda" else DRY_SELECTIONS)[stage]
        scratch, log = run.scratch / stage, run.log(stage)
        tell = lambda found: run.tell(stage, found)  # noqa: E731
        return run_tests(selection, seconds, run.folder, run.environment, log, scratch, tell)

    return run_stage


def bench(stage: str, part: str) -> Stage:
    def run_stage(run: Run, seconds: float) -> dict:
        limit = str(max(1.0, seconds - TAIL))
        return run.module(stage, seconds, "benchmarks.gpu_bench", part, "--seconds", limit)

    return run_stage


def tools(run: Run, seconds: float) -> dict:
    """What profilers and checkers say, where there are any; those that are not there are named."""
    device = ["--device", run.device, "--out", str(run.scratch / "tools.json")]
    profiled = run.python("benchmarks.gpu_bench", "profiled", *device)
    checked = run.python("benchmarks.gpu_smoke", "--only", "^cuda: (s|adamw)", *device)
    sections = ["SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy"]
    commands = {
        "ncu": [
            *("--clock-control", "none"),
            *("--kernel-id", "::regex:step_kernel|softmax_.*_kernel:2"),  # the second of each
            *(part for name in sections for part in ("--section", name)),
            *profiled,
        ],
        "compute-sanitizer": [
            *("--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20", *checked),
        ],
    }
    # Each tensor in an allocation of its own, or writes behind one would hit another unseen.
    environment = {**run.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    jobs = [
        Job(name, [str(tool_path(name)), *command], environment, run.folder)
        for name, command in commands.items()
        if tool_path(name) is not None
    ]
    found = run_jobs(jobs, seconds, run.log("tools"), lambda: run.tell("tools", {}))
    found["jobs"] |= {name: {"status": "not there"} for name in commands if not tool_path(name)}
    return found


def tool_path(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(cuda_home() / "bin"))


def cuda_home() -> Path:
    return Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")


Stage = Callable[[Run, float], dict]
# Name, seconds, what runs. A stage may take what those before it have left over; after the smoke,
# a failed stage does not keep the next from running.
PLAN: list[tuple[str, float, Stage]] = [
    ("build", 120, install),
    ("smoke", 45, smoke),
    ("tests-cuda", 65, tests("tests-cuda")),
    ("kernels", 80, bench("kernels", "kernels")),
    ("steps", 110, bench("steps", "steps")),
    ("tests-triton", 80, tests("tests-triton")),
    ("tools", 40, tools),
    ("kernels-rest", 30, bench("kernels-rest", "rest")),
]


def ends(plan: Sequence[tuple[str, float, Stage]], seconds: float) -> dict[str, float]:
    """When each stage has to be over, in seconds from the start: its share of the whole."""
    total, end, found = sum(limit for _, limit, _ in plan), 0.0, {}
    for name, limit, _ in plan:
        end += limit
        found[name] = end / total * seconds
    return found


def run_plan(run: Run, plan: Sequence[tuple[str, float, Stage]], seconds: float) -> None:
    """All stages in turn."""
    start = time.monotonic()
    for name, end in ends(plan, seconds - TAIL).items():
        began = time.monotonic() - start
        facts = {"began_s": round(began, 1), "limit_s": round(end - began, 1)}
        run.report.set(name, {"status": "running", **facts})
        try:
            found = dict(plan_stage(plan, name)(run, end - began))
        except Exception as error:
            found = {"status": "failed", "reason": repr(error)}
        found["seconds"] = round(time.monotonic() - start - began, 1)
        run.report.set(name, found)
        print(f"{name}: {found['status']}, {found['seconds']} s", flush=True)
        if name in ("build", "smoke") and found["status"] not in ("ok", "left out"):
            run.report.results["status"] = f"stopped: the {name} {found['status']}"
            break
    else:
        run.report.results["status"] = "complete"
    run.end_background()
    run.report.save()


def plan_stage(plan: Sequence[tuple[str, float, Stage]], name: str) -> Stage:
    return next(stage for other, _, stage in plan if other == name)


def machine(device: str) -> dict:
    """What the numbers were measured on."""
    on_gpu = device == "cuda"
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
        "driver": output_of(driver),
        "nvcc": (output_of([tool_path("nvcc") or "nvcc", "--version"]) or "").splitlines()[-1:],
        "tools": {name: tool_path(name) for name in ("ncu", "compute-sanitizer")},
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
    return output_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"])


def failures(results: dict) -> list[str]:
    """What went wrong, a line each."""
    found = []
    for name, stage in results["stages"].items():
        if stage.get("status") not in ("ok", "left out"):
            found.append(f"{name}: {stage.get('status')} {stage.get('reason', '')}".rstrip())
        for check, state in stage.get("checks", {}).items():
            if state["status"] != "ok":
                found.append(f"  {check}: {state['reason']}")
        found += [f"  {test}" for test in stage.get("failures", {})]
        found += [f"  {test}: has not ended" for test in stage.get("not_ended", [])]
        for case, state in stage.get("cases", {}).items():
            if state["status"] != "measured":
                reason = state.get("reason", state.get("left_out", ""))
                found.append(f"  {case}: {state['status']} {reason}".rstrip())
    return found


def print_plan(minutes: float) -> None:
    """Stages, when they have to be over, and the tests that would run on a GPU."""
    over = ends(PLAN, minutes * 60 - TAIL)
    with tempfile.TemporaryDirectory() as scratch:
        for name, end in over.items():
            print(f"{name}: until {end:.0f} s")
            if name in SELECTIONS:
                folder = Path(scratch, name)
                folder.mkdir()
                counts = collected(SELECTIONS[name], ROOT, folder)
                for file, count in counts.items():
                    print(f"  {file}: {count} tests, {SELECTIONS[name].files[file]} processes")
                print(f"  {sum(counts.values())} tests")


def parser() -> argparse.ArgumentParser:
    names = [name for name, _, _ in PLAN]
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    arguments.add_argument("--wheel", type=Path, help="install this instead of building")
    arguments.add_argument("--no-build", action="store_true", help="use the sources as they are")
    arguments.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE")
    arguments.add_argument("--out", type=Path, default=Path("gpu-results"), help="a folder")
    arguments.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    arguments.add_argument("--plan", action="store_true", help="run nothing: tell what would run")
    arguments.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a small dry run"
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.plan:
        print_plan(arguments.minutes)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser().error("torch sees no CUDA device; --device cpu makes a small dry run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))  # by way of the finally's
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = {"build", *arguments.stages}
    plan = [row for row in PLAN if row[0] in chosen]
    facts = {"status": "running", "machine": machine(arguments.device), "commit": commit()}
    report = Report(out / "results.json", {**facts, "stages": {}})
    wheel = None if arguments.wheel is None else arguments.wheel.resolve()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        run = Run(arguments.device, report, Path(scratch), wheel=wheel)
        run.build = not arguments.no_build
        try:
            run_plan(run, plan, arguments.minutes * 60)
        finally:
            run.end_background()
            if report.results["status"] == "running":
                report.results["status"] = "cut off"
                report.save()
    bad = failures(report.results)
    print(*bad, f"{report.results['status']}; results: {out}", sep="\n")
    return 0 if not bad and report.results["status"] == "complete" else 1


if __name__ == "__main__":
    sys.exit(main())
