"""``fastfreeze train``."""

from __future__ import annotations

from typing import Any

import click

from fastfreeze.cli._options import methods, training_options
from fastfreeze.cli._runs import run_command, run_options, seed_options
from fastfreeze.recipes.train import METHOD_NAMES, TrainConfig


@click.command(context_settings={"show_default": True})
@click.option(
    "--methods",
    callback=methods,
    default=",".join(METHOD_NAMES),
    help="Which of them, with commas between.",
)
@training_options
@seed_options(default=1)
@run_options
@click.pass_context
def train(ctx: click.Context, /, **options: Any) -> None:
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
    run_command(ctx, "train", TrainConfig, options)
