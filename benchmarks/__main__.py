"""python -m benchmarks [CASE ...]: compare, print a Markdown table, write results as JSON.

python -m benchmarks report: tables and a picture of all results.
python -m benchmarks guard: measure anew and compare the ratios with those of a baseline.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import sys
from collections.abc import Sequence

import torch

from benchmarks import guard, report
from benchmarks.case import OURS, refused, why
from benchmarks.cases import cases
from benchmarks.clock import copy_bandwidth, machine, measured
from benchmarks.jobs import DIED, context_is_broken
from benchmarks.results import add, at_least, begun, parser, read_json, write_json

COMMANDS = {"report": report.main, "guard": guard.main}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    bandwidth = copy_bandwidth(arguments.device)
    facts = {**machine(arguments.device), "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    results = begun(facts, "benchmarks", argv)
    if arguments.go_on and arguments.out:
        results |= read_json(arguments.out)
    for name, make in arguments.cases.items():
        if name in results["results"]:
            continue
        if arguments.out:  # of a case that ends this process, that is what is known
            unknown = {**results["results"], name: _failed(name, "has not ended")}
            write_json(arguments.out, {**results, "results": unknown})
        try:
            entry = measured(make(), arguments.rounds, arguments.seconds, bandwidth)
        except Exception as error:  # of whatever kind: the other cases can still be measured
            entry = _failed(name, why(error))
        add(results, name, entry, arguments.out)
        if context_is_broken():
            print(f"{name} has broken the CUDA context; --go-on does the rest")
            return DIED
    return int(any(refused(entry["left_out"]) for entry in results["results"].values()))


def _failed(name: str, reason: str) -> dict:
    return {"name": name, "left_out": {OURS: reason}, "seconds": {}}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    made = parser("benchmarks", __doc__)
    made.add_argument("case", nargs="*", default=["*"], help="names or patterns; default: all")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    about = "rivals that torch.compile takes minutes for, too"
    made.add_argument("--compile", action="store_true", help=about)
    made.add_argument("--threads", type=at_least(1), default=1)
    about = "at most; 0: only whether all do the same"
    made.add_argument("--rounds", type=at_least(0), default=101, help=about)
    made.add_argument("--seconds", type=float, default=10, help="for a case, about")
    about = "leave out the cases that the file has already"
    made.add_argument("--go-on", action="store_true", help=about)
    arguments = made.parse_args(argv)
    known = cases(arguments.device, arguments.compile)
    found = {pattern: fnmatch.filter(known, pattern) for pattern in arguments.case}
    for pattern, names in found.items():
        if not names:
            made.error(f"case must be one of {', '.join(known)} or a pattern, got {pattern!r}")
    arguments.cases = {name: known[name] for name in itertools.chain(*found.values())}
    return arguments


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False  # results are compared closely
    sys.exit(main())
