"""Results on disk: whole, or as they were before."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from fastfreeze.files import write_atomic


def write_json(path: Path, results: dict) -> None:
    """Replace the file in one go, so that whoever is cut off leaves the last whole one."""
    write_atomic(path, (json.dumps(results, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """What is there; nothing if there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def hardware_of(data: dict) -> str:
    """Machine, threads and versions, in words."""
    machine = data["machine"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    return (
        f"{machine['cpu']}, {threads}; torch {machine['torch']}, "
        f"Python {machine['python']}, fastfreeze {machine['fastfreeze']}"
    )


def command_of(data: dict) -> str:
    """What made the results, but for where it wrote them."""
    words = iter(shlex.split(data.get("command", "python -m benchmarks")))
    kept = []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return shlex.join(kept)


def made_by(data: dict, name: str) -> str:
    """The command and a link from docs/ to the file of that name."""
    note = f"; {data['note']}" if "note" in data else ""
    return f"`{command_of(data)}`{note} ([data](../benchmarks/results/{name}))"
