"""python -m benchmarks guard: have we become slower beside our rivals?

The cases of a baseline are measured anew, with its threads, and the ratios to the best rival are
compared, not the times: a ratio moves little with the machine's load. A case is worse if its ratio
has fallen by more than the tolerance twice in a row. The tolerance is twice the relative half
spread (quartiles) of the four medians, added in quadrature, but at least 5% and at most 50%.
A ratio does depend on the processor and on torch: where they are others, that is told.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.case import OURS, Case
from benchmarks.cases import ALL_CASES
from benchmarks.compare import copy_bandwidth, measured
from benchmarks.measure import Times, machine
from benchmarks.report import RESULTS
from benchmarks.results import read_json
from fastfreeze.text import format_table

BASELINE = str(RESULTS / "cpu-xeon-1-thread.json")
LEAST_TOLERANCE, MOST_TOLERANCE = 0.05, 0.5
SPREADS = 2
FAILED = ("worse", "refused", "no such case")


@dataclass(frozen=True)
class Verdict:
    """Of one case.

    Attributes:
        case: its name.
        verdict: "ok", "better", or one of ``FAILED``.
        rival: with whom we are compared.
        before, now: the ratios.
        tolerance: by how much a ratio may fall, as a share.
    """

    case: str
    verdict: str
    rival: str = ""
    before: float = math.nan
    now: float = math.nan
    tolerance: float = math.nan

    @property
    def failed(self) -> bool:
        return self.verdict in FAILED

    def cells(self) -> list[str]:
        if math.isnan(self.now):
            return ["-"] * 4
        return [self.rival, f"{self.before:.2f}", f"{self.now:.2f}", f"{self.tolerance:.0%}"]


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    baseline = arguments.baseline
    torch.set_num_threads(baseline["machine"]["threads"])
    bandwidth = copy_bandwidth()
    for text in other_machine(baseline["machine"], machine()):
        print(text)
    verdicts = compare(
        {name: baseline["results"][name] for name in arguments.case or baseline["results"]},
        ALL_CASES,
        lambda case: measured(case, arguments.rounds, arguments.seconds, bandwidth),
    )
    print(table(verdicts))
    return int(any(v.failed for v in verdicts))


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks guard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", nargs="*", help="default: all of the baseline")
    parser.add_argument("--baseline", type=_baseline, default=BASELINE, help="JSON file")
    parser.add_argument("--rounds", type=int, default=101, help="at most")
    parser.add_argument("--seconds", type=float, default=10, help="for a case, about")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.case if name not in arguments.baseline["results"]]:
        parser.error(f"case must be in the baseline, got {', '.join(unknown)}")
    return arguments


def _baseline(path: str) -> dict:
    data = read_json(Path(path))
    if "results" not in data:
        raise argparse.ArgumentTypeError(f"must be a file of python -m benchmarks, got {path}")
    return data


def other_machine(before: Mapping, now: Mapping) -> list[str]:
    """What is not as it was for the baseline, and moves ratios by itself."""
    keys = ("cpu", "torch")
    return [f"{k}: {now[k]}, the baseline has {before[k]}" for k in keys if now[k] != before[k]]


def compare(
    baseline: Mapping[str, dict],
    cases: Mapping[str, Callable[[], Case]],
    measure: Callable[[Case], dict],
) -> list[Verdict]:
    """Measure each case of the baseline; one that is worse a second time."""
    verdicts = []
    for name, before in baseline.items():
        if name not in cases:
            verdicts.append(Verdict(name, "no such case"))
            continue
        case = cases[name]()
        found = verdict(name, before, measure(case))
        if found.verdict == "worse":
            found = verdict(name, before, measure(case))
        verdicts.append(found)
    return verdicts


def verdict(name: str, before: dict, now: dict) -> Verdict:
    """Two entries of one case compared, by the rivals that both have."""
    old, new = ({k: Times(**t) for k, t in e["seconds"].items()} for e in (before, now))
    rivals = [k for k in old if k in new and not k.startswith(OURS)]
    if OURS not in old or OURS not in new or not rivals:
        return Verdict(name, "refused")
    best = [min(rivals, key=lambda k, times=times: times[k].median) for times in (old, new)]
    ratios = [t[rival].median / t[OURS].median for t, rival in zip((old, new), best, strict=True)]
    tolerance = tolerance_of([old[OURS], old[best[0]], new[OURS], new[best[1]]])
    word = "ok"
    if ratios[1] < ratios[0] * (1 - tolerance):
        word = "worse"
    elif ratios[1] > ratios[0] * (1 + tolerance):
        word = "better"
    return Verdict(name, word, best[1], *ratios, tolerance)


def tolerance_of(times: Sequence[Times]) -> float:
    """By which share a ratio of these medians may move."""
    spreads = [(t.high - t.low) / (2 * t.median) for t in times]
    return min(MOST_TOLERANCE, max(LEAST_TOLERANCE, SPREADS * math.hypot(*spreads)))


def table(verdicts: Sequence[Verdict]) -> str:
    """Plain text; what failed comes last."""
    rows = [[v.case, *v.cells(), v.verdict] for v in sorted(verdicts, key=lambda v: v.failed)]
    return format_table(["case", "best rival", "before", "now", "tolerance", "verdict"], rows)
