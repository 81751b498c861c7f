"""python -m benchmarks report: all results in one Markdown file and one picture.

The tables in README.md and of pages in docs/ are written anew, too (pages.py).

Results of one kind and one machine share a table. It holds one line for each of ours in each case.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import pages
from benchmarks.lines import HEADER, Line, lines_of
from benchmarks.picture import draw
from benchmarks.results import hardware_of, made_by, read_json
from benchmarks.worth import page as worth
from fastfreeze.files import write_atomic

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
DOCS = REPOSITORY / "docs"
KERNELS = "Kernels"
KINDS = {  # in the order of the tables: how the keys of their cases begin, and what the floor is
    "Optimizer step": ("sgd adamw", "updating as many elements in one flat tensor"),
    "Host time of an optimizer step on a GPU": (
        "host",
        "not known; nothing is launched, and torch's launches, one for each group, are not counted",
    ),
    "Training step, half of the parameters frozen": ("trim", "not known"),
    "Training step with kept values": (
        "kept",
        "training the rest alone, on features that were stored",
    ),
    KERNELS: ("", "the case's bytes at the bandwidth of a large copy"),
    "Ensembles": (
        "ensemble",
        "the loop's time, divided by how many times fewer MACs there are to do if what members "
        "share is done once; folding norms goes beyond it",
    ),
    "Whole trainings": (
        "training",
        "the baseline's time if frozen layers took none, with torch's kernels",
    ),
    "Snapshot ensembles and their peers": ("peers", "not known"),
}
TITLES = {key: title for title, (keys, _) in KINDS.items() for key in keys.split()}
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
    """Lines of one kind, measured on one machine."""

    title: str
    hardware: str
    lines: list[Line] = field(default_factory=list)  # as they are in the files
    left_out: Counter[str] = field(default_factory=Counter)  # who and why, of how many cases
    made_by: dict[str, str] = field(default_factory=dict)  # by the files' names

    def markdown(self) -> str:
        parts = [f"## {self.title}", self.hardware, f"*floor*: {KINDS[self.title][1]}."]
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
        ValueError: a file holds no results.
    """
    tables: dict[tuple[str, str], Table] = {}
    for path in sorted(folder.glob("*.json")):
        data = read_json(path)
        if "worth" in data:  # a page of its own
            continue
        if "results" not in data:
            raise ValueError(f"{path} must hold results; it holds {', '.join(data)}")
        hardware = hardware_of(data)
        for key, entry in data["results"].items():
            title = TITLES.get(key.partition("-")[0], KERNELS)
            table = tables.setdefault((title, hardware), Table(title, hardware))
            table.lines += lines_of(key, entry)
            table.left_out.update(f"{who}: {why}" for who, why in entry["left_out"].items())
            table.made_by[path.name] = made_by(data, path.name)
    return sorted(tables.values(), key=lambda table: list(KINDS).index(table.title))
