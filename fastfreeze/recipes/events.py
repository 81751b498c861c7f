"""A run's metrics as event files, for TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastfreeze.recipes.rundir import Line

_PER_EPOCH = {
    "train_loss": "loss/train",
    "test_error": "error/test",
    "validation_error": "error/validation",
    "seconds": "time/seconds",
    "peak_memory_mb": "memory/peak_mb",
}
_IN_RESULT = ("error", "ensemble_error", "nll", "ece", "seconds", "backward_removed")


class Events:
    """The events of one method and seed; without TensorBoard, nothing is written.

    A resumed run writes them all anew, from the lines of metrics.jsonl that its checkpoint covers:
    what a killed process wrote after it is gone, and no step comes twice.

    Args:
        directory: of these events alone; emptied.
    """

    def __init__(self, directory: Path) -> None:
        self._writer: Any = None
        self._layers: list[str] = []
        if importlib.util.find_spec("tensorboard") is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        if directory.exists():
            shutil.rmtree(directory)
        self._writer = SummaryWriter(str(directory))

    def add(self, lines: Iterable[Line]) -> None:
        """Write lines of metrics.jsonl, in their order."""
        if self._writer is None:
            return
        for line in lines:
            if line["event"] == "start":
                self._layers = line["layers"]
            elif line["event"] == "epoch":
                self._add_epoch(line)
            elif line["event"] == "snapshot":
                self._writer.add_scalar("snapshots", line["cycle"] + 1, line["step"])
        self._writer.flush()

    def add_result(self, result: Line, step: int) -> None:
        """Write how a run ended."""
        if self._writer is None:
            return
        for key in _IN_RESULT:
            self._add(f"result/{key}", result[key], step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

    def _add_epoch(self, line: Line) -> None:
        for key, tag in _PER_EPOCH.items():
            self._add(tag, line.get(key), line["step"])
        self._add("frozen_layers", len(line["frozen_layers"]), line["step"])
        for i, lr in enumerate(line["lr"]):
            name = f"{i:03d}_{self._layers[i]}" if self._layers else i
            self._add(f"learning_rate/{name}", lr, line["step"])
        losses = line["step_losses"]
        for step, loss in enumerate(losses, line["step"] - len(losses)):
            self._add("loss/step", loss, step)

    def _add(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self._writer.add_scalar(tag, value, step)
