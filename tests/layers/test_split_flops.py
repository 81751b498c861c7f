"""FLOPs of layers, and what a schedule saves of them."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastfreeze.layers.split import split
from fastfreeze.schedule import Cosine, FreezeOut, FreezeOutCycles, Frozen, GradualUnfreezing
from tests.layers.models import (
    X,
    added_product,
    attention,
    convolutions,
    fixed,
    functional,
    mlp,
    siamese,
    stack,
    tied,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(model, x):
    """Forward and backward FLOPs of a real step in training mode."""
    with FlopCounterMode(display=False) as counter:
        loss = model(x).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize(
    ("make", "shape", "frozen"),
    [
        (mlp, (4, 3), ()),
        (mlp, (4, 3), ("0", "3", "4")),
        (functional, (4, 3), ()),
        (added_product, (4, 3), ()),
        (siamese, (4, 3), ("a",)),
        (attention, (2, 5, 3), ()),
        (convolutions, (2, 3, 6, 6), ("stem",)),
        (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), None, ()),
    ],
)
def test_flops_are_those_of_a_real_step(make, shape, frozen):
    torch.manual_seed(0)
    model = fixed(make(), *frozen)
    x = torch.zeros(4, dtype=torch.long) if shape is None else torch.ones(shape)
    with sdpa_kernel(SDPBackend.MATH):
        plan = split(model, x)
        forward, backward = counted(model, x)
    assert sum(layer.forward_flops for layer in plan.layers) == forward
    assert sum(layer.backward_flops for layer in plan.layers) == backward
    shares = [plan.backward_share(layer.index) for layer in plan.layers]
    assert sum(shares) == pytest.approx(1)


def test_flops_belong_to_the_layer_that_runs_them():
    plan = split(mlp(), torch.ones(4, 3))
    assert [layer.forward_flops for layer in plan.layers] == [2 * 4 * 24, 2 * 4 * 64, 2 * 4 * 8]
    assert [layer.backward_flops for layer in plan.layers] == [2 * 4 * 24, 4 * 4 * 64, 4 * 4 * 8]
    plan = split(functional(), X)
    assert [layer.forward_flops for layer in plan.layers] == [2 * 2 * 12, 2 * 2 * 8]
    convolutions = torch.backends.cudnn.conv
    before, enabled = convolutions.fp32_precision, torch.backends.cudnn.enabled
    try:
        for convolutions.fp32_precision in ("ieee", "tf32"):  # not always that of recurrent layers
            assert split(nn.LSTM(3, 4), X).layers[0].forward_flops == 2 * 2 * 16 * (3 + 4)
            assert torch.backends.cudnn.enabled == enabled
    finally:
        convolutions.fp32_precision = before


def test_flops_are_unknown_without_an_example():
    plan = split(mlp(), schedule=FreezeOut(10))
    assert plan.layers[0].forward_flops is None
    assert plan.layers[0].backward_flops is None
    assert plan.backward_share(0) is plan.backward_saving is plan.compute_saving is None


SCHEDULES = {
    "cosine": Cosine(12),
    "freezeout": FreezeOut(23, t_0=0.3),
    "sticky": FreezeOutCycles(24, num_cycles=4, t_0=0.4),
    "last_k": FreezeOutCycles(24, num_cycles=3, t_0=0.3, composition="last_k", k=2),
    "thaw": FreezeOutCycles(25, num_cycles=3, t_0=0.3, composition="thaw"),
    "frozen": Frozen(20, until=1),
    "unfreezing": GradualUnfreezing(20, unfreeze_every=4),
}


@pytest.mark.parametrize(
    "make", [mlp, stack, lambda: tied(bias=True)], ids=["mlp", "stack", "tied"]
)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.filterwarnings("ignore::fastfreeze.errors.FastfreezeWarning")
def test_saving_counts_the_steps_without_a_backward(schedule, make):
    """Step by step: a layer's backward runs if anything that feeds it, or itself, trains."""
    model = make()
    x = torch.zeros(4, 3, dtype=torch.long) if hasattr(model, "tokens") else torch.ones(4, 3)
    plan = split(model, x, schedule=schedule)
    n = len(plan.layers)
    saved = 0
    for step in range(schedule.total_steps):
        trains = [not schedule.is_frozen(step, i, n) for i in range(n)]
        for layer in plan.layers:
            needed = trains[: layer.index + 1] + [trains[i] for i in layer.held_by]
            saved += 0 if any(needed) else layer.backward_flops
    forward = sum(layer.forward_flops for layer in plan.layers) * schedule.total_steps
    backward = sum(layer.backward_flops for layer in plan.layers) * schedule.total_steps
    assert plan.backward_saving == pytest.approx(saved / backward)
    assert plan.compute_saving == pytest.approx(saved / (forward + backward))
    assert (plan.backward_saving > 0) == (schedule.freezes and not hasattr(model, "tokens"))
