"""python -m benchmarks [CASE ...]: compare, print a Markdown table, write results as JSON.

python -m benchmarks report: tables and a picture of all results.
python -m benchmarks guard: measure anew and compare the ratios with those of a baseline.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import guard, report
from benchmarks.cases import ALL_CASES, CASES
from benchmarks.compare import copy_bandwidth, lines_of_entry, measured
from benchmarks.lines import HEADER
from benchmarks.measure import machine
from benchmarks.results import write_json

COMMANDS = {"report": report.main, "guard": guard.main}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    bandwidth = copy_bandwidth()
    facts = {**machine(), "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    command = shlex.join(["python", "-m", "benchmarks", *argv])
    results: dict = {"machine": facts, "command": command, "results": {}}
    print(f"{facts}\n\n{HEADER}", flush=True)
    refused = False
    for name in arguments.cases:
        case = ALL_CASES[name]()
        refused |= case.refused
        entry = measured(case, arguments.rounds, arguments.seconds, bandwidth)
        results["results"][name] = entry
        left_out = [f"{name}: {rival}: {why}" for rival, why in case.left_out.items()]
        print(*lines_of_entry(name, entry), *left_out, sep="\n", flush=True)
        if arguments.out:
            write_json(arguments.out, results)
    return int(refused)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", nargs="*", default=["*"], help="names or patterns; default: all")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with them those that compile an optimizer's step, which takes minutes each",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=101, help="at most")
    parser.add_argument("--seconds", type=float, default=10, help="for a case, about")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args(argv)
    known = ALL_CASES if arguments.compile else CASES
    found = {pattern: fnmatch.filter(known, pattern) for pattern in arguments.case}
    for pattern, names in found.items():
        if not names:
            parser.error(f"case must be one of {', '.join(known)} or a pattern, got {pattern!r}")
    arguments.cases = list(dict.fromkeys(itertools.chain(*found.values())))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
