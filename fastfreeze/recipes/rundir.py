"""The directory of a run: what it was asked to do, how it went, and where it can go on.

::

    config.json           versions, command, arguments
    classes.txt           of a folder of images: the name of each output's class, in order
    metrics.jsonl         one line per epoch and event ("start", "freeze", "thaw", "snapshot")
    checkpoints/<run>.pt  the newest checkpoint of each method and seed
    best-<run>.pth        of ``finetune``: the weights of the epoch that is best on held-out images
    snapshots/<run>/      the members of each snapshot ensemble
    results.json          one entry per finished method and seed
    table.txt             what was printed
    ensemble-<run>.txt    each snapshot and the ensemble on the test images
    freezing-<run>.txt    what was saved as layers froze, since the run was started or resumed

A checkpoint is written after the lines that lead up to it. What a killed process has written after
its last checkpoint is dropped by :meth:`RunDir.rewind`. One process at a time writes there. No file
is read or written through a symbolic link.
"""

from __future__ import annotations

import io
import json
import math
import platform
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fastfreeze._version import __version__
from fastfreeze.files import (
    FileLock,
    append,
    lock_file,
    open_file,
    read_file,
    remove_temporaries,
    write_atomic,
)
from fastfreeze.recipes.errors import RecipeError, told
from fastfreeze.text import some

Line = dict[str, Any]


def run_name(method: str, seed: int) -> str:
    """One method's training with one seed, as files are named after it."""
    return f"{method}-seed{seed}"


class RunDir:
    """A run's directory; :meth:`create` makes one, :meth:`open` finds it again.

    Attributes:
        path: where it is.
        command: what made it, such as "reproduce snapshot".
        arguments: the fields of the command's configuration.
        data_dir: where the images were.
    """

    def __init__(self, path: Path, config: Line) -> None:
        self.path = path
        self.command: str = config["command"]
        self.arguments: Line = config["arguments"]
        self.data_dir: str | None = config["data_dir"]
        self._lock: FileLock | None = None  # once it writes

    @classmethod
    def create(cls, path: Path, command: str, arguments: Line, data_dir: Path | None) -> RunDir:
        """A new run directory.

        Raises:
            RecipeError: ``path`` is there already and not empty, or cannot be made.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RecipeError(
                f"{path} exists: go on with --resume {path}, or name another --run-dir"
            )
        config = {
            "fastfreeze": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "command": command,
            "arguments": arguments,
            "data_dir": None if data_dir is None else str(data_dir),
        }
        with told(f"cannot write to --run-dir {path}"):
            (path / "checkpoints").mkdir(parents=True)
            write_atomic(path / "config.json", _json_bytes(config))
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """The directory of an earlier run.

        Raises:
            RecipeError: it does not hold a run, or its config.json is damaged.
        """
        file = path / "config.json"
        if not file.exists():
            found = sorted(str(inner.parent) for inner in path.glob("*/config.json"))
            runs = f"; {some(found)} may be one" if found else ""
            raise RecipeError(f"{path} is no run directory: it holds no config.json{runs}")
        with told(f"{path} is no run directory: config.json holds no command with arguments"):
            config = _holding(json.loads(read_file(file)), "command", "arguments", "data_dir")
            _holding(config["arguments"], "model", "data", "seed")
        return cls(path, config)

    def snapshots(self, run: str) -> Path:
        """Where the snapshots of a run are kept."""
        return self.path / "snapshots" / run

    def log(self, line: Line) -> None:
        """Append a line to metrics.jsonl; ``method``, ``seed`` and ``step`` must be in it."""
        append(self.path / "metrics.jsonl", (json.dumps(line) + "\n").encode())

    def metrics(self) -> list[Line]:
        """The lines of metrics.jsonl, without a last one that was cut off.

        Raises:
            RecipeError: another line is damaged.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        with told(f"cannot read {path}"):
            *texts, _ = read_file(path).split(b"\n")
        lines = []
        for i, text in enumerate(texts, 1):
            with told(f"{path} is damaged: line {i} is {text[:60]!r}"):
                lines.append(_holding(json.loads(text), "method", "seed", "step"))
        return lines

    def rewind(self) -> None:
        """Take the directory over, and drop what was written after the last checkpoints.

        That is the lines after the checkpoint of their method and seed. Those of what has finished
        stay, whether or not its checkpoint is still there.

        Raises:
            RecipeError: another process writes to it, or a file is damaged.
        """
        try:
            self._lock = lock_file(self.path / ".lock")
        except BlockingIOError as error:
            raise RecipeError(f"{self.path} is in use by another process") from error
        checkpoints = self.path / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        for directory in (self.path, checkpoints):
            remove_temporaries(directory)
        reached = {run_name(r["method"], r["seed"]): math.inf for r in self.results()}
        kept = []
        for line in self.metrics():
            run = run_name(line["method"], line["seed"])
            if run not in reached:
                checkpoint = self.load_checkpoint(run)
                reached[run] = -1 if checkpoint is None else checkpoint["step"]
            if line["step"] <= reached[run]:
                kept.append(json.dumps(line) + "\n")
        write_atomic(self.path / "metrics.jsonl", "".join(kept).encode())

    def save_checkpoint(self, run: str, state: Line) -> None:
        """Replace the checkpoint of a run, all at once."""
        _save(self._checkpoint(run), state)

    def save_best(self, run: str, weights: dict[str, torch.Tensor]) -> None:
        """Replace the file of a run's best weights, all at once."""
        _save(self.path / f"best-{run}.pth", weights)

    def load_checkpoint(self, run: str) -> Line | None:
        """The newest checkpoint of a run, on the CPU; None before its first.

        Raises:
            RecipeError: the file is damaged.
        """
        path = self._checkpoint(run)
        if not path.exists():
            return None
        with self.using_checkpoint(run), open_file(path) as file:
            state: Line = torch.load(file, map_location="cpu", weights_only=True)
            int(state["step"])
        return state

    def using_checkpoint(self, run: str) -> AbstractContextManager[None]:
        """Any error inside is told as the checkpoint's fault."""
        what = f"{self._checkpoint(run)} is no checkpoint of this run"
        return told(what, f": remove it to train {run} from its start")

    def results(self) -> list[Line]:
        """One entry per finished method and seed.

        Raises:
            RecipeError: the file is damaged.
        """
        path = self.path / "results.json"
        if not path.exists():
            return []
        with told(f"{path} is damaged: it is no list of a run's results"):
            wanted = ("method", "seed", "error", "seconds", "cpu_seconds")
            return [_holding(result, *wanted) for result in json.loads(read_file(path))]

    def add_result(self, result: Line) -> None:
        """Add the entry of a method and seed that has finished."""
        write_atomic(self.path / "results.json", _json_bytes([*self.results(), result]))

    def _checkpoint(self, run: str) -> Path:
        return self.path / "checkpoints" / f"{run}.pt"


def _holding(entry: Any, *keys: str) -> Line:
    """An entry of one of our files; raises some error unless it is a dict with these keys."""
    if missing := set(keys) - entry.keys():
        raise ValueError(f"it lacks {some(sorted(missing))}")
    return dict(entry)


def _save(path: Path, state: Line) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
