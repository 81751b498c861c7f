"""The page of all answers, and a picture of each question: error against cost."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import hardware_of, made_by, read_json
from benchmarks.worth.answer import Answer, answers, table
from benchmarks.worth.question import MODULES, load
from fastfreeze.files import write_atomic
from fastfreeze.recipes.plot import pyplot

RIVALS, OURS, BEST = "tab20", "Dark2", "0.8"  # colours
INTRODUCTION = """\
# What it is worth

Written by `python -m benchmarks report` from [the data](../benchmarks/results); do not edit.

How much sooner is a model as good there? Each method has several budgets of epochs, and the
learning rate of its grid with the lowest error on a validation set. A schedule ends with its
budget, so that a shorter training is another training. The mark is the lowest mean error of all
rivals and one standard error (over the seeds) more. *saved* compares the cheapest run that reaches
it with the cheapest rival that does. What is **bold** needs fastfreeze. What freezes the same *by
hand*, or by flags, is torch alone: it is no rival that sets the mark, but shows how much of the
saving is freezing's own, and how much the library's. CPU seconds are of one thread and count
everything but the final test; MACs are multiply-accumulates of forward and backward, and the cost
where no seconds have been measured. One seed, without a standard error, is a first look.
"""


def write(results: Path, docs: Path) -> None:
    """Write ``worth.md`` and its pictures; nothing where no question has data."""
    sections = []
    for name in MODULES:
        data = read_json(results / f"worth-{name}.json")
        found = answers(data) if data else []
        if not found:
            continue
        write_atomic(docs / f"worth-{name}.png", draw(found))
        parts = [f"## {load(name).title}", f"![error against cost](worth-{name}.png)"]
        for answer in found:
            parts += [f"### {answer.task}", "\n".join(table(answer))]
        parts.append(f"{hardware_of(data)}. Made by {made_by(data, f'worth-{name}.json')}.")
        sections.append("\n\n".join(parts))
    if sections:
        write_atomic(
            docs / "worth.md", ("\n\n".join([INTRODUCTION.rstrip(), *sections]) + "\n").encode()
        )


def draw(found: Sequence[Answer]) -> bytes:
    """A PNG, an axis for each task: a curve for each method, and the lowest of all rivals."""
    plt = pyplot()
    size = (7, 4.5 * len(found))
    figure, axes = plt.subplots(len(found), figsize=size, squeeze=False, layout="constrained")
    for axis, answer in zip(axes[:, 0], found, strict=True):
        _draw_answer(axis, answer, plt)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _draw_answer(axis: Any, answer: Answer, plt: Any) -> None:
    lowest = answer.envelope()
    costs, errors = [answer.cost(p) for p in lowest], [100 * p.error for p in lowest]
    axis.step(costs, errors, where="post", color=BEST, linewidth=6, label="best of the rivals")
    colors = {ours: iter(plt.get_cmap(OURS if ours else RIVALS).colors * 9) for ours in (0, 1)}
    for name, points in answer.methods().items():
        ours = points[0].method.ours
        axis.errorbar(
            [answer.cost(p) for p in points],
            [100 * p.error for p in points],
            [100 * p.spread for p in points],
            color=next(colors[ours]),
            marker="o" if ours else "x",
            markersize=4,
            linewidth=1.6 if ours else 0.8,
            linestyle="-" if ours else "--",
            capsize=2,
            label=name,
        )
    axis.set_xscale("log")
    axis.set_title(answer.task, fontsize=8, loc="left")
    axis.set_xlabel("CPU seconds" if answer.in_seconds else "MACs", fontsize=7)
    axis.set_ylabel("test error, %", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.grid(color="0.9")
    axis.legend(fontsize=5, loc="center left", bbox_to_anchor=(1, 0.5))
