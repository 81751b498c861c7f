"""The directory of a run: what it was asked to do, how it went, and where it can go on.

::

    config.json           versions, command, arguments
    metrics.jsonl         one line per epoch and event ("start", "freeze", "thaw", "snapshot")
    checkpoints/<run>.pt  the newest checkpoint of each method and seed
    best-<run>.pth        the weights of the epoch that is best on the images held out, if it is of
                          ``finetune``
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
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.text import some

Line = dict[str, Any]


def run_name(method: str, seed: int) -> str:
    """How files of one method's training with one seed are called."""
    return f"{method}-seed{seed}"


def describe(command: str, arguments: Line, data_dir: Path | None) -> Line:
    """What config.json holds."""
    return {
        "fastfreeze": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": command,
        "arguments": arguments,
        "data_dir": None if data_dir is None else str(data_dir),
    }


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
        self.command: str = config.get("command", "")
        self.arguments: Line = config.get("arguments", {})
        data_dir = config.get("data_dir")
        self.data_dir = None if data_dir is None else Path(data_dir)
        self._lock: FileLock | None = None  # once it writes

    @classmethod
    def create(cls, path: Path, config: Line) -> RunDir:
        """A new run directory.

        Raises:
            RecipeError: ``path`` is there already and not empty, or cannot be made.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RecipeError(
                f"{path} exists: go on with --resume {path}, or name another --run-dir"
            )
        try:
            (path / "checkpoints").mkdir(parents=True)
            write_atomic(path / "config.json", _json_bytes(config))
        except OSError as error:
            raise RecipeError(f"cannot write to --run-dir {path}: {error}") from error
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
        config = _read_json(file)
        fields: dict[str, Any] = {"command": str, "arguments": dict, "data_dir": str | None}
        if not (
            isinstance(config, dict)
            and all(isinstance(config.get(key), kind) for key, kind in fields.items())
            and {"model", "data", "seed"} <= set(config["arguments"])
        ):
            raise RecipeError(
                f"{path} is no run directory: config.json holds no command, or no arguments with "
                "model, data, seed"
            )
        return cls(path, config)

    def snapshots(self, run: str) -> Path:
        """Where the snapshots of a run are kept."""
        return self.path / "snapshots" / run

    def log(self, line: Line) -> None:
        """Append a line to metrics.jsonl; ``method``, ``seed`` and ``step`` must be in it."""
        append(self.path / "metrics.jsonl", (json.dumps(line) + "\n").encode())

    def metrics(self) -> list[Line]:
        """The lines of metrics.jsonl, but for a last one that was not written to its end.

        Raises:
            RecipeError: a line was never one of ours.
        """
        path = self.path / "metrics.jsonl"
        try:
            *texts, last = read_file(path).split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RecipeError(f"cannot read {path}: {error}") from error
        lines = [_parsed_line(text) for text in texts]
        if None in lines:
            i = lines.index(None)
            raise RecipeError(f"{path} is damaged: line {i + 1} is {texts[i][:60]!r}")
        return [line for line in [*lines, _parsed_line(last)] if line is not None]

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
        try:
            with open_file(self._checkpoint(run)) as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
            int(state["step"])
        except FileNotFoundError:
            return None
        except Exception as error:  # torch raises many kinds for a damaged file
            raise self.damaged(run, error) from error
        return dict(state)

    def damaged(self, run: str, error: Exception) -> RecipeError:
        """What to raise if the checkpoint of a run is not one of it."""
        said = " ".join(f"{type(error).__name__}: {error}".split())  # torch's are of many lines
        return RecipeError(
            f"{self._checkpoint(run)} is no checkpoint of this run ({said}): remove it to train "
            f"{run} from its start"
        )

    def results(self) -> list[Line]:
        """One entry per finished method and seed.

        Raises:
            RecipeError: the file is damaged.
        """
        path = self.path / "results.json"
        if not path.exists():
            return []
        results = _read_json(path)
        wanted = {"error", "seconds", "cpu_seconds"}
        if not (
            isinstance(results, list)
            and all(_is_of_a_run(r) and wanted <= r.keys() for r in results)
        ):
            raise RecipeError(f"{path} is damaged: it is no list of a run's results")
        return results

    def add_result(self, result: Line) -> None:
        """Add the entry of a method and seed that has finished."""
        write_atomic(self.path / "results.json", _json_bytes([*self.results(), result]))

    def _checkpoint(self, run: str) -> Path:
        return self.path / "checkpoints" / f"{run}.pt"


def _is_of_a_run(entry: Any) -> bool:
    """Whether it names a method and a seed, of which files are called."""
    method, seed = (entry.get(k) if isinstance(entry, dict) else None for k in ("method", "seed"))
    return isinstance(method, str) and "/" not in method and isinstance(seed, int)


def _parsed_line(text: bytes) -> Line | None:
    """A line of metrics.jsonl; None if it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if _is_of_a_run(line) and isinstance(line.get("step"), int) else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error


def _save(path: Path, state: Line) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
