"""The command ``fastfreeze``: train, plot, plan, backends.

Exit codes: 0 done, 1 failed for a reason that the message tells, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

try:
    import click
    from click.core import ParameterSource
except ModuleNotFoundError:
    sys.exit('fastfreeze: the command line needs click: pip install "fastfreeze[train]"')

from fastfreeze._version import __version__
from fastfreeze.errors import SnapshotError
from fastfreeze.freezing import split
from fastfreeze.ops._library import backends
from fastfreeze.recipes.data import DATA_NAMES, ImageData, load_data
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.models import MODEL_NAMES, build_model
from fastfreeze.recipes.plot import plot_run
from fastfreeze.recipes.report import text_table
from fastfreeze.recipes.rundir import RunDir
from fastfreeze.recipes.runs import METHOD_NAMES, TrainConfig, describe, run_all
from fastfreeze.schedule import FreezeOut, HowScale
from fastfreeze.text import format_table


class _Group(click.Group):
    """Tells expected errors in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (RecipeError, SnapshotError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train faster by freezing, and get an ensemble for free."""


def _methods(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    for name in names:
        if name not in METHOD_NAMES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(METHOD_NAMES)}")
    return names


def _finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"must be a finite number, got {value}")
    return value


def _model(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        with torch.device("meta"):
            build_model(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise click.BadParameter(f"{value!r} is no torch device") from error
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"must be cpu or cuda, got {value!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.ClickException(f"--device {value}: torch sees no such device here")
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


_AT_LEAST_1 = click.IntRange(min=1)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)
_RUN = click.Path(path_type=Path, file_okay=False, exists=True)


def _freezeout_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that train and plan share."""
    for option in (
        click.option(
            "--lr",
            type=click.FloatRange(min=0, min_open=True),
            callback=_finite,
            default=0.1,
            help="Initial learning rate.",
        ),
        click.option(
            "--t0",
            "t_0",
            type=click.FloatRange(0, 1, min_open=True),
            callback=_finite,
            default=0.5,
            help="FreezeOut: share of the run, before --how-scale, for which layer 0 trains.",
        ),
        click.option(
            "--how-scale", type=click.Choice(["linear", "squared", "cubic"]), default="cubic"
        ),
    ):
        command = option(command)
    return command


@main.command(context_settings={"show_default": True})
@click.option(
    "--methods",
    callback=_methods,
    default=",".join(METHOD_NAMES),
    help="Which of them, with commas between.",
)
@click.option("--data", type=click.Choice(DATA_NAMES), default="mnist5k")
@click.option("--data-dir", type=_DIRECTORY, help="Where the files of --data are; not for mnist5k.")
@click.option("--image-size", type=click.IntRange(min=8), default=64, help="For --data folder.")
@click.option("--model", callback=_model, default="tiny-resnet20", help=", ".join(MODEL_NAMES))
@click.option("--epochs", type=_AT_LEAST_1, default=15)
@click.option("--batch-size", type=_AT_LEAST_1, default=64)
@_freezeout_options
@click.option("--cycles", type=_AT_LEAST_1, default=5, help="Snapshots.")
@click.option(
    "--composition",
    type=click.Choice(["sticky", "last_k", "thaw"]),
    default="sticky",
    help="How the method 'both' freezes.",
)
@click.option("--last-k", type=_AT_LEAST_1, default=2, help="For --composition last_k.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--seeds", type=_AT_LEAST_1, default=1, help="Repeat with so many seeds.")
@click.option("--device", callback=_device, default="cpu", help="cpu, cuda or cuda:<n>.")
@click.option("--threads", type=_AT_LEAST_1, help="Threads of torch. [default: torch's own]")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, help="Processes that read images."
)
@click.option("--run-dir", type=_DIRECTORY, help="Where to write. [default: runs/<time>]")
@click.option("--resume", type=_RUN, metavar="RUN", help="Go on with an interrupted run.")
@click.option("--quiet", is_flag=True, help="No progress, only the table.")
@click.option("--json", "as_json", is_flag=True, help="The results as JSON.")
@click.pass_context
def train(
    ctx: click.Context,
    /,
    data_dir: Path | None,
    workers: int,
    run_dir: Path | None,
    resume: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train with plain SGD, FreezeOut, Snapshot Ensembles and both, and compare them.

    The default takes minutes on a laptop: 5,000 MNIST digits, which come with a Python package.

    \b
    Examples:
      fastfreeze train
      fastfreeze train --data cifar10 --data-dir data --model wrn16-2 --epochs 100 --device cuda
      fastfreeze train --resume runs/2026-01-31-120000

    Ctrl-C stops a run; --resume goes on from the last finished epoch, and on a CPU ends with the
    same weights, bit for bit, as if it had not been stopped.
    """
    if resume is None:
        options["threads"] = options["threads"] or torch.get_num_threads()
        config = TrainConfig(**options)
        directory = run_dir or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    else:
        run = RunDir.open(resume)
        config = _saved_config(ctx, run)
        data_dir = data_dir or (Path(run.config["data_dir"]) if run.config["data_dir"] else None)
    if config.data == "mnist5k" and data_dir is not None:
        raise click.UsageError("--data-dir is not for --data mnist5k, which needs no files")
    torch.set_num_threads(config.threads)
    data = load_data(config.data, data_dir, workers=workers, image_size=config.image_size)
    try:
        config.check(data)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if resume is None:
        run = RunDir.create(directory, {**describe(config), "data_dir": data_dir and str(data_dir)})
    _train(run, config, data, quiet)
    if as_json:
        click.echo(json.dumps({"run_dir": str(run.path), "results": run.results()}, indent=2))
    else:
        click.echo(text_table(run.results()))


def _saved_config(ctx: click.Context, run: RunDir) -> TrainConfig:
    """The run's own configuration; options that say otherwise are an error."""
    try:
        saved = run.config["arguments"]
        config = TrainConfig(**{**saved, "methods": tuple(saved["methods"])})
    except (KeyError, TypeError) as error:
        raise RecipeError(f"{run.path}/config.json is not of this version: {error!r}") from error
    given = [
        parameter
        for parameter in ctx.command.params
        if ctx.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]
    for parameter in given:
        name = str(parameter.name)
        if name == "run_dir":
            raise click.UsageError("--run-dir and --resume exclude each other")
        if hasattr(config, name) and getattr(config, name) != ctx.params[name]:
            raise click.UsageError(
                f"{parameter.opts[0]} {ctx.params[name]} contradicts the run's "
                f"{getattr(config, name)}: a resumed run keeps its options"
            )
    return config


def _train(run: RunDir, config: TrainConfig, data: ImageData, quiet: bool) -> None:
    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    say(f"run directory: {run.path}")
    try:
        run_all(config, data, run, say, quiet)
    except KeyboardInterrupt:
        click.echo(
            f"Interrupted. Go on with: fastfreeze train --resume {shlex.quote(str(run.path))}",
            err=True,
        )
        raise click.exceptions.Exit(130) from None


@main.command()
@click.argument("run", type=_RUN)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: RUN/plot.png]"
)
def plot(run: Path, output: Path | None) -> None:
    """Draw a run's learning rates, losses and times of a step as a PNG.

    \b
    Example:
      fastfreeze plot runs/2026-01-31-120000
    """
    path = output or run / "plot.png"
    try:
        plot_run(RunDir.open(run), path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error}") from error
    click.echo(path)


