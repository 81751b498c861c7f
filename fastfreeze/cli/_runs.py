"""What the commands that train have in common: from options to a run directory and its table."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fastfreeze.cli._options import (
    DIRECTORY,
    RUN,
    Command,
    device_name,
    options,
)
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.names import EMBEDDED

if TYPE_CHECKING:
    from fastfreeze.recipes.config import RunConfig
    from fastfreeze.recipes.data import ImageData
    from fastfreeze.recipes.rundir import RunDir
    from fastfreeze.recipes.tables import Outcome


def seed_options(default: int, minimum: int = 1) -> Callable[[Command], Command]:
    """``--seed`` and ``--seeds``."""
    counts = click.IntRange(min=minimum)
    return options(
        click.option("--seed", type=click.IntRange(0, 2**32), default=0, help="The first seed."),
        click.option("--seeds", type=counts, default=default, help="Repeat with so many seeds."),
    )


# Where to run, where to write, what to print.
run_options = options(
    click.option("--device", callback=device_name, default="cpu", help="cpu, cuda, cuda:<n>."),
    click.option(
        "--threads",
        type=click.IntRange(1, os.cpu_count()),
        help="Threads of torch. [default: torch's own]",
    ),
    click.option(
        "--workers", type=click.IntRange(min=0), default=0, help="Processes that read images."
    ),
    click.option("--run-dir", type=DIRECTORY, help="Where to write. [default: runs/<time>]"),
    click.option("--resume", type=RUN, metavar="RUN", help="Go on with an interrupted run."),
    click.option("--quiet", is_flag=True, help="No progress, only the table."),
    click.option("--json", "as_json", is_flag=True, help="The results as JSON."),
)


def run_command(
    ctx: click.Context, command: str, kind: Callable[..., RunConfig], given: dict[str, Any]
) -> None:
    """Start a run or go on with one, and print what it has come to.

    Args:
        ctx: of the command.
        command: its name, as the user types it.
        kind: the dataclass of its configuration, whose fields are the remaining options.
        given: all of the command's options.
    """
    import torch

    from fastfreeze.recipes.rundir import RunDir, describe

    names = ("data_dir", "workers", "run_dir", "resume", "quiet", "as_json")
    data_dir, workers, path, resume, quiet, as_json = (given.pop(name) for name in names)
    if resume is None:
        given["threads"] = given["threads"] or torch.get_num_threads()
        config = kind(**given)
        data = _load(config, data_dir, workers)
        path = path or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
        run = RunDir.create(path, describe(command, asdict(config), data_dir))
    else:
        run = RunDir.open(resume)
        config = _saved_config(ctx, run, command, kind)
        try:
            data = _load(config, data_dir or run.data_dir, workers)
        except TypeError as error:
            raise RecipeError(f"{run.path}/config.json is damaged: {error}") from error
    outcome = _run(config, data, run, command, quiet)
    if as_json:
        click.echo(json.dumps({"run_dir": str(run.path), **outcome.values}, indent=2))
    else:
        click.echo(str(outcome.table))


def _load(config: RunConfig, data_dir: Path | None, workers: int) -> ImageData:
    if config.data == EMBEDDED and data_dir is not None:
        raise click.UsageError(f"--data-dir is not for {EMBEDDED}, which needs no files")
    import torch

    torch.set_num_threads(config.threads)
    data = config.load(data_dir, workers)
    try:
        config.check(data)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return data


def _saved_config(
    ctx: click.Context, run: RunDir, command: str, kind: Callable[..., RunConfig]
) -> RunConfig:
    """The run's own configuration; options that say otherwise are an error."""
    if run.command != command:
        raise RecipeError(f"{run.path} is of another command: fastfreeze {run.command} --resume")
    try:
        saved = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in run.arguments.items()
        }
        config = kind(**saved)
    except TypeError as error:
        raise RecipeError(f"{run.path}/config.json is not of this version: {error}") from error
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name in saved:
            _check_saved(ctx, run, parameter, saved[name])
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if name == "run_dir":
            raise click.UsageError("--run-dir and --resume exclude each other")
        if name in saved and saved[name] != ctx.params[name]:
            raise click.UsageError(
                f"{parameter.opts[0]} {ctx.params[name]} contradicts the run's "
                f"{saved[name]}: a resumed run keeps its options"
            )
    return config


def _check_saved(ctx: click.Context, run: RunDir, parameter: click.Parameter, value: Any) -> None:
    """Raise if an option does not take a value that config.json holds."""
    try:
        text = ",".join(value) if isinstance(value, tuple) else value
        taken = parameter.process_value(ctx, text)
    except (click.BadParameter, TypeError) as error:
        raise RecipeError(
            f"{run.path}/config.json is damaged: {parameter.name}: {error}"
        ) from error
    if taken != value:
        raise RecipeError(f"{run.path}/config.json is damaged: {parameter.name} is {value!r}")


def _run(config: RunConfig, data: ImageData, run: RunDir, command: str, quiet: bool) -> Outcome:
    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    path = shlex.quote(str(run.path))
    how_to_go_on = f"Go on with: fastfreeze {command} --resume {path}"
    say(f"run directory: {run.path}")
    try:
        return config.run(data, run, say, quiet)
    except KeyboardInterrupt:
        click.echo(f"Interrupted. {how_to_go_on}", err=True)
        raise click.exceptions.Exit(130) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of the output has gone
            raise
        raise RecipeError(f"{type(error).__name__}: {error}. {how_to_go_on}") from error
