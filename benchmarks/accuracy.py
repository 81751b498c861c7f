"""python -m benchmarks.accuracy: what a training costs until it is as good as torch's.

Each rival trains real images (5,000 MNIST digits: 4,000 for training, 1,000 for test) with several
budgets of epochs and several seeds. A schedule ends with its budget, so that a shorter training is
another training, not a part of a longer one. With one seed and budget all rivals see the same
weights and batches, in channels_last, side by side, ten steps at a time; everything counts but the
test at the end.

The mark is the mean error of torch with its largest budget, and one standard error more. The table
tells for each rival the cheapest budget whose mean error reaches the mark, and its seconds.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.case import OURS
from benchmarks.measure import machine
from benchmarks.results import read_json, write_json
from benchmarks.training_rivals import (
    BEST_TORCH,
    FLAGS,
    FREEZING,
    NOT_FREEZING,
    Task,
    Training,
    take_turns,
)
from fastfreeze.recipes.data import ImageData, epoch_generator, load_data
from fastfreeze.recipes.training import predict

T_0S = (0.5, 0.8)
COMPOSER = "Composer"


def composer_freezing(task: Task, t_0: float) -> Training:
    """Composer's layer freezing as it comes: from half of the run on, all but the last at its end.

    It runs after each epoch, on torch's fastest SGD.
    """
    from composer.algorithms.layer_freezing import freeze_layers

    training = NOT_FREEZING[BEST_TORCH](task, t_0)
    anneal, steps = training.after_step, 0

    def after_step() -> None:
        nonlocal steps
        anneal()
        steps += 1
        if steps % task.steps_per_epoch == 0:
            freeze_layers(training.model, training.optimizer, steps / task.total_steps)

    training.after_step = after_step
    return training


def rivals() -> tuple[dict[str, Callable[[Task], Training]], dict[str, str]]:
    """What trains, by name; and who cannot, and why."""
    makes = {BEST_TORCH: partial(NOT_FREEZING[BEST_TORCH], t_0=1.0)}
    left_out = {}
    try:
        import composer.algorithms.layer_freezing  # noqa: F401
    except ImportError as error:
        left_out[COMPOSER] = f"{type(error).__name__}: {error}"
    else:
        makes[COMPOSER] = partial(composer_freezing, t_0=1.0)
    for t_0 in T_0S:
        for name, layout in ((FLAGS, "channels_last fused"), (OURS, "channels_last")):
            makes[f"{name}, t_0={t_0}"] = partial(FREEZING[f"{name} {layout}"], t_0=t_0)
        cache = FREEZING[f"{OURS} channels_last cache"]
        makes[f"{OURS} cache, t_0={t_0}"] = partial(cache, t_0=t_0)
    return makes, left_out


@dataclass(frozen=True)
class Reached:
    """The cheapest budget with which a rival reaches the mark.

    Attributes:
        epochs: the budget.
        error: mean over the seeds, in 0..1.
        seconds: of the training, each seed's.
    """

    epochs: int
    error: float
    seconds: list[float]


def mark(runs: Sequence[dict]) -> float:
    """The error to reach, in 0..1: torch's with its largest budget and a standard error more."""
    epochs = max(run["epochs"] for run in runs if run["rival"] == BEST_TORCH)
    errors = [r["error"] for r in runs if (r["rival"], r["epochs"]) == (BEST_TORCH, epochs)]
    spread = statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else 0.0
    return statistics.mean(errors) + spread


def reached(runs: Sequence[dict]) -> dict[str, Reached | None]:
    """For each rival the cheapest budget that reaches the mark; None if none does."""
    budgets: defaultdict[tuple[str, int], list[dict]] = defaultdict(list)
    for run in runs:
        budgets[run["rival"], run["epochs"]].append(run)
    goal = mark(runs)
    found: dict[str, Reached | None] = dict.fromkeys(run["rival"] for run in runs)
    for (rival, epochs), own in budgets.items():
        error = statistics.mean(run["error"] for run in own)
        seconds = [run["seconds"] for run in own]
        before = found[rival]
        cheaper = before is None or statistics.median(seconds) < statistics.median(before.seconds)
        if error <= goal and cheaper:
            found[rival] = Reached(epochs, error, seconds)
    return found


