"""``fastfreeze plot``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastfreeze.cli._options import RUN


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: RUN/plot.png]"
)
@click.option("--json", "as_json", is_flag=True, help="The picture's path as JSON.")
def plot(run: Path, output: Path | None, as_json: bool) -> None:
    """Draw a run's learning rates, losses, test errors and times of a step as a PNG.

    \b
    Example:
      fastfreeze plot runs/2026-01-31-120000
    """
    from fastfreeze.recipes.plot import plot_run
    from fastfreeze.recipes.rundir import RunDir

    path = output or run / "plot.png"
    try:
        plot_run(RunDir.open(run), path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error}") from error
    click.echo(json.dumps({"picture": str(path)}) if as_json else path)
