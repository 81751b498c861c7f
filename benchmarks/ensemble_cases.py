"""Predictions of five members with the weights of their first modules in common.

Every rival gives the mean of the members' probabilities for the same images, within 1e-6 of a loop
in float64 (1e-5 on a GPU). The floor is the loop's time, divided by how many times fewer MACs there
are to do, if what is shared is done once: up to three quarters of a member's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import OURS, Case, difference
from fastfreeze import SnapshotEnsemble
from fastfreeze.recipes.models import build_model

TOLERANCE, GPU_TOLERANCE = 1e-6, 1e-5
LOOP, VMAP, CHANNELS_LAST = "torch loop", "torch.func vmap", "torch loop, channels_last"
NOT_FOLDED = f"{OURS}, not folded"
MODELS, BATCH_SIZES = ("resnet20", "densenet-bc-40", "wrn16-2"), (1, 4, 64)
MEMBERS, SHARED = 5, 0.75
State = Mapping[str, Tensor]
Predict = Callable[[Tensor], Tensor]  # images to probabilities


@torch.no_grad()
def members(model_name: str, count: int) -> tuple[nn.Module, list[State], float]:
    """A model, state dicts that begin alike, and the share of the MACs in which they do."""
    torch.manual_seed(0)
    model = build_model(model_name).eval()
    links = {"stem": model.stem, **{f"blocks.{i}": b for i, b in enumerate(model.blocks)}}
    x, costs = torch.randn(1, 3, 32, 32), {}
    for name, link in {**links, "head": model.head}.items():
        with FlopCounterMode(display=False) as counter:
            x = link(x)
        costs[name] = counter.get_total_flops()
    total, done, first = sum(costs.values()), 0, []
    for name, cost in costs.items():
        if done + cost > SHARED * total:
            break
        done += cost
        first.append(f"{name}.")
    states = [_trained(build_model(model_name)) for _ in range(count)]
    alike = {n: x for n, x in states[0].items() if n.startswith(tuple(first))}
    return model, [{**state, **alike} for state in states], done / total


def _trained(model: nn.Module) -> State:
    """Weights of a model whose norms have seen images."""
    for _ in range(3):
        model.train()(torch.randn(16, 3, 32, 32))
    return model.state_dict()


def _models(model: nn.Module, states: Sequence[State]) -> list[nn.Module]:
    models = [copy.deepcopy(model).eval().requires_grad_(False) for _ in states]
    for member, state in zip(models, states, strict=True):
        member.load_state_dict(state)
    return models


def loop_of(
    model: nn.Module,
    states: Sequence[State],
    layout: torch.memory_format = torch.contiguous_format,
) -> Predict:
    """What a user would write."""
    models = [member.to(memory_format=layout) for member in _models(model, states)]

    def predict(x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=layout)
        return torch.stack([member(x).softmax(-1) for member in models]).mean(0)

    return predict


def vmap_of(model: nn.Module, states: Sequence[State]) -> Predict:
    """The same by torch.func."""
    stacked = stack_module_state(_models(model, states))
    skeleton = copy.deepcopy(model).eval().to("meta")
    call = vmap(lambda state, x: functional_call(skeleton, state, (x,)), in_dims=(0, None))
    return lambda x: call(stacked, x).softmax(-1).mean(0)


def run_of(predict: Predict, x: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """All predictions of batches."""
    return torch.no_grad()(lambda: [predict(batch) for batch in x])


def exact(model: nn.Module, states: Sequence[State], x: Sequence[Tensor]) -> list[Tensor]:
    """What a loop in float64 predicts."""
    loop = loop_of(copy.deepcopy(model).double(), states)
    return run_of(loop, [batch.double() for batch in x])()


def add_prediction(
    case: Case,
    name: str,
    make: Callable[[], Predict],
    x: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> None:
    """Enter a run of all predictions if they are those expected."""
    atol = GPU_TOLERANCE if x[0].is_cuda else TOLERANCE
    case.add(
        name,
        lambda: run_of(make(), x),
        lambda run: difference([p.double() for p in run()], expected, rtol=0, atol=atol),
    )


@torch.no_grad()
def ensemble_case(
    model_name: str, batch_size: int, device: str = "cpu", compiling: bool = False
) -> Case:
    """The mean of five members' probabilities for a batch of images.

    ``compiling``: torch.compile is a rival, too, which takes minutes.
    """
    model, states, share = members(model_name, MEMBERS)
    model = model.to(device)
    x = [torch.randn(batch_size, 3, 32, 32).to(device)]
    makes: dict[str, Callable[[], Predict]] = {
        LOOP: partial(loop_of, model, states),
        CHANNELS_LAST: partial(loop_of, model, states, torch.channels_last),
        VMAP: partial(vmap_of, model, states),
        OURS: partial(SnapshotEnsemble, model, states),
        NOT_FOLDED: partial(SnapshotEnsemble, model, states, fold=False),
    }
    if compiling:
        makes["torch.compile of the loop"] = lambda: torch.compile(loop_of(model, states))
        makes[f"{OURS} compiled"] = lambda: torch.compile(
            SnapshotEnsemble(model, states).as_module(*x)
        )
    shared = f"{MEMBERS} members, {share:.0%} of the MACs shared"
    case = Case(
        name=f"{model_name}, batch {batch_size}, {shared}",
        share=(LOOP, 1 - share + share / MEMBERS),
    )
    expected = exact(model, states, x)
    for name, make in makes.items():
        add_prediction(case, name, make, x, expected)
    return case


def ensemble_cases(device: str = "cpu", compiling: bool = False) -> dict[str, Callable[[], Case]]:
    """By name."""
    return {
        f"ensemble-{model}-{size}": partial(ensemble_case, model, size, device, compiling)
        for model in MODELS
        for size in BATCH_SIZES
    }
