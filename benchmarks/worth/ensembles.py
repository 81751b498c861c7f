"""Question: does freezing give an ensemble of five as good at a lower cost?

All methods have the same epochs to spend in all; what they cost then differs by what is frozen.
Each record tells the calibration, too, and what a prediction of 64 images takes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import fastfreeze
from benchmarks.ensemble_cases import Predict, State, loop_of
from benchmarks.training_rivals import Task, Training, stepping
from benchmarks.worth import fashion
from benchmarks.worth.question import Method, Question, Run
from benchmarks.worth.scratch import RATES, following, torch_alone
from benchmarks.worth.training import Sets, trained
from fastfreeze.ensemble import prediction_scores

TRAIN, MEMBERS = 6_000, 5
BUDGETS = (10, 20, 30)
PREDICTED, ROUNDS = 64, 10


@dataclass
class Trial:
    """Trainings of one run, whose costs add up.

    Attributes:
        task_of: what is learned, of epochs and a seed.
        run: which one is asked for.
        counted: whether MACs are counted.
        cost: until now.
    """

    task_of: Callable[[int, int], Task]
    run: Run
    counted: bool
    cost: dict = field(default_factory=lambda: {"seconds": 0.0, "macs": 0})

    def learn(self, make: Callable[[Any], Training], epochs: int, part: int = 0) -> nn.Module:
        """Train for so many epochs, in an order and from weights of the ``part``'s own."""
        task = self.task_of(epochs, MEMBERS * self.run.seed + part)
        model, record = trained(Method(make, ()), task, self.counted)
        for key in self.cost:
            self.cost[key] += record[key] or 0
        return model


def state_of(model: nn.Module) -> State:
    return copy.deepcopy(model.state_dict())


def single(trial: Trial, make: Callable[[Any], Training]) -> list[State]:
    """One network for all epochs."""
    return [state_of(trial.learn(make, trial.run.epochs))]


def independent(trial: Trial, make: Callable[[Any], Training]) -> list[State]:
    """Five networks, a fifth of the epochs each."""
    epochs = trial.run.epochs // MEMBERS
    return [state_of(trial.learn(make, epochs, part)) for part in range(MEMBERS)]


def cycles(trial: Trial, make: Callable[[Any, int], Training]) -> list[State]:
    """What a training in five cycles, given their length in steps, has at each one's end."""
    states: list[State] = []

    def training(task: Any) -> Training:
        length = task.total_steps // MEMBERS
        found = make(task, length)
        anneal = found.after_step

        def after_step(taken: int) -> None:
            anneal(taken)
            if taken % length == 0:
                states.append(state_of(found.model))

        found.after_step = after_step
        return found

    trial.learn(training, trial.run.epochs)
    return states


def snapshots(trial: Trial, make: Callable[[Any], Training]) -> list[State]:
    """Snapshot Ensembles in torch alone: one training, in five cycles without a warm-up."""

    def in_cycles(task: Any, length: int) -> Training:
        training = make(task)
        scheduler = CosineAnnealingWarmRestarts(training.optimizer, length)
        training.after_step = stepping(scheduler)
        return training

    return cycles(trial, in_cycles)


def frozen_cycles(trial: Trial, **options: Any) -> list[State]:
    """Snapshot Ensembles and FreezeOut, by :class:`fastfreeze.FreezeOutCycles`."""

    def make(task: Task, length: int) -> Training:
        schedule = fastfreeze.FreezeOutCycles(task.total_steps, num_cycles=MEMBERS, **options)
        return following(task, schedule)

    return cycles(trial, make)


def branches(trial: Trial, *, until: float, anew: bool) -> list[State]:
    """One network for two fifths of the epochs, and four that go on from its frozen first part.

    Each of the four trains its own last part for a tenth of the epochs.

    Args:
        trial: the run.
        until: the share of the compute that is frozen.
        anew: whether the last part begins with new weights, not with the network's.
    """
    trunk = state_of(trial.learn(torch_alone, 2 * trial.run.epochs // MEMBERS))

    def make(task: Task) -> Training:
        schedule = fastfreeze.Frozen(task.total_steps, until=until)
        plan = fastfreeze.split(task.build(), task.images[:2], schedule=schedule, lr=task.lr)
        frozen = [n for layer in plan.layers[: plan.schedule.until] for n in layer.modules]
        first = tuple(f"{name}." for name in frozen)
        start = {k: v for k, v in trunk.items() if k.startswith(first) or not anew}
        return following(task, schedule, start)

    epochs = trial.run.epochs // (2 * MEMBERS)
    return [trunk, *(state_of(trial.learn(make, epochs, part)) for part in range(1, MEMBERS))]


def _ours(make: Callable[..., list[State]], **options: Any) -> Method:
    return Method(partial(make, **options), RATES, ours=True)


_CYCLES = {"t_0": 0.8, "scale_lr": False}
METHODS = {
    "snapshots": Method(partial(snapshots, make=torch_alone), RATES),
    "independent": Method(partial(independent, make=torch_alone), RATES),
    "one network": Method(partial(single, make=torch_alone), RATES),
    "sticky": _ours(frozen_cycles, composition="sticky", **_CYCLES),
    "branches": _ours(branches, until=0.7, anew=False),
    "branches, last part anew": _ours(branches, until=0.7, anew=True),
    "last_k=2": _ours(frozen_cycles, composition="last_k", k=2, **_CYCLES),
    "thaw": _ours(frozen_cycles, composition="thaw", **_CYCLES),
}


def run(asked: Run, folder: Path, counted: bool) -> dict:
    data = fashion.read(folder, TRAIN)
    trial = Trial(lambda n, seed: data.task(asked.task, n, seed, asked.lr), asked, counted)
    return record(trial, METHODS[asked.method], data.sets)


@torch.no_grad()
def record(trial: Trial, method: Method, sets: Sets) -> dict:
    """Train members; their cost, the scores of their mean on all sets, and a prediction's time."""
    with torch.enable_grad():
        states = method.make(trial)
    model = trial.task_of(1, 0).build()
    if method.ours:
        predict: Predict = fastfreeze.SnapshotEnsemble(model, states)
    else:
        predict = loop_of(model, states, torch.channels_last)
    found = dict(trial.cost)
    for begin, (images, labels) in sets.items():
        p = torch.cat([predict(batch) for batch in images.split(250)])
        scores = prediction_scores(p, labels)
        found |= {f"{begin}{name}": getattr(scores, name) for name in ("error", "nll", "ece")}
    few = sets[""][0][:PREDICTED]
    return {**found, "predict_ms": round(1e3 * _lowest_seconds(lambda: predict(few)), 3)}


def _lowest_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of the fastest of several calls, the first not counted."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


COLUMNS = {"ECE": "ece", "ms to predict 64": "predict_ms"}
QUESTION = Question(
    "Ensembles of five: Fashion-MNIST, 6,000 training images",
    {"tiny-resnet20": BUDGETS},
    METHODS,
    run,
    fashion.fetch,
    COLUMNS,
)
