"""Results on disk: whole, or as they were before.

A file holds the machine, the command and "results": by key an entry for each case, with its name
for tables, "seconds" of each rival (median, low, high), who is "left_out" and why, and "floor_s",
which no rival can do without, or None where nobody knows.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.lines import HEADER, lines_of
from fastfreeze.files import write_atomic


def write_json(path: Path, results: dict) -> None:
    """Replace the file in one go, so that whoever is cut off leaves the last whole one."""
    write_atomic(path, (json.dumps(results, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """What is there; nothing if there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def begun(machine: dict, module: str, argv: Sequence[str] | None) -> dict:
    """Results without an entry, of a module that runs with arguments; None: this process's."""
    print(f"{machine}\n\n{HEADER}", flush=True)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", module, *words])
    return {"machine": machine, "command": command, "results": {}}


def add(results: dict, key: str, entry: dict, out: Path | None) -> None:
    """Add an entry, print its lines, and write the file."""
    results["results"][key] = entry
    left_out = [f"{key}: {rival}: {reason}" for rival, reason in entry["left_out"].items()]
    print(*lines_of(key, entry), *left_out, sep="\n", flush=True)
    if out is not None:
        write_json(out, results)


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Of a command that has a file of results."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, help="write the results to this JSON file, too")
    return made


def at_least(minimum: int) -> Callable[[str], int]:
    """An argument's type."""

    def integer(text: str) -> int:
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return integer


def hardware_of(data: dict) -> str:
    """Machine, threads and versions, in words."""
    machine = data["machine"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    return (
        f"{machine.get('gpu', machine['cpu'])}, {threads}; torch {machine['torch']}, "
        f"Python {machine['python']}, fastfreeze {machine['fastfreeze']}"
    )


def made_by(data: dict, name: str) -> str:
    """The command, but for where it wrote, and a link from docs/ to the file of that name."""
    command = re.sub(r" --out[ =]('[^']*'|\S+)", "", data["command"])
    note = f"; {data['note']}" if "note" in data else ""
    return f"`{command}`{note} ([data](../benchmarks/results/{name}))"