@main.command(context_settings={"show_default": True})
@click.argument("model", callback=_model)
@click.option("--steps", type=_AT_LEAST_1, default=1000, help="Length of the run.")
@_freezeout_options
@click.option("--num-classes", type=_AT_LEAST_1, default=10)
@click.option("--in-channels", type=_AT_LEAST_1, default=3)
@click.option("--image-size", type=click.IntRange(min=8), default=32)
@click.option("--json", "as_json", is_flag=True, help="The layers as JSON.")
def plan(
    model: str,
    steps: int,
    lr: float,
    t_0: float,
    how_scale: HowScale,
    num_classes: int,
    in_channels: int,
    image_size: int,
    as_json: bool,
) -> None:
    """Show a model's layers, when FreezeOut freezes them, and what that saves.

    \b
    Examples:
      fastfreeze plan resnet110 --t0 0.8
      fastfreeze plan densenet-bc-76 --steps 78200 --num-classes 100
    """
    schedule = FreezeOut(steps, t_0=t_0, how_scale=how_scale)
    with torch.device("meta"):
        network = build_model(model, num_classes=num_classes, in_channels=in_channels)
        images = torch.empty(2, in_channels, image_size, image_size)
    layers = split(network, images, schedule=schedule, lr=lr)
    if not as_json:
        click.echo(str(layers))
        return
    rows = [
        {
            "index": layer.index,
            "name": layer.name,
            "parameters": sum(p.numel() for p in layer.trainable),
            "backward_share": layers.backward_share(layer.index),
            "freezes_at_step": list(schedule.freeze_steps(layer.index, len(layers.layers))),
            "initial_lr": schedule.lr(0, lr, layer.index, len(layers.layers)),
        }
        for layer in layers.layers
    ]
    savings = {
        "backward_saving": layers.backward_saving,
        "compute_saving": layers.compute_saving,
    }
    click.echo(json.dumps({"layers": rows, **savings}, indent=2))


@main.command("backends")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def show_backends(as_json: bool) -> None:
    """Show which kernels can run here, and why others cannot.

    \b
    Example:
      fastfreeze backends
    """
    found = backends()
    if as_json:
        click.echo(json.dumps({name: asdict(state) for name, state in found.items()}, indent=2))
        return
    rows = [
        [name, "yes" if state.available else "no", state.reason] for name, state in found.items()
    ]
    click.echo(format_table(["backend", "available", "why"], rows))
