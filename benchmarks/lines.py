"""Lines of the tables: ours beside the fastest of its rivals."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.case import OURS
from benchmarks.clock import Times

HEADER = "| case | fastfreeze | best rival | ratio | floor |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Line:
    """One of ours in one case, and the fastest of the others."""

    key: str
    case: str  # its name
    ours: str  # which of ours
    own: Times
    rival: str
    best: Times
    floor: float | None = None  # seconds that no rival can do without; None: nobody knows

    @property
    def ratio(self) -> float:
        """How many times as long the rival takes."""
        return self.best.median / self.own.median

    def __str__(self) -> str:
        """Markdown."""
        own = spread_text(self.own)
        return row(
            self.case,
            own if self.ours == OURS else f"{self.ours}: {own}",
            f"{self.rival}: {spread_text(self.best)}",
            f"{self.ratio:.2f}",
            "-" if self.floor is None else seconds_text(self.floor),
        )


def lines_of(key: str, entry: dict) -> list[Line]:
    """A line for each of ours in an entry of the results; none where one side is missing."""
    times = times_of(entry)
    rivals = [name for name in times if not name.startswith(OURS)]
    if not rivals:
        return []
    best = min(rivals, key=lambda name: times[name].median)
    floor = entry.get("floor_s")
    return [
        Line(key, entry["name"], name, times[name], best, times[best], floor)
        for name in times
        if name not in rivals
    ]


def times_of(entry: dict) -> dict[str, Times]:
    """Of each rival."""
    return {rival: Times(**times) for rival, times in entry["seconds"].items()}


def row(*cells: str) -> str:
    """Of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def spread_text(times: Times) -> str:
    """The median and, in brackets, what it lies between."""
    factor, unit = _unit(times.median)
    median, low, high = (_digits(factor * t) for t in (times.median, times.low, times.high))
    return f"{median} {unit} ({low}-{high})" if low != high else f"{median} {unit}"


def seconds_text(seconds: float) -> str:
    """With a unit."""
    factor, unit = _unit(seconds)
    return f"{_digits(factor * seconds)} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    if seconds < 1e-3:
        return 1e6, "µs"
    return (1e3, "ms") if seconds < 1 else (1, "s")


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
