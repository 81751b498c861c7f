"""Questions, their methods, and which runs answer them."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

# Each module holds a QUESTION.
MODULES = {
    "finetune-images": "benchmarks.worth.finetune_images",
    "finetune-text": "benchmarks.worth.finetune_text",
    "scratch": "benchmarks.worth.scratch",
    "ensembles": "benchmarks.worth.ensembles",
    "finetune-ensembles": "benchmarks.worth.finetune_ensembles",
}
WIDEST = 5  # learning rates in a grid


@dataclass(frozen=True)
class Run:
    """One run that is asked for."""

    task: str
    method: str
    epochs: int
    lr: float
    seed: int

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a record of the results is of this run."""
        return all(record[key] == value for key, value in asdict(self).items())


@dataclass(frozen=True)
class Method:
    """A way to learn.

    Attributes:
        make: what the question's ``run`` takes; of most, a training for a
            :class:`~benchmarks.training_rivals.Task`.
        lrs: the grid of its learning rates, rising; of three or more, it is widened while its best
            is at an edge.
        ours: whether it needs fastfreeze.
        by_hand: whether it freezes as one of ours does, in torch alone: no rival that sets the
            mark, but what shows how much of a saving is freezing's own.
        epochs: its budgets, where they are not the task's.
    """

    make: Callable[..., Any]
    lrs: tuple[float, ...]
    ours: bool = False
    by_hand: bool = False
    epochs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        title: for the page.
        budgets: rising epochs of each task.
        methods: by name.
        run: a run's record, given the folder of the data and whether to count MACs and to judge:
            "seconds"; and then "macs", "error" and "nll" of the test set, "validation_error" and
            "validation_nll", and what else there is to tell. It runs in a process of its own.
        fetch: brings the data into a folder, once.
        columns: further ones of the table: their titles, and what of a record they show.
    """

    title: str
    budgets: Mapping[str, tuple[int, ...]]
    methods: Mapping[str, Method]
    run: Callable[[Run, Path, bool], dict]
    fetch: Callable[[Path], None]
    columns: Mapping[str, str] = field(default_factory=dict)

    def epochs(self, task: str, method: str) -> tuple[int, ...]:
        return self.methods[method].epochs or self.budgets[task]


@dataclass(frozen=True)
class Part:
    """The tasks and methods of a question that are to run, with so many seeds."""

    question: Question
    seeds: int
    tasks: Sequence[str]
    methods: Sequence[str]

    def wanted(self, records: Sequence[dict]) -> Iterator[Run]:
        """The runs that the answer needs, as far as the learning rates are chosen.

        First all methods' grids, then seed by seed.
        """
        pairs = [(task, method) for task in self.tasks for method in self.methods]
        for pair in pairs:
            yield from self.grid(records, *pair)
        for seed in range(self.seeds):
            for pair in pairs:
                yield from self.chosen(records, *pair, seed)

    def once(self, records: Sequence[dict]) -> list[Run]:
        """Each method and budget with its learning rate, of seed 0, as far as that is chosen."""
        return [
            run
            for task in self.tasks
            for method in self.methods
            for run in self.chosen(records, task, method, seed=0)
        ]

    def grid(self, records: Sequence[dict], task: str, method: str) -> list[Run]:
        """Those that choose the learning rate: the method's, and further ones past a best edge."""
        epochs = self.question.epochs(task, method)
        middle = epochs[len(epochs) // 2]
        runs = [Run(task, method, middle, lr, 0) for lr in self.question.methods[method].lrs]
        while 3 <= len(runs) < WIDEST and (best := best_lr(records, runs)) is not None:
            low, high, ratio = runs[0], runs[-1], runs[1].lr / runs[0].lr
            if best == low.lr:
                runs.insert(0, replace(low, lr=low.lr / ratio))
            elif best == high.lr:
                runs.append(replace(high, lr=high.lr * ratio))
            else:
                break
        return runs

    def chosen(self, records: Sequence[dict], task: str, method: str, seed: int) -> list[Run]:
        """One for each budget, with the learning rate that was chosen; none before it is."""
        lr = best_lr(records, self.grid(records, task, method))
        if lr is None:
            return []
        return [Run(task, method, n, lr, seed) for n in self.question.epochs(task, method)]


def best_lr(records: Sequence[dict], grid: Sequence[Run]) -> float | None:
    """The learning rate of the lowest validation error, then NLL; None until all have run."""
    found = [next((r for r in records if run.is_of(r)), None) for run in grid]
    there = [record for record in found if record is not None]
    if len(there) < len(grid):
        return None
    best = min(there, key=lambda r: (r["validation_error"], r["validation_nll"]))
    return best["lr"]


def fetch(folder: Path, names: Sequence[str], how: str) -> None:
    """Bring files into a folder if one of these is missing.

    Args:
        how: a line, and then commands for a shell, with ``{folder}`` and ``{missing}``.
    """
    if all(next(folder.rglob(name), None) for name in names):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for line in how.format(folder=shlex.quote(str(folder)), missing="").splitlines()[1:]:
        command = line.strip().replace("pip ", f"{shlex.quote(sys.executable)} -m pip ", 1)
        subprocess.run(command, shell=True, check=True, cwd=folder)


def load(name: str) -> Question:
    """The question of that name."""
    return importlib.import_module(MODULES[name]).QUESTION
