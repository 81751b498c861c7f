"""One optimizer step: a network's parameters in one group or many, some of its layers frozen.

A layer is what lies around one weight of two dimensions or more: there are as many as those, and
the tensors are dealt out evenly in their order. Frozen layers, the first ones, have no gradients,
for every rival. The floor is our update of as many elements in one flat tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

import fastfreeze
from benchmarks.case import OURS, Case, Run, difference
from benchmarks.shapes import Shapes, shapes_of

SGD_VALUES = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
# What the packages can, too. They may change the gradient in place for the weight decay.
PLAIN_MOMENTUM = {"lr": 0.1, "momentum": 0.9}
ADAMW_VALUES = {"lr": 1e-3, "weight_decay": 0.05}
TOTAL_STEPS = 1_000_000  # so long that no timed step reaches a freeze
GATE_STEPS = 3
MODELS = (
    "resnet110",
    "wrn34-4",  # the Snapshot paper's WRN-32, which does not count the shortcuts' convolutions
    "wrn40-4",
    "densenet40",
    "densenet100-24",
    "densenet-bc-100",
    "vgg16",
    "resnet50",
    "vit_b_16",
)
PACKAGES_MODELS = ("resnet110", "resnet50")
ADAMW_MODELS = ("resnet110", "resnet50", "vit_b_16")
FROZEN = (0, 50, 90)  # percent of the layers

Make = Callable[[list[dict]], Run]


def optimizer_case(
    model_name: str,
    per_layer: bool,
    frozen: int = 0,
    values: Mapping[str, float] = SGD_VALUES,
    rivals: Mapping[str, Make] | None = None,
    channels_last: bool = False,
    optimizer: str = "SGD",
) -> Case:
    """A step with its learning-rate schedule.

    Args:
        model_name: as in :func:`benchmarks.shapes.network`.
        per_layer: one parameter group for each layer, else one.
        frozen: percent of the layers that are frozen.
        values: hyperparameters.
        rivals: besides torch's three, from parameter groups to a step.
        channels_last: weights of convolutions, and their gradients, lie so in memory.
        optimizer: "SGD" or "AdamW".
    """
    shapes = shapes_of(model_name)
    num_layers = sum(len(shape) > 1 for shape in shapes)
    num_frozen = round(frozen / 100 * num_layers)
    groups = partial(_groups, shapes, num_layers, num_frozen, per_layer, channels_last)
    truth_groups = groups()
    theirs = partial(torch_step, values=values, optimizer=optimizer)
    expected = _stepped(theirs(truth_groups, foreach=False), truth_groups)
    trained = [p for group in truth_groups for p in group["params"] if p.grad is not None]
    numel = sum(p.numel() for p in trained)
    size = f"{len(shapes)} tensors, {sum(map(math.prod, shapes)) / 1e6:.1f}M"
    groups_text = f"{num_layers} groups" if per_layer else "1 group"
    frozen_text = f", {frozen}% of {num_layers} layers frozen" if frozen else ""
    plain = ", plain momentum" if values == PLAIN_MOMENTUM else ""
    kept = 1 if optimizer == "SGD" else 2  # tensors of state
    layout = ", channels_last" if channels_last else ""
    case = Case(
        name=f"{optimizer} step{plain}, {model_name} ({size}), {groups_text}{frozen_text}{layout}",
        bytes_moved=numel * 4 * (3 + 2 * kept),  # the gradient is read alone
        floor=_flat_step(numel, values, optimizer),
    )
    makes: dict[str, Make] = {
        OURS: partial(_ours, values=values, optimizer=optimizer),
        "torch fused": partial(theirs, fused=True),
        "torch foreach": partial(theirs, foreach=True),
        "torch for-loop": partial(theirs, foreach=False),
        **(rivals or {}),
    }
    for name, make in makes.items():
        own = groups()
        case.add(
            name,
            lambda make=make, own=own: make(own),
            lambda run, own=own: difference(_stepped(run, own), expected),
        )
    return case


def _groups(
    shapes: Sequence[Sequence[int]],
    num_layers: int,
    num_frozen: int,
    per_layer: bool,
    channels_last: bool = False,
) -> list[dict]:
    layers = Shapes(shapes, num_layers).groups("cpu", torch.float32)
    everything = [p for layer in layers for p in layer["params"]]
    for p in everything if channels_last else ():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
            p.grad = p.grad.contiguous(memory_format=torch.channels_last)
    for layer in layers[:num_frozen]:
        for p in layer["params"]:
            p.requires_grad_(False).grad = None
    if per_layer:
        return layers
    return [{"params": everything}]


def _stepped(run: Run, groups: list[dict]) -> list[torch.Tensor]:
    """The parameters after the gate's steps."""
    for _ in range(GATE_STEPS):
        run()
    return [p.detach().clone() for group in groups for p in group["params"]]


