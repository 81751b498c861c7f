"""``fastfreeze finetune``."""

from __future__ import annotations

from typing import Any

import click

from fastfreeze.cli._options import (
    AT_LEAST_1,
    Finite,
    data_options,
    given,
    run_options,
    seed_options,
    t_0_option,
)
from fastfreeze.cli._runs import run_command
from fastfreeze.recipes.names import RECIPE_NAMES

_RATES = {"adamw": 3e-4, "sgd": 0.01}
_OF_ONE_RECIPE = {"until": ("--until", "prefix"), "t_0": ("--t0", "freezeout")}


def _until(ctx: click.Context, param: click.Parameter, value: Any) -> int | float | str:
    """A layer's index or name, or a share of the compute."""
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            pass
    return str(value)


@click.command(context_settings={"show_default": True})
@click.option("--recipe", type=click.Choice(RECIPE_NAMES), default="prefix", help="How to freeze.")
@click.option(
    "--weights",
    type=click.Path(dir_okay=False, resolve_path=True),
    help="State dict of the network, .pth or .safetensors; its head is not read.",
)
@click.option("--optimizer", type=click.Choice(list(_RATES)), default="adamw")
@data_options("folder", 224, "torchvision:mobilenet_v2")
@click.option("--epochs", type=AT_LEAST_1, default=5)
@click.option("--batch-size", type=AT_LEAST_1, default=32)
@click.option(
    "--lr",
    type=Finite(min=0, min_open=True),
    help="Initial learning rate. [default: "
    + ", ".join(f"{lr:g} for {name}" for name, lr in _RATES.items())
    + "]",
)
@click.option(
    "--until",
    callback=_until,
    default="0.5",
    help="prefix: the first layer that trains, its index (fastfreeze plan shows them) or name, or "
    "the share of a step's compute that the frozen layers have.",
)
@t_0_option
@click.option("--warmup-steps", type=click.IntRange(min=0), default=0, help="The rates rise first.")
@click.option(
    "--validation",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=0.1,
    help="Share of the training images that is held out to choose the best epoch by.",
)
@click.option("--augment", is_flag=True, help="Vary the training images; nothing is cached then.")
@seed_options(default=1)
@run_options
@click.pass_context
def finetune(ctx: click.Context, /, **options: Any) -> None:
    """Fine-tune a pretrained network, most often frozen in part, and keep its best epoch.

    \b
    Recipes:
      prefix     the first layers never train, and run once for each image
      gradual    the head trains first, then layer by layer what is before it
      freezeout  all layers train first; they freeze from the input on
      full       nothing freezes: what the others are to be compared with

    \b
    Examples:
      fastfreeze finetune --weights mobilenet_v2-b0353104.pth --data-dir photos
      fastfreeze finetune --weights resnet50.safetensors --data-dir photos \\
          --model timm:resnet50 --until layer3 --optimizer sgd
      fastfreeze finetune --data-dir photos --model mypackage.models:make --recipe gradual
      fastfreeze finetune --resume runs/2026-01-31-120000

    photos holds train/<class>/* and test/<class>/*. best-<run>.pth in the run directory has the
    weights of the epoch that is best on the images held out; errors are those of these weights on
    the test images. Ctrl-C stops a run; --resume goes on from the last finished epoch, and on a CPU
    ends with the same weights, bit for bit, as if it had not been stopped.
    """
    from fastfreeze.recipes.finetune import FinetuneConfig

    for option, (flag, recipe) in _OF_ONE_RECIPE.items():
        if given(ctx, option) and options["recipe"] != recipe:
            raise click.UsageError(
                f"{flag} is for --recipe {recipe}, and this is --recipe {options['recipe']}"
            )
    options["lr"] = options["lr"] or _RATES[options["optimizer"]]
    run_command(ctx, FinetuneConfig, options)
