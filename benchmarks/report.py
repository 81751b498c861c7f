"""python -m benchmarks report: all results in one Markdown file and one picture.

The tables in README.md and of pages in docs/ are written anew, too (pages.py).

Results of one kind and one machine share a table. It holds one line for each of ours in each case.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import pages
from benchmarks.case import OURS
from benchmarks.compare import lines_of_entry
from benchmarks.lines import HEADER, Line, lines_of
from benchmarks.measure import Times
from benchmarks.picture import draw
from benchmarks.results import hardware_of, made_by
from benchmarks.worth import page as worth
from fastfreeze.files import write_atomic

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
DOCS = REPOSITORY / "docs"
KERNEL_TITLES = {  # by how a case's name begins
    "sgd": "Optimizer step",
    "adamw": "Optimizer step",
    "host": "Host time of an optimizer step on a GPU",
    "trim": "Training step, half of the parameters frozen",
    "kept": "Training step with kept values",
}
OTHER_KERNELS = "Kernels"
ENSEMBLES, TRAININGS, PEERS = "Ensembles", "Whole trainings", "Snapshot ensembles and their peers"
FLOORS = {
    "Optimizer step": "updating as many elements in one flat tensor",
    "Host time of an optimizer step on a GPU": "not known; nothing is launched, and torch's "
    "launches, one for each group, are not counted",
    "Training step, half of the parameters frozen": "not known",
    "Training step with kept values": "training the rest alone, on features that were stored",
    OTHER_KERNELS: "the case's bytes at the bandwidth of a large copy",
    ENSEMBLES: "the loop's time, divided by how many times fewer MACs there are to do if what "
    "members share is done once; folding norms goes beyond it",
    TRAININGS: "the baseline's time if frozen layers took none, with torch's kernels",
    PEERS: "not known",
}
INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks report` from [the data](../benchmarks/results); do not edit.

Times are medians with the quartiles around them; those of whole trainings lie between the lowest
and the highest round. Rivals are timed in turns in one process, so that whatever else the machine
does meets all of them: compare the ratios, not the times of different tables. *ratio* is how many
times as long the fastest of the rivals takes. All of them, ours too, have first shown that they
compute the same; who does not is named and has no number.

![how many times as long the best rival takes](benchmarks.png)
"""


