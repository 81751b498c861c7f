"""One optimizer step: a network's parameters in one group or many, some of its layers frozen.

A layer is what lies around one weight of two dimensions or more: there are as many as those, and
the tensors are dealt out evenly in their order. Frozen layers, the first ones, have no gradients,
for every rival. The floor is our update of as many elements in one flat tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import fastfreeze
from benchmarks.case import Case, Run, difference, graphed, own_backends
from benchmarks.shapes import TINY, parameter_groups, shapes_of

SGD_VALUES = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
PLAIN_MOMENTUM = {"lr": 0.1, "momentum": 0.9}
ADAMW_VALUES = {"lr": 1e-3, "weight_decay": 0.05}
TOTAL_STEPS = 1_000_000  # so long that no timed step reaches a freeze
GATE_STEPS = 3
TOLERANCES = {torch.float32: {}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}
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
MOMENTUM_MODELS = ("resnet110", "resnet50")
ADAMW_MODELS = ("resnet110", "resnet50", "vit_b_16")
FROZEN = (0, 50, 90)  # percent of the layers


def optimizer_case(
    model_name: str,
    per_layer: bool = False,
    frozen: int = 0,
    values: Mapping[str, float] = SGD_VALUES,
    optimizer: str = "SGD",
    channels_last: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    in_graph: bool = False,
    compiled: bool = False,
) -> Case:
    """A step with its learning-rate schedule.

    Args:
        model_name: as in :func:`benchmarks.shapes.shapes_of`.
        per_layer: one parameter group for each layer, else one.
        frozen: percent of the layers that are frozen.
        values: hyperparameters.
        optimizer: "SGD" or "AdamW".
        channels_last: weights of convolutions, and their gradients, lie so in memory.
        device: where they are.
        dtype: of weights and gradients.
        in_graph: the step is replayed as a CUDA graph.
        compiled: torch.compile is a rival, too, which takes minutes.
    """
    shapes = shapes_of(model_name)
    num_layers = sum(len(shape) > 1 for shape in shapes)

    def groups() -> list[dict]:
        layers = parameter_groups(shapes, num_layers, device, dtype)
        return arranged(layers, round(frozen / 100 * num_layers), per_layer, channels_last)

    theirs = partial(torch_step, values=values, optimizer=optimizer)
    expected, numel = _truth(groups(), partial(theirs, foreach=False))
    kept = 1 if optimizer == "SGD" else 2  # tensors of state
    notes = {
        ", plain momentum": values == PLAIN_MOMENTUM,
        f", {model_name} ({len(shapes)} tensors, {sum(map(math.prod, shapes)) / 1e6:.1f}M)": True,
        f", {num_layers} groups" if per_layer else ", 1 group": True,
        f", {frozen}% of {num_layers} layers frozen": frozen > 0,
        ", channels_last": channels_last,
        ", bf16": dtype == torch.bfloat16,
        ", CUDA graph": in_graph,
    }
    flat = parameter_groups([(numel,)], 1, device, dtype)
    case = Case(
        name=f"{optimizer} step" + "".join(note for note, there in notes.items() if there),
        bytes_moved=numel * dtype.itemsize * (3 + 2 * kept),  # the gradient is read alone
        floor=_ours([{"params": flat[0]["params"]}], values, optimizer, device),
    )
    ours = {
        name: partial(_ours, values=values, optimizer=optimizer, backend=backend)
        for name, backend in own_backends(device).items()
    }
    makes: dict[str, Callable[[list[dict]], Run]] = {
        **ours,
        "torch fused": partial(theirs, fused=True),
        "torch foreach": partial(theirs, foreach=True),
        "torch for-loop": partial(theirs, foreach=False),
    }
    if in_graph:
        makes = {name: lambda g, make=make: graphed(make(g)) for name, make in ours.items()}
        makes["torch fused, lr in a tensor"] = partial(_lr_in_a_tensor, values, optimizer)
    if compiled:
        makes["torch.compile of foreach"] = partial(_compiled, values)
    for name, make in makes.items():
        own = groups()
        case.add(
            name,
            partial(make, own),
            lambda run, own=own: difference(_stepped(run, own), expected, **TOLERANCES[dtype]),
        )
    return case


def arranged(
    layers: list[dict], num_frozen: int, per_layer: bool, channels_last: bool
) -> list[dict]:
    """The groups: layers, or all of them in one; the first ``num_frozen`` are frozen."""
    everything = [p for layer in layers for p in layer["params"]]
    for p in everything if channels_last else ():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
            p.grad = p.grad.contiguous(memory_format=torch.channels_last)
    for layer in layers[:num_frozen]:
        for p in layer["params"]:
            p.requires_grad_(False).grad = None
    return layers if per_layer else [{"params": everything}]


def _truth(groups: list[dict], make: Callable[[list[dict]], Run]) -> tuple[list[Tensor], int]:
    """The parameters after the gate's steps in fp32, and how many elements train."""
    wide = [{**group, "params": [_in_fp32(p) for p in group["params"]]} for group in groups]
    trained = [p for group in wide for p in group["params"] if p.grad is not None]
    return _stepped(make(wide), wide), sum(p.numel() for p in trained)


