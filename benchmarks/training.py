"""python -m benchmarks.training [MODEL ...]: whole trainings under FreezeOut against torch's own.

Everything counts as training time: making the network and the optimizer, first calls, folding
anew, filling the cache. Every rival sees the same batches; they run side by side, ten steps
at a time. Before that a short training of each must end with the weights that torch gets, and in
the runs themselves half the losses must agree, else no time is told. The table shows for each t_0

* total: seconds of the run, the median over rounds and the lowest and highest;
* saved: of the baseline's and of the best torch's total, the median of each round's ratio;
* once: seconds of the run that are not steps of usual length (see the next);
* long run: what is saved if each step takes the median time of those under its cut, which a run
  with more steps between two freezes approaches;
* re-cut: what the first two calls under a new cut take longer than usual, in the baseline's steps:
  the median over the freezes and the highest. Each is the median over rounds.

The limit is what would be saved if each step took the time of the layers that train alone: forward,
backward and update, as measured in the run of flags, the frozen layers' forward left out. It knows
torch's kernels in the baseline's memory layout: others may beat it. A run has about as many freezes
as the model has layers, whatever its length: a re-cut costs this one, of some hundred steps, far
more than one of a hundred thousand.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import machine
from benchmarks.results import write_json
from benchmarks.training_rivals import (
    BASELINE,
    BEST_TORCH,
    FLAGS,
    FREEZING,
    NOT_FREEZING,
    Make,
    RunTimes,
    Task,
    Training,
    frozen_layers,
    largest_deviation,
    take_turns,
)
from fastfreeze.layers.split import split
from fastfreeze.recipes.models import build_model
from fastfreeze.schedule import FreezeOut

MODELS = ["densenet-bc-40", "wrn16-2", "vgg16"]
DEFAULT_RIVALS = [BASELINE, BEST_TORCH, FLAGS, "fastfreeze", "fastfreeze cache"]
GATE_STEPS = 12
GATE_BATCH = 8
# Of what the truth changed in a tensor. Between memory layouts 0.3 is seen, in a norm of VGG whose
# gradient is a sum that cancels; momentum that is forgotten makes 0.5, a missing update 1.
TOLERANCE = 0.4
# Of half the losses of a run, near 2. Rounding grows as a run goes on: between torch's own memory
# layouts single losses of VGG differ by 0.09.
LOSS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Spread:
    """Of one number per round."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Summary:
    """One rival's line of the table; seconds, shares in 0..1, baseline's steps, last notes."""

    total: Spread
    saved: Spread
    saved_of_best_torch: Spread | None
    once: float
    saved_in_a_long_run: float
    recuts: list[float]
    notes: dict


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    command = shlex.join(
        ["python", "-m", "benchmarks.training", *(sys.argv[1:] if argv is None else argv)]
    )
    facts = {"machine": machine(), "command": command, "models": {}}
    print(f"{facts['machine']}\n", flush=True)
    for model in arguments.models:
        entry = facts["models"][model] = _model_entry(model, arguments)
        print(_text(model, entry), flush=True)
        if arguments.out:
            write_json(arguments.out, facts)
    return int(any(entry["status"] == "refused" for entry in facts["models"].values()))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", type=_model, default=MODELS, metavar="MODEL")
    parser.add_argument("--t-0", nargs="+", type=_t_0, default=[0.5, 0.8])
    parser.add_argument("--samples", type=_at_least_1, default=256)
    parser.add_argument("--epochs", type=_at_least_1, default=25)
    parser.add_argument("--batch-size", type=_at_least_1, default=32)
    parser.add_argument(
        "--rounds",
        type=_at_least_1,
        default=1,
        help="each takes the default's models about 22 minutes",
    )
    parser.add_argument("--threads", type=_at_least_1, default=2)
    parser.add_argument("--image-size", type=_at_least_1, default=32)
    parser.add_argument(
        "--rivals",
        nargs="+",
        choices=[*NOT_FREEZING, *FREEZING],
        default=DEFAULT_RIVALS,
        help=f"besides {BASELINE!r} and {FLAGS!r}, by which the others are judged",
    )
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args(argv)
    if arguments.samples < arguments.batch_size:
        parser.error(
            f"--samples must be at least --batch-size, got {arguments.samples} and "
            f"{arguments.batch_size}"
        )
    return arguments


