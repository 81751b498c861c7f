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
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.case import OURS
from benchmarks.cases import cases
from benchmarks.clock import Times, copy_bandwidth, machine, measured
from benchmarks.lines import times_of
from benchmarks.report import RESULTS
from benchmarks.results import at_least, read_json
from fastfreeze.text import format_table

BASELINE = RESULTS / "cpu-xeon-1-thread.json"
LEAST_TOLERANCE, MOST_TOLERANCE = 0.05, 0.5
SPREADS = 2
FAILED = ("worse", "refused", "no such case")
Verdict = tuple[str, ...]  # the case, best rival, ratio before and now, tolerance, in a word


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    before = arguments.baseline["machine"]
    torch.set_num_threads(before["threads"])
    for key, now in machine().items():
        if key in ("cpu", "torch") and now != before[key]:
            print(f"{key}: {now}, the baseline has {before[key]}")
    bandwidth = copy_bandwidth()
    known, verdicts = cases(), []
    for name, entry in arguments.cases.items():
        found: Verdict = (name, *"----", "no such case")
        for _ in range(2):  # worse only once is noise
            if name in known:
                now = measured(known[name](), arguments.rounds, arguments.seconds, bandwidth)
                found = verdict(name, entry, now)
            if found[-1] != "worse":
                break
        verdicts.append(found)
    verdicts.sort(key=lambda v: v[-1] in FAILED)
    titles = ["case", "best rival", "before", "now", "tolerance", "verdict"]
    print(format_table(titles, [list(v) for v in verdicts]))
    return int(verdicts[-1][-1] in FAILED)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks guard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", nargs="*", help="default: all of the baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="JSON file")
    parser.add_argument("--rounds", type=at_least(2), default=101, help="at most")
    parser.add_argument("--seconds", type=float, default=10, help="for a case, about")
    arguments = parser.parse_args(argv)
    arguments.baseline = read_json(arguments.baseline)
    if not (there := arguments.baseline.get("results")):
        parser.error("--baseline must be a file of python -m benchmarks with results")
    if unknown := [name for name in arguments.case if name not in there]:
        parser.error(f"case must be in the baseline, got {', '.join(unknown)}")
    arguments.cases = {name: there[name] for name in arguments.case or there}
    return arguments


def verdict(name: str, before: Mapping, now: Mapping) -> Verdict:
    """Two entries of one case compared, by the rivals that both have."""
    old, new = times_of(before), times_of(now)
    rivals = [k for k in old if k in new and not k.startswith(OURS)]
    if OURS not in old or OURS not in new or not rivals:
        return name, *"----", "refused"
    best = [min(rivals, key=lambda k, times=times: times[k].median) for times in (old, new)]
    ratios = [t[rival].median / t[OURS].median for t, rival in zip((old, new), best, strict=True)]
    tolerance = tolerance_of([old[OURS], old[best[0]], new[OURS], new[best[1]]])
    change = ratios[1] / ratios[0] - 1
    word = "worse" if change < -tolerance else "better" if change > tolerance else "ok"
    return name, best[1], *(f"{ratio:.2f}" for ratio in ratios), f"{tolerance:.0%}", word


def tolerance_of(times: Sequence[Times]) -> float:
    """By which share a ratio of these medians may move."""
    spreads = [(t.high - t.low) / (2 * t.median) for t in times]
    return min(MOST_TOLERANCE, max(LEAST_TOLERANCE, SPREADS * math.hypot(*spreads)))
