"""python -m benchmarks.worth QUESTION --out FILE: errors and costs of all methods.

What is in the file is not run again: a command that was cut off goes on. Two passes:

--errors  All runs, several at once on a machine that may be busy: errors, and MACs, which are
          counted. The learning rate of a method is that of its grid with the lowest error on the
          validation set, with the middle budget and seed 0; all its other runs take it. While the
          best of a grid is at its edge, the next rate runs, too.
--costs   The CPU seconds of one run (seed 0) of each method and budget, one at a time, in rounds
          that take turns. A run during which others used the machine is thrown away.
"""

from __future__ import annotations

import argparse
import fnmatch
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.clock import machine
from benchmarks.results import read_json, write_json
from benchmarks.worth.answer import summary
from benchmarks.worth.passes import Children, alone, costs, errors
from benchmarks.worth.question import MODULES, Part, load

WHERE = ("cpu", "torch")  # of a machine's facts: what costs of one file have in common


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    words = sys.argv[1:] if argv is None else argv
    question = load(arguments.question)
    folder = arguments.data_dir.resolve()
    question.fetch(folder)
    here = {**machine(), "threads": 1}
    results = read_json(arguments.out) or {
        "machine": here,
        "command": shlex.join(["python", "-m", "benchmarks.worth", *words]),
        "worth": arguments.question,
        "runs": [],
        "costs": [],
    }
    if results["worth"] != arguments.question:
        sys.exit(f"{arguments.out} answers {results['worth']}, not {arguments.question}")
    part = Part(question, arguments.seeds, arguments.tasks, arguments.methods)
    save = partial(write_json, arguments.out, results)
    wrong = 0
    if not arguments.costs:
        with Children(arguments.question, folder, arguments.jobs) as children:
            wrong += errors(part, results["runs"], children, save)
    if not arguments.errors:
        if any(here[key] != results["machine"][key] for key in WHERE) and results["costs"]:
            sys.exit(f"{arguments.out} holds costs of {results['machine']}, this is {here}")
        results["machine"] = here
        run_alone = partial(alone, arguments.question, folder)
        wrong += costs(part, results["runs"], results["costs"], run_alone, save)
    print(*summary(results), sep="\n")
    return int(wrong > 0)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", choices=MODULES)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--errors", action="store_true", help="the first pass alone")
    only.add_argument("--costs", action="store_true", help="the second pass alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once in the first pass")
    parser.add_argument("--tasks", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--methods", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--data-dir", type=Path, default=Path("build/worth"), help="where downloads are kept"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON of all runs")
    arguments = parser.parse_args(argv)
    question = load(arguments.question)
    for option, known in (("tasks", question.budgets), ("methods", question.methods)):
        patterns = getattr(arguments, option)
        found = [n for pattern in patterns for n in fnmatch.filter(known, pattern)]
        if not found:
            parser.error(f"--{option} must match one of {', '.join(known)}, got {patterns}")
        setattr(arguments, option, list(dict.fromkeys(found)))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
