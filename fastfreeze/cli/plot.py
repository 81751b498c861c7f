"""``fastfreeze plot``."""

from __future__ import annotations

from pathlib import Path

import click

from fastfreeze.cli._options import RUN
from fastfreeze.recipes.plot import plot_run
from fastfreeze.recipes.rundir import RunDir


@click.command()
@click.argument("run", type=RUN)
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
