"""python -m benchmarks.training [MODEL ...]: whole trainings under FreezeOut against torch's own.

Everything counts as training time: making the network and the optimizer, first calls, folding
anew, filling the cache. Every rival sees the same batches; they run side by side, ten steps
at a time. Before that a short training of each must end with the weights that torch gets, and in
the runs themselves half the losses must agree, else no time is told. Times are the median over
rounds, the lowest and the highest.

The floor is torch's time if each step took the time of the layers that train alone: forward,
backward and update, as measured in the run of flags, the frozen layers' forward left out. It knows
torch's kernels in torch's memory layout: others may beat it. A run has about as many freezes as the
model has layers, whatever its length: freezing costs this one, of some hundred steps, more than one
of a hundred thousand.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from benchmarks.case import OURS, Case
from benchmarks.clock import Times, in_turn, machine
from benchmarks.results import add, at_least, begun, parser
from benchmarks.training_rivals import (
    BASELINE,
    BEST_TORCH,
    CACHE,
    FLAGS,
    FREEZING,
    NOT_FREEZING,
    State,
    Task,
    Training,
    deviation,
)
from fastfreeze.layers.split import split
from fastfreeze.recipes.models import build_model
from fastfreeze.schedule import FreezeOut

MODELS = ["densenet-bc-40", "wrn16-2", "vgg16"]
DEFAULT_RIVALS = [BASELINE, BEST_TORCH, FLAGS, OURS, CACHE]
GATE_STEPS, GATE_BATCH = 12, 8
# Of half the losses of a run, near 2. Rounding grows as a run goes on: between torch's own memory
# layouts single losses of VGG differ by 0.09.
LOSS_TOLERANCE = 0.02


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    results = begun(machine(), "benchmarks.training", argv)
    sizes = arguments.samples, arguments.batch_size, arguments.epochs, arguments.image_size
    rivals = list(dict.fromkeys([BASELINE, FLAGS, *arguments.rivals]))
    for model, t_0 in itertools.product(arguments.models, arguments.t_0):
        entry = entry_of(Task.random(model, *sizes), rivals, t_0, arguments.rounds)
        add(results, f"training-{model}-{t_0}", entry, arguments.out)
    return int(any(entry["left_out"] for entry in results["results"].values()))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("benchmarks.training", __doc__)
    made.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    made.add_argument("--t-0", nargs="+", type=float, default=[0.5, 0.8])
    made.add_argument("--samples", type=at_least(1), default=256)
    made.add_argument("--epochs", type=at_least(1), default=25)
    made.add_argument("--batch-size", type=at_least(1), default=32)
    about = "each takes the default's models about 22 minutes"
    made.add_argument("--rounds", type=at_least(1), default=1, help=about)
    made.add_argument("--threads", type=at_least(1), default=2)
    made.add_argument("--image-size", type=at_least(1), default=32)
    known = [*NOT_FREEZING, *FREEZING]
    about = f"besides {BASELINE!r} and {FLAGS!r}, by which the others are judged"
    made.add_argument("--rivals", nargs="+", choices=known, default=DEFAULT_RIVALS, help=about)
    arguments = made.parse_args(argv)
    if arguments.samples < arguments.batch_size:
        got = f"{arguments.samples} and {arguments.batch_size}"
        made.error(f"--samples must be at least --batch-size, got {got}")
    try:
        for t_0 in arguments.t_0:
            FreezeOut(1, t_0=t_0)
        with torch.device("meta"):
            for model in arguments.models:
                build_model(model)
    except ValueError as error:
        made.error(str(error))
    return arguments


def entry_of(task: Task, rivals: Sequence[str], t_0: float, rounds: int) -> dict:
    """The results of a model's trainings; all rivals are left out if one trains otherwise."""
    num_layers = len(split(task.build(), task.images[:2]).layers)
    freezes = FreezeOut(task.total_steps, t_0=t_0).frozen_layers(num_layers)
    name = f"{task.model}, t_0={t_0}, {task.total_steps} steps, {len(freezes) - 1} freezes"
    wrong, runs = gate(task.model, rivals, t_0, task.images.shape[-1]), []
    makes = {rival: partial((NOT_FREEZING | FREEZING)[rival], task, t_0) for rival in rivals}
    for first in range(0 if wrong else rounds):
        gc.collect()
        runs.append(take_turns(makes, task, first))
    if wrong := wrong or disagreements(runs):
        return {"name": name, "left_out": wrong, "seconds": {}}
    totals = {rival: [times[rival].seconds for times in runs] for rival in rivals}
    least = [times[FLAGS].seconds - times[FLAGS].notes["prefix_seconds"] for times in runs]
    shares = [own / torch for own, torch in zip(least, totals[BASELINE], strict=True)]
    return {
        "name": name,
        "left_out": {},
        "floor_s": statistics.median(shares) * statistics.median(totals[BASELINE]),
        "seconds": {
            rival: asdict(Times(statistics.median(total), min(total), max(total)))
            for rival, total in totals.items()
        },
    }


