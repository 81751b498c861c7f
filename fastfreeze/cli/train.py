"""``fastfreeze train`` and ``fastfreeze compare``."""

from __future__ import annotations

from typing import Any

import click

from fastfreeze.cli._options import METHODS, run_options, seed_options, training_options
from fastfreeze.cli._runs import run_command
from fastfreeze.recipes.names import METHOD_NAMES


@click.command(context_settings={"show_default": True})
@click.option(
    "--methods",
    type=METHODS,
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

    run_command(ctx, TrainConfig, options)


@click.command(context_settings={"show_default": True})
@click.option(
    "--methods",
    type=METHODS,
    default="freezeout,snapshot,both",
    help="What to compare with the baseline, with commas between.",
)
@click.option(
    "--baseline", type=click.Choice(METHOD_NAMES), default="sgd", help="What to compare it with."
)
@training_options
@seed_options(default=5, minimum=2)
@run_options
@click.pass_context
def compare(ctx: click.Context, /, **options: Any) -> None:
    """Train methods with several seeds, and tell their differences from a baseline.

    With each seed all start from the same weights and see the same batches, so that differences
    are paired: mean, standard deviation, and the 95% interval of the mean by Student's t.

    \b
    Examples:
      fastfreeze compare --methods freezeout,both --baseline sgd --seeds 5
      fastfreeze compare --methods freezeout --t0 0.5 --epochs 30 --json
      fastfreeze compare --resume runs/2026-01-31-120000
    """
    from fastfreeze.recipes.train import CompareConfig

    run_command(ctx, CompareConfig, options)
