"""Lines of the tables: ours beside the fastest of its rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.case import OURS
from benchmarks.measure import Times

HEADER = "| case | fastfreeze | best rival | ratio | floor |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Line:
    """One of ours in one case.

    Attributes:
        case: name of the case for the table.
        label: the same, short.
        ours: which of ours.
        own: its times.
        rival: the fastest of the others.
        best: its times.
        floor: seconds that no rival can do without, None where nobody knows.
    """

    case: str
    label: str
    ours: str
    own: Times
    rival: str
    best: Times
    floor: float | None = None

    @property
    def ratio(self) -> float:
        """How many times as long the rival takes."""
        return self.best.median / self.own.median

    def __str__(self) -> str:
        """Markdown."""
        own = spread_text(self.own)
        cells = [
            self.case,
            own if self.ours == OURS else f"{self.ours}: {own}",
            f"{self.rival}: {spread_text(self.best)}",
            f"{self.ratio:.2f}",
            "-" if self.floor is None else seconds_text(self.floor),
        ]
        return f"| {' | '.join(cells)} |"


def lines_of(
    case: str,
    label: str,
    times: Mapping[str, Times],
    floor: float | None = None,
    ours: Sequence[str] | None = None,
) -> list[Line]:
    """A line for each of ours; none where one side is missing.

    Args:
        case, label: as in :class:`Line`.
        times: of ours and of its rivals, by name.
        floor: as in :class:`Line`.
        ours: names of ours in ``times``; those that begin with "fastfreeze" if not given.
    """
    if ours is None:
        ours = [name for name in times if name.startswith(OURS)]
    rivals = [name for name in times if name not in ours]
    if not rivals:
        return []
    best = min(rivals, key=lambda name: times[name].median)
    return [Line(case, label, name, times[name], best, times[best], floor) for name in ours]


def spread_text(times: Times) -> str:
    """The median and, in brackets, what it lies between."""
    factor, unit = _unit(times.median)
    median, low, high = (_digits(factor * t) for t in (times.median, times.low, times.high))
    return f"{median} {unit} ({low}-{high})" if low != high else f"{median} {unit}"


def seconds_text(seconds: float) -> str:
    factor, unit = _unit(seconds)
    return f"{_digits(factor * seconds)} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    if seconds < 1e-3:
        return 1e6, "µs"
    return (1e3, "ms") if seconds < 1 else (1, "s")


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
