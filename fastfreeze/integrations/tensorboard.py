"""TensorBoard: learning rates, freezes and savings, written to the user's ``SummaryWriter``."""

from __future__ import annotations

from typing import Any

from fastfreeze.layers.freeze import FreezeScheduler
from fastfreeze.layers.report import FreezeReport
from fastfreeze.optim import FusedOptimizer


def log_step(writer: Any, optimizer: FusedOptimizer | FreezeScheduler) -> None:
    """Write each layer's learning rate, and how many layers are frozen, at the present step.

    ::

        writer = torch.utils.tensorboard.SummaryWriter("runs/freezeout")
        optimizer.register_step_post_hook(lambda *_: log_step(writer, optimizer))

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or what has its methods.
        optimizer: its ``current_step`` is the axis; the rates are those of the step to come. Or the
            scheduler that freezes for another one; to be called after each ``scheduler.step``.

    Raises:
        TypeError: ``writer`` or ``optimizer`` is something else.
    """
    _check_writer(writer)
    if not isinstance(optimizer, (FusedOptimizer, FreezeScheduler)):
        raise TypeError(
            "optimizer must be a fastfreeze.SGD, Adam or AdamW, or a FreezeScheduler, got "
            f"{type(optimizer).__name__}"
        )
    step = optimizer.current_step
    stepped = optimizer.optimizer if isinstance(optimizer, FreezeScheduler) else optimizer
    for i, group in enumerate(stepped.param_groups):
        name = f"{group['layer_index']:03d}_{group['layer_name']}" if "layer_name" in group else i
        writer.add_scalar(f"learning_rate/{name}", float(group["lr"]), step)
    writer.add_scalar("frozen_layers", len(optimizer.frozen_layers), step)


def log_report(writer: Any, report: FreezeReport) -> None:
    """Write what each freeze was to save and saves, at its step, and the report's table.

    Step times are relative to those before the event, as in :class:`fastfreeze.FreezeRow`. To be
    called once, when the training is over: an event is measured in the steps after it.

    Args:
        writer: as in :func:`log_step`.
        report: of the training.

    Raises:
        TypeError: ``writer`` is something else.
    """
    _check_writer(writer)
    for row in report.rows:
        ratios = {"predicted": row.predicted, "limit": row.limit, "measured": row.measured}
        for name, ratio in ratios.items():
            if ratio is not None:
                writer.add_scalar(f"step_time/{name}", ratio, row.step)
    indented = "\n".join(f"    {line}" for line in str(report).splitlines())
    writer.add_text("freezing", indented)


def _check_writer(writer: Any) -> None:
    if not (hasattr(writer, "add_scalar") and hasattr(writer, "add_text")):
        raise TypeError(
            "writer must be a torch.utils.tensorboard.SummaryWriter (pip install tensorboard), "
            f"got {type(writer).__name__}"
        )
