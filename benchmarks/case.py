"""A case: rivals for one piece of work, of which only those that do it are timed.

Rivals work on their own copies of the data. One that fails, or gives another result than the rest,
is left out and named with the reason; if it is one of ours, the case is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastfreeze

Run = Callable[[], object]
OURS = "fastfreeze"  # the names of our runs begin so


@dataclass(kw_only=True)
class Case:
    """Rivals, and what their times are to be seen beside."""

    name: str  # for the table
    runs: dict[str, Run] = field(default_factory=dict)  # through the gate; each does the whole work
    left_out: dict[str, str] = field(default_factory=dict)  # who failed or gave another result
    bytes_moved: int | None = None  # at least read and written; None: memory is not what limits
    floor: Run | None = None  # takes as long as all must; None: a copy of bytes_moved
    share: tuple[str, float] | None = None  # or a rival, and the share of its time that all need

    def add(self, name: str, make: Callable[[], Run], check: Callable[[Run], str | None]) -> None:
        """Enter a run if it passes ``check``, which returns what is wrong or None."""
        try:
            run = make()
            wrong = check(run)
        except Exception as error:  # of whatever kind: the other rivals can still be timed
            wrong = why(error)
        if wrong is None:
            self.runs[name] = run
        else:
            self.left_out[name] = wrong


def refused(left_out: Iterable[str]) -> bool:
    """Whether one of ours is among those left out."""
    return any(name.startswith(OURS) for name in left_out)


def why(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0].strip()


def difference(
    results: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-5, atol: float = 1e-6
) -> str | None:
    """What is wrong with the results; None if each is within ``atol + rtol * |expected|``."""
    for i, (found, truth) in enumerate(zip(results, expected, strict=True)):
        if not torch.allclose(found.to(truth.dtype), truth, rtol, atol):
            error = (found - truth).abs().max().item()
            return f"another result: tensor {i} is off by up to {error:.1e}"
    return None


def own_backends(device: str) -> Mapping[str, str]:
    """The backends of a device, by the names of our runs."""
    names = {OURS: device}
    if device == "cuda" and fastfreeze.backends()["triton"].available:
        names[f"{OURS} triton"] = "triton"
    return names


def compiled_run(run: Run) -> Run:
    """For these shapes alone, and not as one more version of another case's function."""
    torch._dynamo.reset()
    return torch.compile(run, dynamic=False)


def graphed(run: Run, before: Run = lambda: None) -> Run:
    """The run as a CUDA graph, but for the first one, which makes what the others read.

    ``before`` runs each time, outside of the graph. On a CPU there is no graph.
    """
    graph, result, calls = None, None, 0

    def replayed() -> object:
        nonlocal graph, result, calls
        calls += 1
        before()
        if calls == 1 or not torch.cuda.is_initialized():
            return run()
        if graph is None:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = run()
        graph.replay()
        return result

    return replayed