def _flat_step(numel: int, values: Mapping[str, float], optimizer: str) -> Run:
    flat = torch.nn.Parameter(torch.randn(numel))
    flat.grad = torch.randn(numel)
    return _ours([{"params": [flat]}], values, optimizer)


def _ours(groups: list[dict], values: Mapping[str, float], optimizer: str) -> Run:
    made = getattr(fastfreeze, optimizer)
    return made(groups, schedule=fastfreeze.Cosine(TOTAL_STEPS), backend="cpu", **values).step


def torch_step(
    groups: list[dict],
    scheduled: bool = True,
    values: Mapping[str, float] = SGD_VALUES,
    optimizer: str = "SGD",
    **implementation: bool,
) -> Run:
    """torch's step and, if ``scheduled``, its scheduler's."""
    made = getattr(torch.optim, optimizer)(groups, **values, **implementation)
    return with_scheduler(made) if scheduled else made.step


def with_scheduler(optimizer: torch.optim.Optimizer, compiled: bool = False) -> Run:
    """The optimizer's step and a cosine scheduler's."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)
    step = torch.compile(optimizer.step) if compiled else optimizer.step

    def both() -> None:
        step()
        scheduler.step()

    return both


def _compiled(groups: list[dict], values: Mapping[str, float]) -> Run:
    """torch's step compiled; its learning rates are tensors, or each would compile it anew."""
    torch._dynamo.reset()
    values = {**values, "lr": torch.tensor(values["lr"])}
    optimizer = torch.optim.SGD(groups, **values, foreach=True)
    return with_scheduler(optimizer, compiled=True)


def _bitsandbytes(groups: list[dict], values: Mapping[str, float]) -> Run:
    import bitsandbytes

    return with_scheduler(bitsandbytes.optim.SGD32bit(groups, **values))


def _optimi(groups: list[dict], values: Mapping[str, float]) -> Run:
    import optimi

    return with_scheduler(optimi.SGD(groups, **values))


def _heavyball(groups: list[dict], values: Mapping[str, float]) -> Run:
    import heavyball

    names = {"lr": values["lr"], "beta": values["momentum"]}
    # It would take the gradients away, and the next step would find none.
    return with_scheduler(heavyball.SGD(groups, **names, consume_grad=False))


def _named(model: str, per_layer: bool, *parts: str, optimizer: str = "sgd") -> str:
    return "-".join([optimizer, model, *(["per-layer"] if per_layer else []), *parts])


def _frozen_part(frozen: int) -> list[str]:
    return [f"frozen-{frozen}"] if frozen else []


PACKAGES: dict[str, Make] = {
    "bitsandbytes": partial(_bitsandbytes, values=PLAIN_MOMENTUM),
    "optimi": partial(_optimi, values=PLAIN_MOMENTUM),
}
_COMPILING: dict[str, Make] = {
    "torch.compile of foreach": partial(_compiled, values=PLAIN_MOMENTUM),
    "heavyball": partial(_heavyball, values=PLAIN_MOMENTUM),
}
OPTIMIZER_CASES: dict[str, Callable[[], Case]] = {
    _named(model, per_layer, *_frozen_part(frozen)): partial(
        optimizer_case, model, per_layer, frozen
    )
    for model in MODELS
    for per_layer in (False, True)
    for frozen in FROZEN
}
OPTIMIZER_CASES |= {
    _named("resnet110", per_layer, "channels-last"): partial(
        optimizer_case, "resnet110", per_layer, channels_last=True
    )
    for per_layer in (False, True)
}
# The packages' rivals: none has Nesterov's momentum.
OPTIMIZER_CASES |= {
    _named(model, per_layer, "momentum"): partial(
        optimizer_case, model, per_layer, values=PLAIN_MOMENTUM, rivals=PACKAGES
    )
    for model in PACKAGES_MODELS
    for per_layer in (False, True)
}
OPTIMIZER_CASES |= {
    _named(model, per_layer, *_frozen_part(frozen), optimizer="adamw"): partial(
        optimizer_case, model, per_layer, frozen, values=ADAMW_VALUES, optimizer="AdamW"
    )
    for model in ADAMW_MODELS
    for per_layer in (False, True)
    for frozen in FROZEN[:2]
}
# Minutes each.
COMPILED_CASES: dict[str, Callable[[], Case]] = {
    _named("resnet110", per_layer, "compiled"): partial(
        optimizer_case, "resnet110", per_layer, values=PLAIN_MOMENTUM, rivals=_COMPILING
    )
    for per_layer in (False, True)
}
