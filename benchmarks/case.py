"""A case: rivals for one piece of work, of which only those that do it are timed.

Rivals work on their own copies of the data. One that fails, or gives another result than the rest,
is left out and named with the reason; if it is one of ours, the case is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Run = Callable[[], object]
OURS = "fastfreeze"  # the names of our runs begin so


@dataclass
class Rivals:
    """Runs by name, all of them through the gate.

    Attributes:
        runs: each does the whole work once.
        left_out: those that failed or gave another result, and why.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Run], check: Callable[[Run], str | None]) -> None:
        """Enter a run if it passes ``check``, which returns what is wrong or None."""
        try:
            run = make()
            wrong = check(run)
        except Exception as error:  # of whatever kind: the other rivals can still be timed
            lines = f"{type(error).__name__}: {error}".splitlines()
            wrong = lines[0].strip()
        if wrong is None:
            self.runs[name] = run
        else:
            self.left_out[name] = wrong

    @property
    def refused(self) -> bool:
        """Whether one of ours is left out."""
        return any(name.startswith(OURS) for name in self.left_out)


@dataclass(kw_only=True)
class Case(Rivals):
    """Rivals, and what their times are to be seen beside.

    Attributes:
        name: for the table.
        bytes_moved: the least that can be read and written; None: the memory is not what limits.
        floor: what takes as long as no rival can do without; None: a copy of ``bytes_moved``.
    """

    name: str
    bytes_moved: int | None = None
    floor: Run | None = None


def difference(
    results: Sequence[Tensor],
    expected: Sequence[Tensor],
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> str | None:
    """What is wrong with the results; None if each is within ``atol + rtol * |expected|``."""
    for i, (found, truth) in enumerate(zip(results, expected, strict=True)):
        beyond = (found - truth).abs() - rtol * truth.abs()
        worst = beyond.max().item() if beyond.numel() else 0.0
        if not worst <= atol:
            error = (found - truth).abs().max().item()
            return f"another result: tensor {i} is off by up to {error:.1e}"
    return None


def compiled_run(run: Run, **options: str) -> Run:
    """For these shapes alone, and not as one more version of another case's function."""
    torch._dynamo.reset()
    return torch.compile(run, dynamic=False, **options)