@dataclass
class Table:
    """Lines of one kind, measured on one machine.

    Attributes:
        title: the kind.
        hardware: machine, threads and versions.
        lines: as they are in the files.
        left_out: who has no numbers and why, with the number of cases.
        made_by: what made each file and how, by its name.
    """

    title: str
    hardware: str
    lines: list[Line] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    made_by: dict[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        parts = [f"## {self.title}", self.hardware, f"*floor*: {FLOORS[self.title]}."]
        if self.lines:
            parts.append("\n".join([HEADER, *map(str, self.lines)]))
        if self.left_out:
            notes = [f"- {who} ({n} case{'s' * (n > 1)})" for who, n in self.left_out.items()]
            parts.append("\n".join(["Without numbers:", "", *notes]))
        made = [f"- {text}" for text in self.made_by.values()]
        parts.append("\n".join(["Made by", "", *made]))
        return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to")
    arguments = parser.parse_args(argv)
    tables = collect(arguments.results)
    if not any(table.lines for table in tables):
        parser.error(f"--results must be a folder with results, got {arguments.results}")
    write_atomic(arguments.out / "benchmarks.md", markdown(tables).encode())
    write_atomic(arguments.out / "benchmarks.png", draw(tables))
    worth.write(arguments.results, arguments.out)
    if arguments.out == DOCS:
        pages.update(REPOSITORY, arguments.results)
    return 0


def markdown(tables: Sequence[Table]) -> str:
    """The whole file."""
    return "\n".join([INTRODUCTION, *(f"{table.markdown()}\n" for table in tables)])


def collect(folder: Path) -> list[Table]:
    """The tables of all results in a folder, by kind and then by the files' names.

    Raises:
        ValueError: a file holds no results that are known here.
    """
    tables: dict[tuple[str, str], Table] = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        hardware = hardware_of(data)
        for title, lines, left_out in _parts(path, data):
            table = tables.setdefault((title, hardware), Table(title, hardware))
            table.lines += lines
            table.left_out.update(left_out)
            table.made_by[path.name] = made_by(data, path.name)
    return sorted(tables.values(), key=lambda table: list(FLOORS).index(table.title))


Part = tuple[str, list[Line], list[str]]  # title, lines, who has no numbers


def _parts(path: Path, data: dict) -> Iterator[Part]:
    for key, parts in _READERS.items():
        if key in data:
            return parts(data[key])
    raise ValueError(f"{path} must hold one of {', '.join(_READERS)}; it holds {', '.join(data)}")


def _kernel_parts(results: dict) -> Iterator[Part]:
    for key, entry in results.items():
        title = KERNEL_TITLES.get(key.partition("-")[0], OTHER_KERNELS)
        left_out = [f"{rival}: {why}" for rival, why in entry.get("left_out", {}).items()]
        yield title, lines_of_entry(key, entry), left_out


def _ensemble_parts(cases: Sequence[dict]) -> Iterator[Part]:
    for entry in cases:
        times = {rival: Times(**t) for rival, t in entry["seconds"].items()}
        label = f"{entry['model']}, batch {entry['batch_size']}"
        case = f"{label}, {entry['members']} members, {entry['shared']:.0%} of the MACs shared"
        floor = times["torch loop"].median / entry["bound"]
        left_out = [f"{rival}: {why}" for rival, why in entry["wrong"].items()]
        yield ENSEMBLES, lines_of(case, label, times, floor), left_out


def _training_parts(models: dict) -> Iterator[Part]:
    for model, entry in models.items():
        if entry["status"] == "refused":
            yield TRAININGS, [], [f"{model}: {n}: {why}" for n, why in entry["wrong"].items()]
            continue
        for t_0, at in entry["t_0"].items():
            totals = {name: rival["total"] for name, rival in at["rivals"].items()}
            times = {
                name: Times(total["median"], total["lowest"], total["highest"])
                for name, total in totals.items()
            }
            label = f"{model}, t_0={t_0}, {entry['steps']} steps"
            floor = (1 - at["limit"]["median"]) * times["torch"].median
            case = f"{label}, {at['freezes']} freezes"
            yield TRAININGS, lines_of(case, label, times, floor), []


def _peer_parts(peers: Sequence[dict]) -> Iterator[Part]:
    """Predictions from the same snapshots, or by whoever brings its own; and the trainings."""
    trainings: dict[str, Times] = {}
    predictions: dict[str, dict[str, Times]] = {}
    left_out = []
    for peer in peers:
        trained_by, predicted_by, facts = peer["trained_by"], peer["predicted_by"], peer["facts"]
        if peer["wrong"]:
            left_out.append(f"{predicted_by} ({trained_by}): {peer['wrong']}")
        if "training_seconds" in facts:
            trainings[trained_by] = Times(*[facts["training_seconds"]] * 3)
        if "predict_median" in facts:
            predict = Times(*(facts[f"predict_{k}"] for k in ("median", "low", "high")))
            predictions.setdefault(trained_by, {})[predicted_by] = predict
    yield PEERS, lines_of("training", "training", trainings), left_out
    foreign = {
        name: times
        for trained_by, own in predictions.items()
        if not trained_by.startswith(OURS)
        for name, times in own.items()
    }
    for trained_by, own in predictions.items():
        if trained_by.startswith(OURS):
            case = f"prediction, {trained_by}"
            yield PEERS, lines_of(case, case, {**foreign, **own}), []


_READERS = {
    "results": _kernel_parts,
    "cases": _ensemble_parts,
    "models": _training_parts,
    "peers": _peer_parts,
    "worth": lambda name: iter(()),  # a page of its own
}
