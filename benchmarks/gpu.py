"""python -m benchmarks.gpu: what a GPU has to say, in the minutes that one is lent.

Works offline and ends by itself. The results (results.json in the folder OUT) are written anew
about once a second, and each stage's whole output is beside them, so that whatever ends the script
leaves what was known by then. --plan tells what would run.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks.case import refused
from benchmarks.clock import machine
from benchmarks.jobs import run_job
from benchmarks.outcomes import summary
from benchmarks.results import read_json, write_json

ROOT = Path(__file__).parent.parent
MINUTES = 9.25  # in all: with the start of Python and torch less than ten
TAIL = 10  # seconds in which this script ends what it has begun
SOURCES = ("csrc", "fastfreeze", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TESTS = {  # keywords of names, as pytest's -k takes them
    "tests-cuda": "cuda-cuda or (gpu and not triton-cuda) or cuda_graph",
    "tests-triton": "triton-cuda",
}
OF_A_GPU = re.compile(  # what a file says that has tests for one
    r"\bHAS_GPU\b|\bneeds_gpu\b|\bON_A_GPU\b|\b(every|rows_by|backend_and)_device\b"
    r"|\bkernels\(\)|\bkernel\(\"(cuda|triton)\"|cuda\.is_available"
)
SMALL = ("*-tiny*", "*-2-33-17")
# The most telling first, since time may run out.
KERNELS = (
    *("sgd-resnet110-per-layer", "sgd-resnet110-per-layer-graph", "sgd-resnet50"),
    *("adamw-resnet110-per-layer", "softmax-6-4096-1000", "statistics-6-4096-1000"),
    *("sgd-resnet110", "softmax-5-256-10", "statistics-5-1024-100", "adamw-resnet50"),
)
REST = (
    *("adamw-resnet110-*graph", "sgd-resnet50-bf16", "sgd-vit_b_16", "*-10-64-50257"),
    "ensemble-*",
)


@dataclass
class Plan:
    """A run, and what its stages need."""

    device: str  # "cuda" or "cpu": a dry run, of small cases
    out: Path  # the folder of the results
    scratch: Path  # a folder that goes with the run
    source: Path | None = None  # what is installed; None: the package is used as it is
    folder: Path = ROOT  # where tests and benchmarks run
    environment: dict[str, str] = field(default_factory=dict)  # with the path to the installed
    results: dict = field(default_factory=dict)  # until now

    def job(
        self,
        stage: str,
        command: Sequence[str],
        seconds: float,
        known: Callable[[], dict] = dict,
        **options: object,
    ) -> dict:
        """Run a command of a stage; what is ``known`` of it is written as it goes."""

        def tick() -> None:
            self.results["stages"][stage].update(known())
            self.save()

        # Few files travel more easily: stages of a kind share one.
        log = self.out / f"{stage.partition('-')[0]}.log"
        ours = {**self.environment, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        options = {"folder": self.folder, "environment": ours, "tick": tick, **options}
        return {**run_job(command, seconds, log, **options), **known()}

    def save(self) -> None:
        write_json(self.out / "results.json", self.results)


Stage = Callable[[Plan, str, float], dict]
Stages = Mapping[str, tuple[float, Stage]]


def install(plan: Plan, stage: str, seconds: float) -> dict:
    """The wheel, or the sources built for this device, into a folder of its own."""
    if plan.source is None:
        return {"status": "left out"}
    site, source = plan.scratch / "site", plan.source
    if source == ROOT:
        source = copied(SOURCES, plan.scratch / "sources")
    # pip neither asks a registry nor touches what is installed.
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, str(source)]
    # Both libraries or a failure; for the device that is there.
    on_gpu = plan.device == "cuda"
    environment = {"FASTFREEZE_BUILD_CPP": "1", "FASTFREEZE_BUILD_CUDA": str(int(on_gpu))}
    if on_gpu:
        major, minor = torch.cuda.get_device_capability()
        environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}+PTX"
    found = plan.job(stage, command, seconds, folder=plan.scratch, environment=environment)
    # From here the installed package is imported, not the sources beside it.
    plan.folder = copied(("tests", "benchmarks", "csrc", "pyproject.toml"), plan.scratch / "tree")
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    plan.environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return found


def copied(names: Sequence[str], folder: Path) -> Path:
    """Copies of files and folders of the sources, without what was built before."""
    folder.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def bench(plan: Plan, stage: str, seconds: float, *, cases: Sequence[str], rounds: int) -> dict:
    """Cases; if one of them ends the process, a new one goes on behind it."""
    out = plan.scratch / f"{stage}.json"
    if plan.device == "cpu":
        cases, rounds = SMALL, min(rounds, 2)
    command = [sys.executable, "-m", "benchmarks", *cases, "--device", plan.device, "--go-on"]
    command += ["--out", str(out), "--rounds", str(rounds), "--seconds", "3"]

    def done() -> int:
        return len(read_json(out).get("results", {}))

    return plan.job(stage, command, seconds, partial(read_json, out), done=done)


def tests(plan: Plan, stage: str, seconds: float) -> dict:
    """Tests that need a GPU, in several processes; one that dies of a test is replaced."""
    lines = plan.scratch / f"{stage}.jsonl"
    files, keyword = files_of_a_gpu(), TESTS[stage]
    if plan.device == "cpu":  # a stand-in
        files, keyword = ["tests/kernels/test_softmax.py"], "cpu-cpu"
    command = pytest_command(files, keyword)
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, (os.cpu_count() or 1) - 2))]
    environment = {**plan.environment, "FASTFREEZE_OUTCOMES": str(lines), "OMP_NUM_THREADS": "1"}
    return plan.job(stage, command, seconds, partial(summary, lines), environment=environment)


def files_of_a_gpu() -> list[str]:
    """Those with tests that run on a GPU: all else a CPU can test."""
    found = sorted((ROOT / "tests").glob("*/test_*.py"))
    others = [p for p in found if p.parent.name != "benchmarks" and OF_A_GPU.search(p.read_text())]
    return [str(p.relative_to(ROOT)) for p in others]


def pytest_command(files: Sequence[str], keyword: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--continue-on-collection-errors", "-p", "benchmarks.outcomes"]
    return [*command, "-k", keyword, *files]


# By name: seconds, what runs. A stage may take what those before it have left over; after the
# smoke, a failed stage does not keep the next from running.
STAGES: Stages = {
    "build": (120, install),
    "smoke": (45, partial(bench, cases=SMALL, rounds=0)),
    "tests-cuda": (65, tests),
    "kernels": (80, partial(bench, cases=KERNELS, rounds=41)),
    "steps": (110, partial(bench, cases=("trim-*", "kept-*"), rounds=21)),
    "tests-triton": (80, tests),
    "kernels-rest": (30, partial(bench, cases=REST, rounds=41)),
}


def ends(stages: Stages, seconds: float) -> dict[str, float]:
    """When each stage has to be over, in seconds from the start: its share of the whole."""
    limits = list(itertools.accumulate(limit for limit, _ in stages.values()))
    return {name: end / limits[-1] * seconds for name, end in zip(stages, limits, strict=True)}


def run_stages(plan: Plan, stages: Stages, seconds: float) -> None:
    """All stages in turn."""
    start, over = time.monotonic(), ends(stages, seconds - TAIL)
    status = "complete"
    for name, (_, stage) in stages.items():
        began = time.monotonic() - start
        found = {"status": "running", "began_s": round(began, 1)}
        plan.results["stages"][name] = found
        plan.save()
        try:
            found |= stage(plan, name, over[name] - began)
        except Exception as error:
            found |= {"status": "failed", "reason": repr(error)}
        found["seconds"] = round(time.monotonic() - start - began, 1)
        plan.save()
        print(f"{name}: {found['status']}, {found['seconds']} s", flush=True)
        if name in ("build", "smoke") and found["status"] not in ("ok", "left out"):
            status = f"stopped: the {name} {found['status']}"
            break
    plan.results["status"] = status
    plan.save()


def failures(results: dict) -> list[str]:
    """What went wrong, a line each."""
    found = []
    for name, stage in results["stages"].items():
        if stage["status"] not in ("ok", "left out"):
            found.append(f"{name}: {stage['status']} {stage.get('reason', '')}".rstrip())
        found += [f"  {test}" for test in stage.get("failures", {})]
        found += [f"  {test}: has not ended" for test in stage.get("not_ended", [])]
        for case, entry in stage.get("results", {}).items():
            if refused(entry["left_out"]):
                found.append(f"  {case}: {entry['left_out']}")
    return found


def print_plan(minutes: float) -> None:
    """When stages have to be over, and the tests that would run on a GPU."""
    for name, end in ends(STAGES, minutes * 60 - TAIL).items():
        print(f"{name}: until {end:.0f} s")
        if name in TESTS:
            command = pytest_command(files_of_a_gpu(), TESTS[name])
            command += ["-p", "benchmarks.as_on_gpu", "--collect-only"]
            environment = {**os.environ, "FASTFREEZE_OUTCOMES": os.devnull}
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
            print(f"  {done.stdout.splitlines()[-1]}")


def parser() -> argparse.ArgumentParser:
    names = list(STAGES)
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    made.add_argument("--wheel", type=Path, help="install this instead of building")
    made.add_argument("--no-build", action="store_true", help="use the sources as they are")
    made.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE")
    made.add_argument("--out", type=Path, default=Path("gpu-results"), help="a folder")
    made.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    made.add_argument("--plan", action="store_true", help="run nothing: tell what would run")
    about = "cpu: a small dry run"
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=about)
    return made


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
    stages = {name: stage for name, stage in STAGES.items() if name in arguments.stages}
    stages = {"build": STAGES["build"], **stages}
    source = None if arguments.no_build else (arguments.wheel or ROOT).resolve()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        plan = Plan(arguments.device, out, Path(scratch), source)
        facts = machine(arguments.device)
        plan.results = {"status": "cut off", "machine": facts, "stages": {}}
        run_stages(plan, stages, arguments.minutes * 60)
    bad = failures(plan.results)
    print(*bad, f"{plan.results['status']}; results: {out}", sep="\n")
    return 0 if not bad and plan.results["status"] == "complete" else 1


if __name__ == "__main__":
    sys.exit(main())
