"""What the commands that train have in common: from options to a run directory and its table."""

from __future__ import annotations

import errno
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastfreeze.cli._options import given
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.names import EMBEDDED

if TYPE_CHECKING:
    from fastfreeze.recipes.data import ImageData
    from fastfreeze.recipes.rundir import RunDir
    from fastfreeze.recipes.runs import RunConfig


def run_command(
    ctx: click.Context, kind: Callable[..., RunConfig], options: dict[str, Any]
) -> None:
    """Start a run or go on with one, and print what it has come to.

    ``options`` are all of the command's; the fields of ``kind``, the dataclass of its
    configuration, are those that a run keeps when it is resumed.
    """
    import torch

    from fastfreeze.recipes.rundir import RunDir

    names = ("data_dir", "workers", "run_dir", "resume", "quiet", "as_json")
    data_dir, workers, path, run, quiet, as_json = (options.pop(name) for name in names)
    options["threads"] = options["threads"] or torch.get_num_threads()
    if run is not None:
        _check_resumed(ctx, run, options)
    config = kind(**options)
    data = _load(config, data_dir, workers)
    if run is None:
        path = path or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
        run = RunDir.create(path, ctx.command_path.partition(" ")[2], asdict(config), data_dir)

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    how_to_go_on = f"Go on with: fastfreeze {run.command} --resume {shlex.quote(str(run.path))}"
    say(f"run directory: {run.path}")
    try:
        table, values = config.run(data, run, say, quiet)
    except KeyboardInterrupt:
        click.echo(f"Interrupted. {how_to_go_on}", err=True)
        raise click.exceptions.Exit(130) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of the output has gone
            raise
        raise RecipeError(f"{type(error).__name__}: {error}. {how_to_go_on}") from error
    click.echo(json.dumps({"run_dir": str(run.path), **values}, indent=2) if as_json else table)


def _check_resumed(ctx: click.Context, run: RunDir, options: dict[str, Any]) -> None:
    """Raise unless the options are the run's own."""
    if given(ctx, "run_dir"):
        raise click.UsageError("--run-dir and --resume exclude each other")
    if run.arguments.keys() != options.keys():
        names = ", ".join(sorted(run.arguments.keys() ^ options.keys()))
        raise RecipeError(f"{run.path}/config.json is not of this version: it differs in {names}")
    flags = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    for name, value in options.items():
        saved = run.arguments[name]
        if value == (tuple(saved) if isinstance(saved, list) else saved):
            continue
        if not given(ctx, name):
            raise RecipeError(f"{run.path}/config.json is damaged: {name} is {saved!r}")
        raise click.UsageError(
            f"{flags[name]} {value} contradicts the run's {saved}: a resumed run keeps its options"
        )


def _load(config: RunConfig, data_dir: Path | None, workers: int) -> ImageData:
    """The data, on which all can be trained."""
    import torch

    if config.data == EMBEDDED and data_dir is not None:
        raise click.UsageError(f"--data-dir is not for {EMBEDDED}, which needs no files")
    torch.set_num_threads(config.threads)
    try:
        data = config.load(data_dir, workers)
        config.experiment(data).check()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return data
