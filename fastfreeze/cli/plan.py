"""``fastfreeze plan``."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from fastfreeze.cli._options import AT_LEAST_1, Finite, freezeout_options, given
from fastfreeze.schedule import FreezeOut, HowScale

if TYPE_CHECKING:
    from fastfreeze.layers.saving import SavingOf
    from fastfreeze.layers.split import LayerPlan


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option("--steps", type=AT_LEAST_1, default=1000, help="Length of the run.")
@freezeout_options
@click.option(
    "--saving",
    type=Finite(0, 1, min_open=True, max_open=True),
    help="Find the --t0 that is predicted to save this share of the run.",
)
@click.option(
    "--of",
    type=click.Choice(["compute", "backward"]),
    default="compute",
    help="What --saving is a share of.",
)
@click.option("--num-classes", type=AT_LEAST_1, help="[default: 10; for large images 1000]")
@click.option("--in-channels", type=AT_LEAST_1, default=3)
@click.option(
    "--image-size", type=click.IntRange(min=8), help="[default: 32; for large images 224]"
)
@click.option("--json", "as_json", is_flag=True, help="The layers as JSON.")
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    steps: int,
    lr: float,
    t_0: float,
    how_scale: HowScale,
    saving: float | None,
    of: SavingOf,
    as_json: bool,
    **network: Any,
) -> None:
    """Show a network's layers, when FreezeOut freezes them, and what that saves.

    MODEL is one of the papers' networks (as in `fastfreeze train --model`), a classification
    network as torchvision:NAME or timm:NAME, or your own as MODULE:FUNCTION, where the function
    takes no arguments and returns the network. Large images are those of torchvision's and timm's
    networks.

    \b
    Examples:
      fastfreeze plan resnet110 --t0 0.8
      fastfreeze plan densenet-bc-76 --steps 78200 --num-classes 100
      fastfreeze plan vgg16 --saving 0.3
      fastfreeze plan torchvision:resnet50 --saving 0.4 --of backward
      fastfreeze plan mypackage.models:make --image-size 64
    """
    if saving is not None and given(ctx, "t_0"):
        raise click.UsageError(
            "--saving and --t0 exclude each other: the one follows from the other"
        )
    if saving is None and given(ctx, "of"):
        raise click.UsageError("--of is for --saving")
    from fastfreeze.layers.saving import freezeout_for_saving

    layers = _layers(**network)
    schedule = FreezeOut(steps, t_0=t_0, how_scale=how_scale)
    if saving is not None:
        try:
            schedule = freezeout_for_saving(layers, saving, steps, of=of, how_scale=how_scale)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--saving") from error
    layers = replace(layers, schedule=schedule, lr=lr)
    if as_json:
        click.echo(json.dumps(_as_json(layers, schedule, lr), indent=2))
    else:
        click.echo(layers)
        if layers.compute_saving:
            rival = round((1 - layers.compute_saving) * steps)
            click.echo(f"from scratch, its rival is a run of {rival} steps without freezing")
        if saving is not None:
            click.echo(f"t_0={schedule.t_0} is the largest that saves {saving:.1%} of the {of}")


def _layers(
    model: str, num_classes: int | None, in_channels: int, image_size: int | None
) -> LayerPlan:
    """The network's, with two images; where there are no numbers, the network decides."""
    import torch

    from fastfreeze.recipes.networks import is_own, layers_of, outline

    large, own = model.startswith(("torchvision:", "timm:")), is_own(model)
    if own and num_classes is not None:
        raise click.UsageError(f"--num-classes is not for {model}, which takes no arguments")
    classes, size = num_classes or (1000 if large else 10), image_size or (224 if large else 32)
    try:
        network = outline(model, num_classes=classes, in_channels=in_channels)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="MODEL") from error
    images = torch.zeros(2, in_channels, size, size, device="cpu" if own else "meta")
    layers, warnings = layers_of(model, network, images)
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)
    return layers


def _as_json(layers: LayerPlan, schedule: FreezeOut, lr: float) -> dict[str, Any]:
    count = len(layers.layers)
    rows = [
        {
            "index": i,
            "name": layer.name,
            "parameters": sum(p.numel() for p in layer.trainable),
            "backward_share": layers.backward_share(i),
            "freezes_at_step": list(schedule.freeze_steps(i, count)),
            "initial_lr": schedule.lr(0, lr, i, count),
        }
        for i, layer in enumerate(layers.layers)
    ]
    return {
        "t_0": schedule.t_0,
        "how_scale": schedule.how_scale,
        "total_steps": schedule.total_steps,
        "layers": rows,
        "backward_saving": layers.backward_saving,
        "compute_saving": layers.compute_saving,
    }
