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
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import fastfreeze
from benchmarks.case import OURS, Case, Run, difference, graphed, own_backends
from fastfreeze.kernels.choice import PLANS
from fastfreeze.kernels.device_plan import DevicePlan
from fastfreeze.recipes.models import build_model


class Rule(NamedTuple):
    """An optimizer's name, in torch and here, and its hyperparameters."""

    name: str
    values: Mapping[str, float]


SGD = Rule("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4})
MOMENTUM = Rule("SGD", {"lr": 0.1, "momentum": 0.9})
ADAMW = Rule("AdamW", {"lr": 1e-3, "weight_decay": 0.05})
TOTAL_STEPS = 1_000_000  # so long that no timed step reaches a freeze
SCHEDULE = fastfreeze.Cosine(TOTAL_STEPS)
GATE_STEPS = 3
TOLERANCES = {torch.float32: {}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}
TINY = "tiny"  # with which it is seen at once whether anything works
TENSORS = [(2049,), (64, 3, 7, 7), (1,), (33, 5), (512, 512)]
TORCHVISION = ("resnet50", "vit_b_16")  # build_model's resnet50 is another
MODELS = (
    "resnet110",
    "wrn34-4",  # the Snapshot paper's WRN-32, which does not count the shortcuts' convolutions
    *("wrn40-4", "densenet40", "densenet100-24", "densenet-bc-100", "vgg16"),
    *TORCHVISION,
)
FROZEN = {"": 0, "frozen-50": 50, "frozen-90": 90}  # percent of the layers


def shapes_of(model_name: str) -> list[Sequence[int]]:
    """Of the parameters of a network of :func:`build_model` or torchvision, without making them."""
    if model_name == TINY:
        return [*TENSORS]
    with torch.device("meta"):
        if model_name in TORCHVISION:
            import torchvision

            model = torchvision.models.get_model(model_name, weights=None)
        else:
            model = build_model(model_name)
    return [tuple(p.shape) for p in model.parameters()]


def parameter_groups(
    shapes: Sequence[Sequence[int]],
    num_layers: int = 1,
    *,
    num_frozen: int = 0,
    per_layer: bool = True,
    channels_last: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[dict]:
    """A group for each layer, or one for all, with gradients, the same for every call."""
    torch.manual_seed(0)
    params = []
    for shape in shapes:
        last = channels_last and len(shape) == 4
        layout = torch.channels_last if last else torch.contiguous_format
        values, grad = (
            torch.randn(*shape, device=device).to(dtype).contiguous(memory_format=layout)
            for _ in range(2)
        )
        params.append(nn.Parameter(values))
        params[-1].grad = grad
    ends = [round(i * len(params) / num_layers) for i in range(num_layers + 1)]
    for p in params[: ends[num_frozen]]:
        p.requires_grad_(False).grad = None
    ends = ends if per_layer else [0, len(params)]
    return [{"params": params[a:b]} for a, b in itertools.pairwise(ends)]


def optimizer_case(
    model_name: str,
    per_layer: bool = False,
    frozen: int = 0,
    rule: Rule = SGD,
    channels_last: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    in_graph: bool = False,
    compiled: bool = False,
) -> Case:
    """A step with its learning-rate schedule, with so many percent of the layers frozen.

    ``in_graph``: the step is replayed as a CUDA graph. ``compiled``: torch.compile is a rival, too.
    """
    shapes = shapes_of(model_name)
    num_layers = sum(len(shape) > 1 for shape in shapes)
    groups = partial(
        parameter_groups,
        shapes,
        num_layers,
        num_frozen=round(frozen / 100 * num_layers),
        per_layer=per_layer,
        channels_last=channels_last,
        device=device,
    )
    wide = groups()  # what is true in fp32
    expected = _stepped(torch_step(wide, rule, foreach=False), wide)
    numel = sum(p.numel() for group in wide for p in group["params"] if p.requires_grad)
    kept = 1 if rule.name == "SGD" else 2  # tensors of state
    notes = {
        ", plain momentum": rule == MOMENTUM,
        f", {model_name} ({len(shapes)} tensors, {sum(map(math.prod, shapes)) / 1e6:.1f}M)": True,
        f", {num_layers} groups" if per_layer else ", 1 group": True,
        f", {frozen}% of {num_layers} layers frozen": frozen > 0,
        ", channels_last": channels_last,
        ", bf16": dtype == torch.bfloat16,
        ", CUDA graph": in_graph,
    }
    flat = parameter_groups([(numel,)], device=device, dtype=dtype)
    case = Case(
        name=f"{rule.name} step" + "".join(note for note, there in notes.items() if there),
        bytes_moved=numel * dtype.itemsize * (3 + 2 * kept),  # the gradient is read alone
        floor=_ours(flat, rule, device),
    )
    for name, make in _rivals(rule, device, in_graph, compiled).items():
        own = groups(dtype=dtype)
        case.add(
            name,
            partial(make, own),
            lambda run, own=own: difference(_stepped(run, own), expected, **TOLERANCES[dtype]),
        )
    return case


def _rivals(
    rule: Rule, device: str, in_graph: bool, compiled: bool
) -> dict[str, Callable[[list[dict]], Run]]:
    ours = {
        name: partial(_ours, rule=rule, backend=backend)
        for name, backend in own_backends(device).items()
    }
    if in_graph:
        in_graphs = {name: lambda g, make=make: graphed(make(g)) for name, make in ours.items()}
        return {**in_graphs, "torch fused, lr in a tensor": partial(_lr_in_a_tensor, rule)}
    rivals = {
        **ours,
        "torch fused": partial(torch_step, rule=rule, fused=True),
        "torch foreach": partial(torch_step, rule=rule, foreach=True),
        "torch for-loop": partial(torch_step, rule=rule, foreach=False),
    }
    if compiled:
        rivals["torch.compile of foreach"] = partial(_compiled, rule)
    return rivals


def _stepped(run: Run, groups: Sequence[dict]) -> list[Tensor]:
    """The parameters after the gate's steps."""
    for _ in range(GATE_STEPS):
        run()
    return [p.detach().clone() for group in groups for p in group["params"]]


def _ours(groups: list[dict], rule: Rule, backend: str) -> Run:
    make = getattr(fastfreeze, rule.name)
    return make(groups, schedule=SCHEDULE, backend=backend, **rule.values).step


def torch_step(groups: list[dict], rule: Rule, **implementation: bool) -> Run:
    """torch's step and its scheduler's."""
    return _scheduled(getattr(torch.optim, rule.name)(groups, **rule.values, **implementation))


def _scheduled(optimizer: torch.optim.Optimizer, compiled: bool = False) -> Run:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)
    step = torch.compile(optimizer.step) if compiled else optimizer.step

    def both() -> None:
        step()
        scheduler.step()

    return both


def _compiled(rule: Rule, groups: list[dict]) -> Run:
    """torch's step compiled; its learning rates are tensors, or each would compile it anew."""
    torch._dynamo.reset()
    values = {**rule.values, "lr": torch.tensor(rule.values["lr"])}
    return _scheduled(torch.optim.SGD(groups, **values, foreach=True), compiled=True)


def _lr_in_a_tensor(rule: Rule, groups: list[dict]) -> Run:
    """torch's fused step in a graph, which reads its learning rates on the device.

    Its own scheduler would launch a kernel for each group: all are written at once.
    """
    device = groups[0]["params"][0].device
    lrs, steps = torch.empty(len(groups), device=device), itertools.count()
    own = [{**group, "lr": lrs[i]} for i, group in enumerate(groups)]
    options = {"capturable": device.type == "cuda"} if rule.name == "AdamW" else {}
    made = getattr(torch.optim, rule.name)(own, **rule.values, fused=True, **options)
    return graphed(made.step, lambda: lrs.fill_(SCHEDULE.lr(next(steps), rule.values["lr"])))


class HostPlan(DevicePlan):
    """A CUDA plan's step up to its launch."""

    table_from = 480

    def _launch(self, *_: object) -> None:
        pass


def host_case(model_name: str, num_groups: int) -> Case:
    """What a step costs the host where a GPU does the rest.

    As many tensors as the network has, but without elements, on the CPU: torch's fused kernel then
    finds nothing to do, and ours, whose plan is that of a CUDA device, is not launched. What
    launches and questions about streams cost is not in it: of torch's one launch for each group,
    of ours one.
    """
    shapes = [(0, *shape[1:]) for shape in shapes_of(model_name)]
    groups = partial(parameter_groups, shapes, num_groups)
    optimizers = {
        OURS: fastfreeze.SGD(groups(), **SGD.values),
        f"{OURS}, schedule": fastfreeze.SGD(groups(), **SGD.values, schedule=SCHEDULE),
        "torch fused": torch.optim.SGD(groups(), **SGD.values, fused=True),
        "torch foreach": torch.optim.SGD(groups(), **SGD.values, foreach=True),
    }
    with mock.patch.dict(PLANS, cpu=HostPlan):
        for optimizer in optimizers.values():
            optimizer.step()  # plans and momentum are made
    in_groups = f", {num_groups} groups" if num_groups > 1 else ""
    return Case(
        name=f"host time of a step, {model_name}, {len(shapes)} tensors{in_groups}",
        runs={name: optimizer.step for name, optimizer in optimizers.items()},
    )


def optimizer_cases(device: str = "cpu", compiling: bool = False) -> dict[str, Callable[[], Case]]:
    """By name; if ``compiling``, those too that compile a step, which take minutes each."""
    adamw, momentum = {"rule": ADAMW}, {"rule": MOMENTUM}
    rows = [("sgd", model, end, {"frozen": f}) for model in MODELS for end, f in FROZEN.items()]
    rows += [
        ("adamw", model, end, {"frozen": FROZEN[end], **adamw})
        for model in ("resnet110", *TORCHVISION)
        for end in ("", "frozen-50")
    ]
    rows += [("sgd", "resnet110", "channels-last", {"channels_last": True})]
    rows += [("sgd", model, "momentum", momentum) for model in ("resnet110", "resnet50")]
    rows += [("sgd", TINY, "", {}), ("adamw", TINY, "", adamw)]
    if device == "cuda":
        graph = {"in_graph": True}
        rows += [("sgd", model, "graph", graph) for model in (TINY, "resnet110")]
        rows += [("adamw", model, "graph", graph | adamw) for model in (TINY, "resnet110")]
        rows += [("sgd", "resnet50", "bf16", {"dtype": torch.bfloat16})]
    if compiling:
        rows += [("sgd", "resnet110", "compiled", {"compiled": True, **momentum})]
    found: dict[str, Callable[[], Case]] = {
        "-".join(filter(None, [kind, model, "per-layer" * per_layer, end])): partial(
            optimizer_case, model, per_layer, device=device, **options
        )
        for kind, model, end, options in rows
        for per_layer in (False, True)
    }
    if device == "cpu":
        found |= {f"host-{m}": partial(host_case, m, 1) for m in ("resnet110", "resnet50", "vgg16")}
        found["host-resnet110-layers"] = partial(host_case, "resnet110", 110)
    return found