def gate(model: str, rivals: Sequence[str], t_0: float, image_size: int = 32) -> dict[str, str]:
    """What is wrong with rivals that do not train as torch does, by name.

    Rivals without freezing must get the baseline's weights and statistics, the others those of
    flags; and a trimmed network, with half of the steps taken, the gradients of its model.
    """
    task = Task.random(model, 2 * GATE_BATCH, GATE_BATCH, GATE_STEPS // 2, image_size)
    start, case = task.build().state_dict(), Case(name=model)
    for truth, makes in ((BASELINE, NOT_FREEZING), (FLAGS, FREEZING)):
        expected = _trained(makes[truth](task, t_0), task).model.state_dict()

        def wrong(training: Training, expected: State = expected) -> str | None:
            return deviation(_trained(training, task), expected, start)

        for name in [name for name in rivals if name in makes and name != truth]:
            case.add(name, partial(makes[name], task, t_0), wrong)
    return case.left_out


def _trained(training: Training, task: Task) -> Training:
    for step in range(task.total_steps):
        if step == task.total_steps // 2:
            training.verify(task.images[:GATE_BATCH])
        training.step(*task.batch(step))
    return training


@dataclass
class RunTimes:
    """A rival's whole run."""

    seconds: float = 0.0  # from the making of its model on, but for others' turns
    losses: list[float] = field(default_factory=list)  # of each step
    notes: dict = field(default_factory=dict)  # what the rival tells at the end


def train(
    make: Callable[[], Training], task: Task, run: RunTimes, slice_steps: int
) -> Iterator[None]:
    """Train from start to end, and pause after each slice of steps."""
    start = time.perf_counter()
    training = make()
    for step in range(task.total_steps):
        run.losses.append(training.step(*task.batch(step)).item())
        if (step + 1) % slice_steps == 0:
            run.seconds += time.perf_counter() - start
            yield
            start = time.perf_counter()
    run.seconds += time.perf_counter() - start
    run.notes = training.notes()


def take_turns(
    makes: Mapping[str, Callable[[], Training]], task: Task, first: int, slice_steps: int = 10
) -> dict[str, RunTimes]:
    """Whole runs of all rivals side by side, a slice at a time; the order turns, from ``first``."""
    names = list(makes)
    runs = {name: RunTimes() for name in names}
    trainings = {name: train(makes[name], task, runs[name], slice_steps) for name in names}
    for turn in range(first, first + task.total_steps // slice_steps + 1):
        for name in in_turn(names, turn):
            next(trainings[name], None)
    return runs


Runs = Mapping[str, RunTimes]  # of one round, by rival


def disagreements(rounds: Sequence[Runs]) -> dict[str, str]:
    """Whose losses are not those of torch, and by how much, by name."""
    wrong: dict[str, str] = {}
    for name, run in (pair for runs in rounds for pair in runs.items()):
        truth = rounds[0][BASELINE if name in NOT_FREEZING else FLAGS]
        off = statistics.median(
            math.inf if math.isnan(a - b) else abs(a - b)
            for a, b in zip(run.losses, truth.losses, strict=True)
        )
        if off > LOSS_TOLERANCE:
            wrong[name] = f"losses are {off:.1e} from torch's, in the median"
    return wrong


if __name__ == "__main__":
    sys.exit(main())
