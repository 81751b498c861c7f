"""Plain text for tables and messages."""

from __future__ import annotations

import re
from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table; columns whose every cell starts like a number are aligned right."""
    columns = []
    for header, *cells in zip(headers, *rows, strict=True):
        width = max(map(len, [header, *cells]))
        right = all(re.match(r"[-+]?\d|-?$", cell) for cell in cells)
        columns.append([f"{x:>{width}}" if right else f"{x:<{width}}" for x in [header, *cells]])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def human_count(count: int) -> str:
    """A count in three or four characters: 640, 9.5k, 11.7M."""
    if count < 1000:
        return str(count)
    digits, power = f"{count:.2e}".split("e")
    thousands, shift = divmod(int(power), 3)
    return f"{float(digits) * 10**shift:.3g}{'kMGT'[thousands - 1]}"


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def ranges(indices: Sequence[int]) -> str:
    """Rising numbers, runs of them as first..last."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return ", ".join(texts) or "none"