def _at_least_1(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _model(name: str) -> str:
    try:
        with torch.device("meta"):
            build_model(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _t_0(text: str) -> float:
    try:
        return FreezeOut(1, t_0=float(text)).t_0
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _model_entry(model: str, arguments: argparse.Namespace) -> dict:
    size, rivals = arguments.image_size, list(dict.fromkeys([BASELINE, FLAGS, *arguments.rivals]))
    for t_0 in arguments.t_0:
        if wrong := gate(model, rivals, t_0, size):
            return {"status": "refused", "wrong": wrong}
    task = Task.random(model, arguments.samples, arguments.batch_size, arguments.epochs, size)
    rounds = whole_runs(task, rivals, arguments.t_0, arguments.rounds)
    if wrong := disagreements(rounds):
        return {"status": "refused", "wrong": wrong}
    num_layers = len(split(task.build(), task.images[:2]).layers)
    entry = {"status": "measured", "steps": task.total_steps, "t_0": {}}
    for t_0 in arguments.t_0:
        frozen = frozen_layers(FreezeOut(task.total_steps, t_0=t_0), num_layers)
        runs = {name: [r[name, t_0] for r in rounds] for name in rivals}
        entry["t_0"][str(t_0)] = {
            "freezes": len(stages(frozen)) - 1,
            "limit": asdict(limit(runs[FLAGS], runs[BASELINE])),
            "rivals": {name: asdict(s) for name, s in summarize(runs, frozen).items()},
        }
    return entry


def gate(model: str, rivals: Sequence[str], t_0: float, image_size: int = 32) -> dict[str, str]:
    """What is wrong with rivals that do not train as torch does, by name.

    Rivals without freezing must get the baseline's weights and statistics, the others those of
    flags; and a trimmed network, with half of the steps taken, the gradients of its model.
    """
    task = Task.random(model, 2 * GATE_BATCH, GATE_BATCH, GATE_STEPS // 2, image_size)
    wrong: dict[str, str] = {}
    for truth, makes in ((BASELINE, NOT_FREEZING), (FLAGS, FREEZING)):
        expected = _trained(makes[truth], task, t_0)
        for name in [name for name in rivals if name in makes and name != truth]:
            try:
                found = _trained(makes[name], task, t_0)
            except Exception as error:  # of whatever kind: all that are wrong are named
                wrong[name] = f"{type(error).__name__}: {error}"
                continue
            error, tensor = largest_deviation(found, expected, task.build())
            if error > TOLERANCE:
                wrong[name] = f"{tensor} is {error:.1e} of its change from that of {truth}"
    return wrong


def _trained(make: Make, task: Task, t_0: float) -> Training:
    training = make(task, t_0)
    for step in range(task.total_steps):
        if step == task.total_steps // 2:
            training.verify(task.images[:GATE_BATCH])
        training.step(*task.batch(step))
    return training


Key = tuple[str, float]  # rival and t_0


def whole_runs(
    task: Task, rivals: Sequence[str], t_0s: Sequence[float], rounds: int
) -> list[dict[Key, RunTimes]]:
    """Each round's runs. What does not freeze runs once a round, and stands for every t_0."""
    makes = {(name, t_0s[0]): NOT_FREEZING[name] for name in rivals if name in NOT_FREEZING}
    makes |= {(name, t_0): FREEZING[name] for name in rivals if name in FREEZING for t_0 in t_0s}
    ready = {key: partial(make, task, key[1]) for key, make in makes.items()}
    results = []
    for i in range(rounds):
        gc.collect()
        times = take_turns(ready, task, first=i)
        shared = {
            (name, t_0): times[name, t_0s[0]]
            for name in rivals
            if name in NOT_FREEZING
            for t_0 in t_0s
        }
        results.append({**times, **shared})
    return results


def disagreements(rounds: Sequence[Mapping[Key, RunTimes]]) -> dict[str, str]:
    """Whose losses are not those of torch, and by how much, by name."""
    wrong: dict[str, str] = {}
    for runs in rounds:
        for (name, t_0), run in runs.items():
            truth = runs[BASELINE if name in NOT_FREEZING else FLAGS, t_0]
            off = statistics.median(
                math.inf if math.isnan(a - b) else abs(a - b)
                for a, b in zip(run.losses, truth.losses, strict=True)
            )
            if off > LOSS_TOLERANCE:
                wrong[f"{name}, t_0={t_0}"] = f"losses are {off:.1e} from torch's, in the median"
    return wrong


def summarize(runs: Mapping[str, list[RunTimes]], frozen: Sequence[int]) -> dict[str, Summary]:
    """A line for each rival.

    Args:
        runs: each rival's, one a round.
        frozen: how many layers are frozen at each step, where layers freeze at all.
    """
    baseline = runs[BASELINE]
    step = statistics.median(s for run in baseline for s in run.steps)
    whole = statistics.median(sum(usual_seconds(r.steps, [0] * len(r.steps))) for r in baseline)
    summaries = {}
    for name, own in runs.items():
        cuts = frozen if name in FREEZING else [0] * len(frozen)
        usual = statistics.median(sum(usual_seconds(run.steps, cuts)) for run in own)
        total = Spread.of([run.total for run in own])
        recuts = zip(*(recut_seconds(run.steps, cuts) for run in own), strict=True)
        summaries[name] = Summary(
            total=total,
            saved=_saved(own, baseline),
            saved_of_best_torch=_saved(own, runs[BEST_TORCH]) if BEST_TORCH in runs else None,
            once=total.median - usual,
            saved_in_a_long_run=1 - usual / whole,
            recuts=[statistics.median(seconds) / step for seconds in recuts],
            notes=own[-1].notes,
        )
    return summaries


def _saved(own: Sequence[RunTimes], others: Sequence[RunTimes]) -> Spread:
    return Spread.of([1 - a.total / b.total for a, b in zip(own, others, strict=True)])


def limit(flags: Sequence[RunTimes], baseline: Sequence[RunTimes]) -> Spread:
    """Share of the baseline's time that is saved where frozen layers take none."""
    return Spread.of(
        [
            1 - (a.total - a.notes["prefix_seconds"]) / b.total
            for a, b in zip(flags, baseline, strict=True)
        ]
    )


def stages(frozen: Sequence[int]) -> list[range]:
    """Stretches of steps under one cut, in order."""
    steps = itertools.groupby(range(len(frozen)), key=frozen.__getitem__)
    found = [list(group) for _, group in steps]
    return [range(stage[0], stage[-1] + 1) for stage in found]


def usual_seconds(seconds: Sequence[float], frozen: Sequence[int]) -> list[float]:
    """For each step the median time of its cut's steps, without the first two if there are more."""
    usual: list[float] = []
    for stage in stages(frozen):
        timed = seconds[stage.start : stage.stop]
        usual += [statistics.median(timed[2:] or timed)] * len(timed)
    return usual


def recut_seconds(seconds: Sequence[float], frozen: Sequence[int]) -> list[float]:
    """What the first two steps after each freeze take longer than the later ones of their cut.

    Cuts that last for fewer than three steps have no usual step and are left out.
    """
    usual = usual_seconds(seconds, frozen)
    return [
        sum(seconds[i] - usual[i] for i in stage[:2])
        for stage in stages(frozen)[1:]
        if len(stage) > 2
    ]


def _text(model: str, entry: dict) -> str:
    if entry["status"] == "refused":
        lines = [f"{name}: {reason}" for name, reason in entry["wrong"].items()]
        return "\n".join([f"{model}: no times, since the rivals do not train alike", *lines, ""])
    return "\n".join(_table(model, entry["steps"], t_0, e) for t_0, e in entry["t_0"].items())


def _table(model: str, steps: int, t_0: str, entry: dict) -> str:
    lines = [
        f"{model}, t_0={t_0}: {steps} steps, {entry['freezes']} freezes. Limit: "
        f"{_spread(entry['limit'], 100)} % saved",
        "",
        "| rival | total s (lowest-highest) | saved % | of best torch % | once s | long run % "
        "| re-cut, steps (highest) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, line in entry["rivals"].items():
        best, recuts = line["saved_of_best_torch"], line["recuts"]
        cells = [
            name,
            _spread(line["total"], 1),
            _spread(line["saved"], 100),
            "-" if best is None else _spread(best, 100),
            f"{line['once']:.1f}",
            f"{line['saved_in_a_long_run']:.1%}".rstrip("%"),
            f"{statistics.median(recuts):.2f} ({max(recuts):.2f})" if recuts else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _spread(spread: dict, factor: float) -> str:
    median, lowest, highest = (factor * spread[k] for k in ("median", "lowest", "highest"))
    return f"{median:.1f} ({lowest:.1f}-{highest:.1f})"


if __name__ == "__main__":
    sys.exit(main())
