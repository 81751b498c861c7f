"""Which tests ``python -m benchmarks.gpu`` runs on a GPU, and their processes.

Those of the kernels and of what else needs a GPU, file by file: all else a CPU can test. A file has
one process or more, so that a test that breaks its CUDA context takes no others along.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs import Job, run_jobs, while_it_gets_on
from benchmarks.outcomes import outcomes, summary


@dataclass(frozen=True)
class Selection:
    """Tests that run together.

    Attributes:
        keyword: of their names, as pytest's -k takes it.
        files: in tests/, with the number of processes for each, the longest first.
        share: one test of so many, for dry runs.
    """

    keyword: str
    files: dict[str, int]
    share: int = 1


SELECTIONS = {
    "tests-cuda": Selection(
        "cuda-cuda or (gpu and not triton-cuda) or cuda_graph",
        {
            "kernels/test_softmax.py": 3,
            "kernels/test_sgd.py": 2,
            "kernels/test_adam.py": 2,
            "kernels/test_steps_device.py": 1,
            "kernels/test_softmax_arguments.py": 1,
            "optim/test_optim.py": 1,
            "optim/test_optim_edits.py": 1,
            "ensemble/test_ways.py": 1,
            "snapshots/test_snapshots.py": 1,
            "trimming/test_devices.py": 1,
            "trimming/test_fold.py": 1,
            "cache/test_cache.py": 1,
            "kernels/test_affine.py": 1,
            "trimming/test_trim.py": 1,
            "trimming/test_compiled.py": 1,
            "kernels/test_winograd.py": 1,
        },
    ),
    "tests-triton": Selection(
        "triton-cuda and not groups",
        {
            "kernels/test_softmax.py": 6,
            "kernels/test_softmax_triton.py": 2,
            "kernels/test_sgd.py": 2,
            "kernels/test_adam.py": 2,
            "kernels/test_steps_device.py": 1,
            "kernels/test_softmax_arguments.py": 1,
            "optim/test_optim.py": 1,
            "optim/test_optim_edits.py": 1,
        },
    ),
}
# Stand-ins, so that the machinery runs.
DRY_SELECTIONS = {
    "tests-cuda": Selection(
        "cpu-cpu", {"kernels/test_sgd.py": 2, "kernels/test_softmax_arguments.py": 1}, share=12
    ),
    "tests-triton": Selection("cpu-cpu", {"optim/test_optim.py": 1}, share=12),
}


def jobs_of(
    selection: Selection, folder: Path, environment: dict[str, str], scratch: Path
) -> dict[Path, Job]:
    """pytest's processes, and the files of their outcomes."""
    found = {}
    for file, processes in selection.files.items():
        for i in range(processes):
            name = f"{file} {i + 1}/{processes}" if processes > 1 else file
            lines = scratch / f"{name.replace(' ', '-').replace('/', '-')}.jsonl"
            own = {
                **environment,
                "FASTFREEZE_OUTCOMES": str(lines),
                "FASTFREEZE_SHARE": f"{i}/{processes * selection.share}",
                "OMP_NUM_THREADS": "1",
                "PYTHONFAULTHANDLER": "1",
            }
            command = pytest_command(selection.keyword, [f"tests/{file}"])
            found[lines] = Job(name, command, own, folder, again_where_tests_are_left(lines))
    return found


def pytest_command(keyword: str, files: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--continue-on-collection-errors", "-p", "benchmarks.outcomes"]
    return [*command, "-k", keyword, *files]


def again_where_tests_are_left(lines: Path) -> Callable[[int], bool]:
    """After a crash or a broken context: while that leaves tests, and each run begins some."""

    def counts() -> Counter[str]:
        return Counter(line["outcome"] for line in outcomes([lines]).values())

    gets_on = while_it_gets_on(lambda: counts().total() - counts()["collected"])
    # Status 1: tests have failed, and that is all.
    return lambda status: status != 1 and counts()["collected"] > 0 and gets_on(status)


def run_tests(
    selection: Selection,
    seconds: float,
    folder: Path,
    environment: dict[str, str],
    log: Path,
    scratch: Path,
    tell: Callable[[dict], None],
) -> dict:
    """All processes of a selection; ``tell`` is given what is known, about once a second."""
    scratch.mkdir()
    jobs = jobs_of(selection, folder, environment, scratch)
    at_once = max(1, (os.cpu_count() or 1) - 2)
    lines = list(jobs)
    done = run_jobs(
        list(jobs.values()), seconds, log, lambda: tell(summary(lines)), at_once=at_once
    )
    return {**done, **summary(lines)}


def collected(selection: Selection, folder: Path, scratch: Path) -> dict[str, int]:
    """How many tests of each file would run if there were a GPU, in their order."""
    lines, log = scratch / "collected.jsonl", scratch / "collected.log"
    command = pytest_command(selection.keyword, [f"tests/{file}" for file in selection.files])
    command += ["-p", "benchmarks.as_on_gpu", "--collect-only"]
    job = Job("collection", command, {"FASTFREEZE_OUTCOMES": str(lines)}, folder)
    done = run_jobs([job], 600, log)
    if done["status"] != "ok":
        raise RuntimeError(log.read_text())
    counts = Counter(test.split("::")[0].removeprefix("tests/") for test in outcomes([lines]))
    return {file: counts[file] for file in selection.files}
