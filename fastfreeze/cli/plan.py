"""``fastfreeze plan``."""

from __future__ import annotations

import json

import click
import torch

from fastfreeze.cli._options import AT_LEAST_1, freezeout_options, model_name
from fastfreeze.freezing import split
from fastfreeze.recipes.models import build_model
from fastfreeze.schedule import FreezeOut, HowScale


@click.command(context_settings={"show_default": True})
@click.argument("model", callback=model_name)
@click.option("--steps", type=AT_LEAST_1, default=1000, help="Length of the run.")
@freezeout_options
@click.option("--num-classes", type=AT_LEAST_1, default=10)
@click.option("--in-channels", type=AT_LEAST_1, default=3)
@click.option("--image-size", type=click.IntRange(min=8), default=32)
@click.option("--json", "as_json", is_flag=True, help="The layers as JSON.")
def plan(
    model: str,
    steps: int,
    lr: float,
    t_0: float,
    how_scale: HowScale,
    num_classes: int,
    in_channels: int,
    image_size: int,
    as_json: bool,
) -> None:
    """Show a model's layers, when FreezeOut freezes them, and what that saves.

    \b
    Examples:
      fastfreeze plan resnet110 --t0 0.8
      fastfreeze plan densenet-bc-76 --steps 78200 --num-classes 100
    """
    schedule = FreezeOut(steps, t_0=t_0, how_scale=how_scale)
    with torch.device("meta"):
        network = build_model(model, num_classes=num_classes, in_channels=in_channels)
        images = torch.empty(2, in_channels, image_size, image_size)
    layers = split(network, images, schedule=schedule, lr=lr)
    if not as_json:
        click.echo(str(layers))
        return
    rows = [
        {
            "index": layer.index,
            "name": layer.name,
            "parameters": sum(p.numel() for p in layer.trainable),
            "backward_share": layers.backward_share(layer.index),
            "freezes_at_step": list(schedule.freeze_steps(layer.index, len(layers.layers))),
            "initial_lr": schedule.lr(0, lr, layer.index, len(layers.layers)),
        }
        for layer in layers.layers
    ]
    savings = {
        "backward_saving": layers.backward_saving,
        "compute_saving": layers.compute_saving,
    }
    click.echo(json.dumps({"layers": rows, **savings}, indent=2))
