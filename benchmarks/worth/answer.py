"""The answer of a results file: points of error against cost, and what ours save at the mark."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.worth.question import Part, Question, Run, load


@dataclass(frozen=True)
class Point:
    """A method with one budget and its learning rate.

    Attributes:
        method, epochs, lr: which.
        ours: whether it needs fastfreeze.
        error: mean over the seeds, in 0..1.
        spread: standard error of that mean, nan with one seed.
        nll: mean.
        seeds: how many.
        macs: of a run, mean.
        seconds: CPU seconds of a run; None while they have not been measured.
        more: the question's further columns, by title.
    """

    method: str
    epochs: int
    lr: float
    ours: bool
    error: float
    spread: float
    nll: float
    seeds: int
    macs: float
    seconds: float | None
    more: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """Of one task.

    Attributes:
        task: its name.
        points: of all methods.
        in_seconds: whether ``cost`` is in CPU seconds, not in MACs: all points have them.
    """

    task: str
    points: Sequence[Point]

    @property
    def in_seconds(self) -> bool:
        return all(point.seconds is not None for point in self.points)

    def cost(self, point: Point) -> float:
        """What a point costs, in CPU seconds or in MACs."""
        seconds = point.seconds if self.in_seconds else None
        return point.macs if seconds is None else seconds

    @property
    def best(self) -> Point:
        """The rivals' point of the lowest error."""
        return min((p for p in self.points if not p.ours), key=lambda p: p.error)

    @property
    def mark(self) -> float:
        """The error to reach: that of the best rival, and one standard error."""
        return self.best.error + (0.0 if math.isnan(self.best.spread) else self.best.spread)

    def reaches(self, points: Sequence[Point]) -> Point | None:
        """The cheapest of the points that reach the mark."""
        return min((p for p in points if p.error <= self.mark), key=self.cost, default=None)

    @property
    def rival(self) -> Point:
        """The cheapest rival that reaches the mark: what ours are to beat."""
        found = self.reaches([p for p in self.points if not p.ours])
        assert found is not None  # the best one does
        return found

    def envelope(self) -> list[Point]:
        """The rivals that no cheaper rival equals, by rising cost."""
        lower: list[Point] = []
        for point in sorted((p for p in self.points if not p.ours), key=self.cost):
            if not lower or point.error < lower[-1].error:
                lower.append(point)
        return lower

    def methods(self) -> dict[str, list[Point]]:
        """Each method's points, by rising budget."""
        found: defaultdict[str, list[Point]] = defaultdict(list)
        for point in sorted(self.points, key=lambda p: p.epochs):
            found[point.method].append(point)
        return dict(found)

    def saved(self, point: Point) -> float:
        """The share of the cost of the cheapest rival at the mark that a point does without."""
        return 1 - self.cost(point) / self.cost(self.rival)


def answers(results: Mapping[str, Any]) -> list[Answer]:
    """One of each task in which a rival has run."""
    question = load(results["worth"])
    found = [
        Answer(task, _points(question, task, results["runs"], results["costs"]))
        for task in question.budgets
    ]
    return [answer for answer in found if any(not point.ours for point in answer.points)]


def _points(
    question: Question, task: str, runs: Sequence[dict], costs: Sequence[dict]
) -> list[Point]:
    part = Part(question, 1, [task], list(question.methods))
    wanted = [run for name in part.methods for run in part.chosen(runs, task, name, seed=0)]
    found = []
    for run in wanted:
        own = _of_any_seed(run, runs)
        if own:
            found.append(_point(run, own, _of_any_seed(run, costs), question))
    return found


def _of_any_seed(run: Run, records: Sequence[dict]) -> list[dict]:
    return [r for r in records if run.is_of({**r, "seed": run.seed})]


def _point(run: Run, own: Sequence[dict], costs: Sequence[dict], question: Question) -> Point:
    errors = [record["error"] for record in own]
    spread = statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
    macs = statistics.mean(record["macs"] for record in own)
    timed = [record["macs"] for record in own if record["seed"] == 0]
    seconds = None
    if costs and timed:  # of seed 0; where a method freezes as it sees fit, seeds differ in MACs
        seconds = statistics.median(record["seconds"] for record in costs) * macs / timed[0]
    return Point(
        run.method,
        run.epochs,
        run.lr,
        question.methods[run.method].ours,
        statistics.mean(errors),
        spread,
        statistics.mean(record["nll"] for record in own),
        len(own),
        macs,
        seconds,
        {title: _column(key, own, costs) for title, key in question.columns.items()},
    )


def _column(key: str, own: Sequence[dict], costs: Sequence[dict]) -> float:
    """The mean over the seeds, or the median of what was measured alone."""
    alone = [record[key] for record in costs if key in record]
    return statistics.median(alone) if alone else statistics.mean(r[key] for r in own)


def table(answer: Answer) -> Iterator[str]:
    """Markdown: of each method the cheapest point at the mark, and that of the lowest error."""
    unit = "CPU s" if answer.in_seconds else "MACs"
    rival = answer.rival
    yield (
        f"The mark is {100 * answer.mark:.2f}% error: {answer.best.method} in "
        f"{_epochs(answer.best)}, and one standard error. The cheapest rival that reaches it: "
        f"{rival.method} in {_epochs(rival)}."
    )
    yield ""
    more = answer.best.more
    titles = [
        *("method", f"{unit} to the mark", "saved", "lowest error %", "of", "NLL", "CPU s"),
        *("GMACs", "rate", "seeds", *more),
    ]
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for name, points in answer.methods().items():
        low, there = min(points, key=lambda p: p.error), answer.reaches(points)
        reached = ("not reached", "-")
        if there is not None:
            saved = f"{answer.saved(there):.0%}"
            reached = (
                f"{_cost(answer, there)} in {_epochs(there)}",
                f"**{saved}**" if there.ours else saved,
            )
        cells = [
            f"**{name}**" if low.ours else name,
            *reached,
            f"{100 * low.error:.2f}" + ("" if low.seeds < 2 else f" ± {100 * low.spread:.2f}"),
            _epochs(low),
            f"{low.nll:.3f}",
            "-" if low.seconds is None else f"{low.seconds:.0f}",
            f"{low.macs / 1e9:.0f}",
            f"{low.lr:g}",
            str(low.seeds),
            *(f"{low.more[title]:.3g}" for title in more),
        ]
        yield f"| {' | '.join(cells)} |"


def _epochs(point: Point) -> str:
    return f"{point.epochs} epoch{'s' * (point.epochs > 1)}"


def _cost(answer: Answer, point: Point) -> str:
    cost = answer.cost(point)
    return f"{cost:.3g}" if answer.in_seconds else f"{cost / 1e9:.0f} G"


def summary(results: Mapping[str, Any]) -> Iterator[str]:
    """All tables."""
    for answer in answers(results):
        yield from (f"\n### {answer.task}\n", *table(answer))