def digits(data: ImageData, model: str, seed: int, epochs: int, batch_size: int, lr: float) -> Task:
    """The training digits, normalised, in an order of the seed's; what fills no batch is left out.

    Not augmented: the feature cache would have nothing to keep.
    """
    count = len(data.train.labels)
    in_order = replace(data, test=data.train).test_batches(count, torch.device("cpu"))
    images, labels = next(in_order)
    used = count // batch_size * batch_size
    orders = [
        torch.randperm(count, generator=epoch_generator(seed, epoch))[:used]
        for epoch in range(epochs)
    ]
    return Task(model, images, labels, torch.cat(orders).view(-1, batch_size), seed=seed, lr=lr)


def trained(task: Task, data: ImageData, makes: Mapping[str, Callable[[Task], Training]]) -> list:
    """Every rival's seconds and error with that seed and budget."""

    def judged(make: Callable[[Task], Training]) -> Training:
        training = make(task)
        cpu = torch.device("cpu")

        def notes() -> dict:
            outputs = predict(training.model, data, cpu)
            wrong = outputs.argmax(1) != data.test.labels
            return {"error": wrong.double().mean().item()}

        return replace(training, notes=notes)

    ready = {name: partial(judged, make) for name, make in makes.items()}
    runs = take_turns(ready, task, first=task.seed)
    epochs = task.total_steps // task.steps_per_epoch
    return [
        {"rival": name, "seed": task.seed, "epochs": epochs, "seconds": run.total, **run.notes}
        for name, run in runs.items()
    ]


def table(runs: Sequence[dict]) -> Iterator[str]:
    """Markdown: each rival's cheapest budget that reaches the mark, and torch's time beside it."""
    found = reached(runs)
    base = found[BEST_TORCH]
    assert base is not None  # it has set the mark
    yield f"to {100 * mark(runs):.2f}% test error\n"
    yield "| rival | epochs | error % | seconds, median (lowest-highest) | of torch's |"
    yield "|---|---|---|---|---|"
    for rival, own in found.items():
        if own is None:
            yield f"| {rival} | - | not reached | - | - |"
            continue
        pairs = zip(own.seconds, base.seconds, strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        middle = statistics.median(own.seconds)
        spread = f"{middle:.1f} ({min(own.seconds):.1f}-{max(own.seconds):.1f})"
        yield f"| {rival} | {own.epochs} | {100 * own.error:.2f} | {spread} | {ratio:.2f}x |"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    command = ["python", "-m", "benchmarks.accuracy", *(sys.argv[1:] if argv is None else argv)]
    data = load_data("mnist5k")
    results = read_json(arguments.out) if arguments.out else {}
    task = {"model": arguments.model, "batch_size": arguments.batch_size, "lr": arguments.lr}
    if results and results["task"] != task:
        sys.exit(f"{arguments.out} holds runs of {results['task']}, not of {task}")
    results = {"machine": machine(), "command": shlex.join(command), "task": task, **results}
    makes, left_out = rivals()
    runs = results.setdefault("accuracy", {"left_out": left_out, "runs": []})["runs"]
    done = {(run["seed"], run["epochs"]) for run in runs}
    print(*(f"{who} is left out: {why}\n" for who, why in left_out.items()), sep="")
    for seed in range(arguments.seeds):
        for epochs in arguments.epochs:
            if (seed, epochs) not in done:
                runs += trained(digits(data, seed=seed, epochs=epochs, **task), data, makes)
                if arguments.out:
                    write_json(arguments.out, results)
    print(*table(runs), sep="\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny-resnet20")
    parser.add_argument("--epochs", nargs="+", type=int, default=[4, 8, 12], help="budgets")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON of all runs; those in it are not run again")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