def _in_fp32(p: nn.Parameter) -> nn.Parameter:
    wide = nn.Parameter(p.detach().float(), p.requires_grad)
    wide.grad = None if p.grad is None else p.grad.float()
    return wide


def _stepped(run: Run, groups: Sequence[dict]) -> list[Tensor]:
    """The parameters after the gate's steps."""
    for _ in range(GATE_STEPS):
        run()
    return [p.detach().clone() for group in groups for p in group["params"]]


def _ours(groups: list[dict], values: Mapping[str, float], optimizer: str, backend: str) -> Run:
    schedule = fastfreeze.Cosine(TOTAL_STEPS)
    return getattr(fastfreeze, optimizer)(groups, schedule=schedule, backend=backend, **values).step


def torch_step(
    groups: list[dict], values: Mapping[str, float], optimizer: str, **implementation: bool
) -> Run:
    """torch's step and its scheduler's."""
    return _scheduled(getattr(torch.optim, optimizer)(groups, **values, **implementation))


def _scheduled(optimizer: torch.optim.Optimizer, compiled: bool = False) -> Run:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)
    step = torch.compile(optimizer.step) if compiled else optimizer.step

    def both() -> None:
        step()
        scheduler.step()

    return both


def _compiled(values: Mapping[str, float], groups: list[dict]) -> Run:
    """torch's step compiled; its learning rates are tensors, or each would compile it anew."""
    torch._dynamo.reset()
    values = {**values, "lr": torch.tensor(values["lr"])}
    return _scheduled(torch.optim.SGD(groups, **values, foreach=True), compiled=True)


def _lr_in_a_tensor(values: Mapping[str, float], optimizer: str, groups: list[dict]) -> Run:
    """torch's fused step in a graph, which reads its learning rates on the device.

    Its own scheduler would launch a kernel for each group: all are written at once.
    """
    device = groups[0]["params"][0].device
    lrs, steps = torch.empty(len(groups), device=device), itertools.count()
    own = [{**group, "lr": lrs[i]} for i, group in enumerate(groups)]
    options = {"capturable": device.type == "cuda"} if optimizer == "AdamW" else {}
    made = getattr(torch.optim, optimizer)(own, **values, fused=True, **options)
    schedule = fastfreeze.Cosine(TOTAL_STEPS)
    return graphed(made.step, lambda: lrs.fill_(schedule.lr(next(steps), values["lr"])))


def optimizer_cases(device: str = "cpu", compiling: bool = False) -> dict[str, Callable[[], Case]]:
    """By name; if ``compiling``, those too that compile a step, which take minutes each."""
    adamw = {"values": ADAMW_VALUES, "optimizer": "AdamW"}
    momentum = {"values": PLAIN_MOMENTUM}
    rows = [("sgd", model, _frozen(f), {"frozen": f}) for model in MODELS for f in FROZEN]
    rows += [
        ("adamw", model, _frozen(f), {"frozen": f, **adamw})
        for model in ADAMW_MODELS
        for f in FROZEN[:2]
    ]
    rows += [("sgd", "resnet110", "channels-last", {"channels_last": True})]
    rows += [("sgd", model, "momentum", momentum) for model in MOMENTUM_MODELS]
    rows += [("sgd", TINY, "", {}), ("adamw", TINY, "", adamw)]
    if device == "cuda":
        graph = {"in_graph": True}
        rows += [("sgd", model, "graph", graph) for model in (TINY, "resnet110")]
        rows += [("adamw", model, "graph", graph | adamw) for model in (TINY, "resnet110")]
        rows += [("sgd", "resnet50", "bf16", {"dtype": torch.bfloat16})]
    if compiling:
        rows += [("sgd", "resnet110", "compiled", {"compiled": True, **momentum})]
    return {
        "-".join(filter(None, [kind, model, "per-layer" * per_layer, end])): partial(
            optimizer_case, model, per_layer, device=device, **options
        )
        for kind, model, end, options in rows
        for per_layer in (False, True)
    }


def _frozen(percent: int) -> str:
    return f"frozen-{percent}" if percent else ""
