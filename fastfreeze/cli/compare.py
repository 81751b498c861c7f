"""``fastfreeze compare``."""

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
    are paired: mean, standard deviation, and, from three seeds on, the 95% interval of the mean by
    Student's t.

    \b
    Examples:
      fastfreeze compare --methods freezeout,both --baseline sgd --seeds 5
      fastfreeze compare --methods freezeout --t0 0.5 --epochs 30 --json
      fastfreeze compare --resume runs/2026-01-31-120000
    """
    from fastfreeze.recipes.compare import CompareConfig

    run_command(ctx, "compare", CompareConfig, options)
