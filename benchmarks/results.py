"""Results on disk: whole, or as they were before."""

from __future__ import annotations

import json
from pathlib import Path

from fastfreeze.files import write_atomic


def write_json(path: Path, results: dict) -> None:
    """Replace the file in one go, so that whoever is cut off leaves the last whole one."""
    write_atomic(path, (json.dumps(results, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """What is there; nothing if there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}
