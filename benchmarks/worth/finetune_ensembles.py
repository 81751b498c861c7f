"""Question: from pretrained weights, what does an ensemble of five cost above one frozen half?

All methods have the same epochs to spend in all, as in :mod:`benchmarks.worth.ensembles`. Ours
freeze the first half of the compute, which is then common to the members: what it gives is kept for
all of them, and a prediction runs it once.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import fastfreeze
from benchmarks.ensemble_cases import State
from benchmarks.training_rivals import Training
from benchmarks.worth import finetune_images as images
from benchmarks.worth.ensembles import (
    COLUMNS,
    MEMBERS,
    Trial,
    cycles,
    independent,
    record,
    single,
    snapshots,
)
from benchmarks.worth.finetune_images import RATES
from benchmarks.worth.finetuning import FineTask, by_hand, half_by_hand, keep, ours, prefix
from benchmarks.worth.question import Method, Question, Run

half_frozen = partial(ours, schedule=prefix(0.5))


def branches(trial: Trial) -> list[State]:
    """Five networks, a fifth of the epochs each, on one frozen half that runs once an image."""
    with tempfile.TemporaryDirectory() as directory:
        return independent(trial, partial(half_frozen, directory=Path(directory)))


def frozen_snapshots(trial: Trial) -> list[State]:
    """One training in five cycles, its first half frozen from the start and kept."""

    def in_cycles(task: FineTask, length: int) -> Training:
        model = task.build()
        first_half = fastfreeze.Frozen(task.total_steps, until=0.5)
        plan = fastfreeze.split(model, task.arguments(task.batch(0)[0][:2]), schedule=first_half)
        for layer in plan.layers[: plan.schedule.until]:
            for _, parameter in layer.parameters:
                parameter.requires_grad_(False)
        schedule = fastfreeze.SnapshotCycles(task.total_steps, num_cycles=MEMBERS)
        trains = [p for p in model.parameters() if p.requires_grad]
        optimizer = task.ours(trains, task.lr, schedule=schedule)
        network = fastfreeze.trim(model)
        training = Training(model, task.calls(network), optimizer, layout=task.layout)
        keep(training, task, network)
        return training

    return cycles(trial, in_cycles)


METHODS = {
    "snapshots": Method(partial(snapshots, make=by_hand), RATES),
    "independent": Method(partial(independent, make=by_hand), RATES),
    "one network": Method(partial(single, make=by_hand), RATES),
    "independent, half frozen by hand": Method(
        partial(independent, make=half_by_hand), RATES, by_hand=True
    ),
    "branches above a kept half": Method(branches, RATES, ours=True),
    "snapshots above a kept half": Method(frozen_snapshots, RATES, ours=True),
    "one network, half frozen, kept": Method(partial(single, make=half_frozen), RATES, ours=True),
}


def run(asked: Run, folder: Path, counted: bool) -> dict:
    def task_of(epochs: int, seed: int) -> FineTask:
        return images.task_of(folder, asked.task, epochs, seed, asked.lr)

    trial = Trial(task_of, asked, counted)
    return record(trial, METHODS[asked.method], images.sets(folder, asked.task))


QUESTION = Question(
    "Ensembles of five: fine-tuning MobileNetV2 on images",
    {"512 images": (10, 20, 40)},
    METHODS,
    run,
    images.QUESTION.fetch,
    COLUMNS,
)
