"""``fastfreeze train``."""

from __future__ import annotations

from typing import Any

import click

from fastfreeze.cli._options import methods, training_options
from fastfreeze.cli._runs import run_command, run_options, seed_options
from fastfreeze.recipes.names import METHOD_NAMES


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
      fastfreeze train --data folder --data-dir photos --model torchvision:resnet18
      fastfreeze train --data folder --data-dir photos --model mypackage.models:make
      fastfreeze train --resume runs/2026-01-31-120000

    --model takes a paper's network, a classification network of torchvision, or your own, where the
    function takes no arguments and returns the network; it is called for each training.

    Ctrl-C stops a run; --resume goes on from the last finished epoch, and on a CPU ends with the
    same weights, bit for bit, as if it had not been stopped.
    """
    from fastfreeze.recipes.train import TrainConfig

    run_command(ctx, "train", TrainConfig, options)
