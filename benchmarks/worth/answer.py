"""The answer of a results file: points of error against cost, and what ours save at the mark."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lines import row
from benchmarks.worth.question import Method, Part, Question, Run, load


@dataclass(frozen=True)
class Point:
    """A method with one budget: means over the seeds, and the standard error of the error's.

    That is nan with one seed; the CPU seconds of a run are None while they have not been measured.
    ``more`` are the question's further columns, by title.
    """

    run: Run
    method: Method
    seeds: int
    error: float
    spread: float
    nll: float
    macs: float
    seconds: float | None
    more: Mapping[str, float]

    @property
    def budget(self) -> str:
        return f"{self.run.epochs} epoch{'s' * (self.run.epochs > 1)}"


@dataclass(frozen=True)
class Answer:
    """The points of one task; costs are in CPU seconds if all have them, else in MACs."""

    task: str
    points: Sequence[Point]

    @property
    def in_seconds(self) -> bool:
        return all(point.seconds is not None for point in self.points)

    def cost(self, point: Point) -> float:
        seconds = point.seconds if self.in_seconds else None
        return point.macs if seconds is None else seconds

    @property
    def rivals(self) -> list[Point]:
        """By rising cost; without those that freeze as ours do."""
        found = [p for p in self.points if not (p.method.ours or p.method.by_hand)]
        return sorted(found, key=self.cost)

    @property
    def best(self) -> Point:
        """The rivals' point of the lowest error."""
        return min(self.rivals, key=lambda p: p.error)

    @property
    def mark(self) -> float:
        """The error to reach: that of the best rival, and one standard error."""
        return self.best.error + (0.0 if math.isnan(self.best.spread) else self.best.spread)

    def reaches(self, points: Sequence[Point]) -> Point | None:
        """The cheapest of the points that reach the mark."""
        return min((p for p in points if p.error <= self.mark), key=self.cost, default=None)

    def saved(self, point: Point) -> float:
        """The share of the cost of the cheapest rival at the mark that a point does without."""
        return 1 - self.cost(point) / self.cost(self.reaches(self.rivals) or self.best)

    def envelope(self) -> list[Point]:
        """The rivals that are better than every cheaper one, by rising cost."""
        lower: list[Point] = []
        for point in self.rivals:
            if not lower or point.error < lower[-1].error:
                lower.append(point)
        return lower

    def methods(self) -> dict[str, list[Point]]:
        """Each method's points, by rising budget."""
        found: defaultdict[str, list[Point]] = defaultdict(list)
        for point in sorted(self.points, key=lambda p: p.run.epochs):
            found[point.run.method].append(point)
        return dict(found)


def answers(results: Mapping[str, Any]) -> list[Answer]:
    """One of each task in which a rival has run."""
    question = load(results["worth"])
    found = [
        Answer(task, _points(question, task, results["runs"], results["costs"]))
        for task in question.budgets
    ]
    return [answer for answer in found if answer.rivals]


def _points(
    question: Question, task: str, runs: Sequence[dict], costs: Sequence[dict]
) -> list[Point]:
    found = []
    for run in Part(question, 1, [task], list(question.methods)).once(runs):
        if own := _of_any_seed(run, runs):
            found.append(_point(run, own, _of_any_seed(run, costs), question))
    return found


def _of_any_seed(run: Run, records: Sequence[dict]) -> list[dict]:
    return [r for r in records if run.is_of({**r, "seed": run.seed})]


def _point(run: Run, own: Sequence[dict], costs: Sequence[dict], question: Question) -> Point:
    error, nll, macs = (statistics.mean(r[key] for r in own) for key in ("error", "nll", "macs"))
    n, method = len(own), question.methods[run.method]
    spread = statistics.stdev(r["error"] for r in own) / math.sqrt(n) if n > 1 else math.nan
    timed = [record["macs"] for record in own if record["seed"] == 0]
    seconds = None
    if costs and timed:  # of seed 0; where a method freezes as it sees fit, seeds differ in MACs
        seconds = statistics.median(record["seconds"] for record in costs) * macs / timed[0]
    more = {title: _column(key, own, costs) for title, key in question.columns.items()}
    return Point(run, method, n, error, spread, nll, macs, seconds, more)


def _column(key: str, own: Sequence[dict], costs: Sequence[dict]) -> float:
    """The mean over the seeds, or the median of what was measured alone."""
    alone = [record[key] for record in costs if key in record]
    return statistics.median(alone) if alone else statistics.mean(r[key] for r in own)


def table(answer: Answer) -> Iterator[str]:
    """Markdown: of each method the cheapest point at the mark, and that of the lowest error."""
    rival = answer.reaches(answer.rivals) or answer.best
    yield (
        f"The mark is {100 * answer.mark:.2f}% error: {answer.best.run.method} in "
        f"{answer.best.budget}, and one standard error. The cheapest rival that reaches it: "
        f"{rival.run.method} in {rival.budget}.\n"
    )
    yield from _rows([_cells(answer, points) for points in answer.methods().values()])


def short_table(answer: Answer, titles: Sequence[str]) -> Iterator[str]:
    """Some columns, of the methods that have run with several seeds."""
    found = [_cells(answer, p) for p in answer.methods().values() if min(x.seeds for x in p) > 1]
    yield from _rows([{title: cells[title] for title in titles} for cells in found])


def _rows(cells: Sequence[Mapping[str, str]]) -> Iterator[str]:
    yield row(*cells[0])
    yield f"|{'---|' * len(cells[0])}"
    yield from (row(*line.values()) for line in cells)


def _cells(answer: Answer, points: Sequence[Point]) -> dict[str, str]:
    """A method's row, by the titles of the columns."""
    low, there = min(points, key=lambda p: p.error), answer.reaches(points)
    name, to_the_mark, saved = low.run.method, "not reached", "-"
    if there is not None:
        cost = answer.cost(there) / (1 if answer.in_seconds else 1e9)
        to_the_mark, saved = f"{cost:.4g} in {there.budget}", f"{answer.saved(there):.0%}"
    return {
        "method": f"**{name}**" if low.method.ours else name,
        f"{'CPU s' if answer.in_seconds else 'GMACs'} to the mark": to_the_mark,
        "saved": saved,
        "lowest error %": f"{100 * low.error:.2f}"
        + ("" if low.seeds < 2 else f" ± {100 * low.spread:.2f}"),
        "in": low.budget,
        "NLL": f"{low.nll:.3f}",
        "CPU s": "-" if low.seconds is None else f"{low.seconds:.4g}",
        "GMACs": f"{low.macs / 1e9:.4g}",
        "rate": f"{low.run.lr:g}",
        "seeds": str(low.seeds),
        **{title: f"{value:.3g}" for title, value in low.more.items()},
    }


def summary(results: Mapping[str, Any]) -> Iterator[str]:
    """All tables."""
    for answer in answers(results):
        yield from (f"\n### {answer.task}\n", *table(answer))
