"""``fastfreeze plot`` and ``fastfreeze backends``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from fastfreeze.cli._options import RUN
from fastfreeze.text import format_table


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
    plot_run(RunDir.open(run), path)
    click.echo(json.dumps({"picture": str(path)}) if as_json else path)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def backends(as_json: bool) -> None:
    """Show which kernels can run here, and why others cannot.

    \b
    Example:
      fastfreeze backends
    """
    from fastfreeze.kernels import library

    found = library.backends()
    if as_json:
        click.echo(json.dumps({name: asdict(state) for name, state in found.items()}, indent=2))
        return
    rows = [
        [name, "yes" if state.available else "no", state.reason] for name, state in found.items()
    ]
    click.echo(format_table(["backend", "available", "why"], rows))
