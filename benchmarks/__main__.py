"""python -m benchmarks [CASE ...]: compare, print a Markdown table, write results as JSON."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.cases import CASES, Case, copy_bandwidth
from benchmarks.measure import Times, interleave, machine
from benchmarks.results import write_json


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("case", nargs="*", choices=[[], *CASES], help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bandwidth = copy_bandwidth()
    facts = {**machine(), "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    print(f"{facts}\n\n{HEADER}")
    results = {}
    for name in arguments.case or CASES:
        case = CASES[name]()
        runs = case.runs if case.floor is None else {**case.runs, FLOOR: case.floor}
        times = interleave(runs, arguments.rounds)
        floor = times.pop(FLOOR).median if case.floor else case.bytes_moved / bandwidth
        print(row(case, times, floor), flush=True)
        results[name] = {
            "name": case.name,
            "bytes": case.bytes_moved,
            "floor_s": floor,
            "seconds": {rival: asdict(t) for rival, t in times.items()},
        }
    if arguments.out:
        write_json(arguments.out, {"machine": facts, "results": results})


FLOOR = "floor"
HEADER = (
    "| case | fastfreeze, µs (quartiles) | best rival, µs (quartiles) | ratio | floor, µs |\n"
    "|---|---|---|---|---|"
)


def row(case: Case, times: dict[str, Times], floor: float) -> str:
    """A line of the table: ours, the fastest rival, how many times it takes as long."""
    ours, *rivals = times
    best = min(rivals, key=lambda name: times[name].median)
    ratio = times[best].median / times[ours].median
    return (
        f"| {case.name} | {_micros(times[ours])} | {best}: {_micros(times[best])} "
        f"| {ratio:.2f} | {floor * 1e6:.0f} |"
    )


def _micros(t: Times) -> str:
    return f"{t.median * 1e6:.0f} ({t.low * 1e6:.0f}-{t.high * 1e6:.0f})"


if __name__ == "__main__":
    main()
