"""What the commands' options have in common.

torch is imported when an option needs it: ``--help`` does not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.names import DATA_NAMES, EMBEDDED, METHOD_NAMES, MODEL_NAMES, OTHER_MODELS
from fastfreeze.schedule import Composition, FreezeOut, FreezeOutCycles, HowScale

if TYPE_CHECKING:
    from fastfreeze.recipes.rundir import RunDir


class Finite(click.FloatRange):
    """A number in a range that is neither infinite nor NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"must be a finite number, got {number}", param, ctx)
        return number


class _Methods(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Names of methods, with commas between; each once."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        known = click.Choice(METHOD_NAMES)
        return tuple(dict.fromkeys(known.convert(str(n).strip(), param, ctx) for n in names))


AT_LEAST_1 = click.IntRange(min=1)
DIRECTORY = click.Path(path_type=Path, file_okay=False)
RUN = click.Path(path_type=Path, file_okay=False, exists=True)
METHODS = _Methods()


def given(ctx: click.Context, name: str) -> bool:
    """Whether the user has typed an option."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _device_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
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


def _resumed(ctx: click.Context, param: click.Parameter, path: Path | None) -> RunDir | None:
    """The run to go on with, whose options are the defaults of this call."""
    if path is None:
        return None
    from fastfreeze.recipes.rundir import RunDir

    run = RunDir.open(path)
    if run.command != ctx.command_path.partition(" ")[2]:
        raise RecipeError(f"{path} is of another command: fastfreeze {run.command} --resume")
    ctx.default_map = {**run.arguments, "data_dir": run.data_dir}
    return run


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
    click.option("--how-scale", type=click.Choice(get_args(HowScale)), default=FreezeOut.how_scale),
    t_0_option,
    click.option(
        "--lr", type=Finite(min=0, min_open=True), default=0.1, help="Initial learning rate."
    ),
)
data_dir_option = click.option(
    "--data-dir", type=DIRECTORY, help=f"Where the data's files are; not for {EMBEDDED}."
)


def data_options(data: str, image_size: int, model: str) -> Callable[[Command], Command]:
    """What is trained on what, with these defaults."""
    sizes = click.IntRange(min=8)
    models = f"{', '.join(MODEL_NAMES)}; {', '.join(OTHER_MODELS)}, the last your own."
    return options(
        click.option("--data", type=click.Choice(DATA_NAMES), default=data),
        data_dir_option,
        click.option("--image-size", type=sizes, default=image_size, help="For --data folder."),
        click.option("--model", default=model, help=models),
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
        type=click.Choice(get_args(Composition)),
        default=FreezeOutCycles.composition,
        help="How the method 'both' freezes.",
    ),
    click.option("--last-k", type=AT_LEAST_1, default=2, help="For --composition last_k."),
)


def seed_options(default: int, minimum: int = 1) -> Callable[[Command], Command]:
    """``--seed`` and ``--seeds``."""
    counts = click.IntRange(min=minimum)
    return options(
        click.option("--seed", type=click.IntRange(0, 2**32), default=0, help="The first seed."),
        click.option("--seeds", type=counts, default=default, help="Repeat with so many seeds."),
    )


# Where to run, where to write, what to print.
run_options = options(
    click.option("--device", callback=_device_name, default="cpu", help="cpu, cuda, cuda:<n>."),
    click.option(
        "--threads",
        type=click.IntRange(1, os.cpu_count()),
        help="Threads of torch. [default: torch's own]",
    ),
    click.option(
        "--workers", type=click.IntRange(min=0), default=0, help="Processes that read images."
    ),
    click.option("--run-dir", type=DIRECTORY, help="Where to write. [default: runs/<time>]"),
    click.option(
        "--resume",
        type=RUN,
        callback=_resumed,
        is_eager=True,
        metavar="RUN",
        help="Go on with an interrupted run.",
    ),
    click.option("--quiet", is_flag=True, help="No progress, only the table."),
    click.option("--json", "as_json", is_flag=True, help="The results as JSON."),
)
