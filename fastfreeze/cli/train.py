"""``fastfreeze train``."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from fastfreeze.cli._options import (
    AT_LEAST_1,
    DIRECTORY,
    RUN,
    device_name,
    freezeout_options,
    model_name,
)
from fastfreeze.recipes.data import DATA_NAMES, ImageData, load_data
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.models import MODEL_NAMES
from fastfreeze.recipes.report import text_table
from fastfreeze.recipes.rundir import RunDir
from fastfreeze.recipes.runs import METHOD_NAMES, TrainConfig, describe, run_all


def _methods(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    for name in names:
        if name not in METHOD_NAMES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(METHOD_NAMES)}")
    return names


@click.command(context_settings={"show_default": True})
@click.option(
    "--methods",
    callback=_methods,
    default=",".join(METHOD_NAMES),
    help="Which of them, with commas between.",
)
@click.option("--data", type=click.Choice(DATA_NAMES), default="mnist5k")
@click.option("--data-dir", type=DIRECTORY, help="Where the files of --data are; not for mnist5k.")
@click.option("--image-size", type=click.IntRange(min=8), default=64, help="For --data folder.")
@click.option("--model", callback=model_name, default="tiny-resnet20", help=", ".join(MODEL_NAMES))
@click.option("--epochs", type=AT_LEAST_1, default=15)
@click.option("--batch-size", type=AT_LEAST_1, default=64)
@freezeout_options
@click.option("--cycles", type=AT_LEAST_1, default=5, help="Snapshots.")
@click.option(
    "--composition",
    type=click.Choice(["sticky", "last_k", "thaw"]),
    default="sticky",
    help="How the method 'both' freezes.",
)
@click.option("--last-k", type=AT_LEAST_1, default=2, help="For --composition last_k.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--seeds", type=AT_LEAST_1, default=1, help="Repeat with so many seeds.")
@click.option("--device", callback=device_name, default="cpu", help="cpu, cuda or cuda:<n>.")
@click.option("--threads", type=AT_LEAST_1, help="Threads of torch. [default: torch's own]")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, help="Processes that read images."
)
@click.option("--run-dir", type=DIRECTORY, help="Where to write. [default: runs/<time>]")
@click.option("--resume", type=RUN, metavar="RUN", help="Go on with an interrupted run.")
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
