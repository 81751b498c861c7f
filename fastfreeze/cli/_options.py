"""What the commands' options have in common.

torch is imported when an option needs it: ``--help`` does not.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastfreeze.recipes.names import (
    DATA_NAMES,
    EMBEDDED,
    METHOD_NAMES,
    MODEL_NAMES,
    OTHER_MODELS,
)
from fastfreeze.schedule import FreezeOut, FreezeOutCycles


class Finite(click.FloatRange):
    """A number in a range that is neither infinite nor NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"must be a finite number, got {number}", param, ctx)
        return number


AT_LEAST_1 = click.IntRange(min=1)
DIRECTORY = click.Path(path_type=Path, file_okay=False)
RUN = click.Path(path_type=Path, file_okay=False, exists=True)


def methods(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Names of methods, with commas between; each once."""
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    for name in names:
        if name not in METHOD_NAMES:
            near = difflib.get_close_matches(name, METHOD_NAMES, 1)
            did = f"; did you mean {near[0]}?" if near else ""
            raise click.BadParameter(f"{name!r} is none of {', '.join(METHOD_NAMES)}{did}")
    return names


def model_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """The name of a network."""
    from fastfreeze.recipes.networks import check_name

    try:
        check_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


def device_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A device that is here: "cpu" or "cuda:<n>"."""
    import torch

    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise click.BadParameter(f"{value!r} is no torch device") from error
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"must be cpu or cuda, got {value!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.ClickException(f"--device {value}: torch sees no such device here")
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


Command = Callable[..., Any]


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one, which ``--help`` lists in this order."""

    def add(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


t_0_option = click.option(
    "--t0",
    "t_0",
    type=Finite(0, 1, min_open=True),
    default=FreezeOut.t_0,
    help="FreezeOut: share of the run, before how_scale, for which layer 0 trains.",
)


freezeout_options = options(
    click.option(
        "--how-scale",
        type=click.Choice(["linear", "squared", "cubic"]),
        default=FreezeOut.how_scale,
    ),
    t_0_option,
    click.option(
        "--lr",
        type=Finite(min=0, min_open=True),
        default=0.1,
        help="Initial learning rate.",
    ),
)

DATA_DIR = click.option(
    "--data-dir", type=DIRECTORY, help=f"Where the data's files are; not for {EMBEDDED}."
)


def data_options(data: str, image_size: int, model: str) -> Callable[[Command], Command]:
    """What is trained on what, with these defaults."""
    return options(
        click.option("--data", type=click.Choice(DATA_NAMES), default=data),
        DATA_DIR,
        click.option(
            "--image-size",
            type=click.IntRange(min=8),
            default=image_size,
            help="For --data folder.",
        ),
        click.option(
            "--model",
            callback=model_name,
            default=model,
            help=f"{', '.join(MODEL_NAMES)}; {', '.join(OTHER_MODELS)}, the last your own.",
        ),
    )


# What train and compare share: data, network, length, methods' parameters.
training_options = options(
    data_options(EMBEDDED, 64, "tiny-resnet20"),
    click.option("--epochs", type=AT_LEAST_1, default=15),
    click.option("--batch-size", type=AT_LEAST_1, default=64),
    freezeout_options,
    click.option("--cycles", type=AT_LEAST_1, default=5, help="Snapshots."),
    click.option(
        "--composition",
        type=click.Choice(["sticky", "last_k", "thaw"]),
        default=FreezeOutCycles.composition,
        help="How the method 'both' freezes.",
    ),
    click.option("--last-k", type=AT_LEAST_1, default=2, help="For --composition last_k."),
)
