"""``fastfreeze reproduce``: snapshot, freezeout, list."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import click

from fastfreeze.cli._options import (
    AT_LEAST_1,
    Command,
    Finite,
    data_dir_option,
    options,
    run_options,
    seed_options,
)
from fastfreeze.cli._runs import run_command
from fastfreeze.reproduction.papers import Row, freezeout_rows, snapshot_rows
from fastfreeze.text import format_table


@click.group()
def reproduce() -> None:
    """Run a row of a paper with the paper's budget, beside the paper's numbers.

    \b
    Examples:
      fastfreeze reproduce list
      fastfreeze reproduce snapshot --model densenet40 --dataset mnist5k --scale 0.001
    """


def _row_options(rows: Sequence[Row]) -> Callable[[Command], Command]:
    models = ", ".join(dict.fromkeys(row.model for row in rows))
    datasets = ", ".join(dict.fromkeys(row.data for row in rows))
    text = "One of {}; fastfreeze reproduce list shows what goes together."
    return options(
        click.option("--model", required=True, help=text.format(models)),
        click.option("--dataset", "--data", "data", required=True, help=text.format(datasets)),
        data_dir_option,
        click.option(
            "--scale",
            type=Finite(0, 1, min_open=True),
            default=1.0,
            help="Share of the paper's budget: fewer epochs first, then fewer images.",
        ),
        click.option(
            "--test-images",
            type=AT_LEAST_1,
            help="Test on so many, as many of each class as can be. [default: all]",
        ),
        seed_options(default=1),
        run_options,
    )


@reproduce.command(context_settings={"show_default": True})
@_row_options(snapshot_rows())
@click.pass_context
def snapshot(ctx: click.Context, /, **options: Any) -> None:
    """A row of Snapshot Ensembles' table 1, on one data set.

    Three trainings: a single model with step decay, which gives NoCycle too, and Snapshot
    Ensembles from learning rates of 0.1 and 0.2.

    \b
    Examples:
      fastfreeze reproduce snapshot --dataset cifar100 --model densenet40 \\
          --data-dir data --device cuda
      fastfreeze reproduce snapshot --dataset mnist5k --model densenet40 --scale 0.001
    """
    from fastfreeze.reproduction.reproduce import SnapshotConfig

    run_command(ctx, SnapshotConfig, options)


@reproduce.command(context_settings={"show_default": True})
@_row_options(freezeout_rows())
@click.pass_context
def freezeout(ctx: click.Context, /, **options: Any) -> None:
    """A network of FreezeOut: without freezing, and with t_0 of 0.8 and 0.5.

    \b
    Examples:
      fastfreeze reproduce freezeout --dataset cifar100 --model densenet-bc-76 \\
          --data-dir data --device cuda
      fastfreeze reproduce freezeout --dataset mnist5k --model wrn40-4 --scale 0.001
    """
    from fastfreeze.reproduction.reproduce import FreezeOutConfig

    run_command(ctx, FreezeOutConfig, options)


@reproduce.command("list")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON, with the numbers.")
def show_rows(as_json: bool) -> None:
    """Show what can be reproduced, and the papers' budgets.

    \b
    Example:
      fastfreeze reproduce list
    """
    papers = {"snapshot": snapshot_rows(), "freezeout": freezeout_rows()}
    if as_json:
        rows = {paper: [asdict(row) for row in found] for paper, found in papers.items()}
        click.echo(json.dumps(rows, indent=2))
        return
    cells = []
    for paper, found in papers.items():
        for row in found:
            numbers = (row.epochs, row.batch_size, row.cycles if paper == "snapshot" else "-")
            cells.append([paper, row.model, row.data, row.title, *map(str, numbers)])
    headers = ["paper", "--model", "--dataset", "network", "epochs", "batch", "snapshots"]
    click.echo(format_table(headers, cells))
