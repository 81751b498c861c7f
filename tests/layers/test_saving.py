"""t_0 from the saving that is wanted."""

from dataclasses import replace

import pytest
import torch

import fastfreeze
from fastfreeze.recipes.models import build_model


@pytest.fixture(scope="module")
def plan():
    with torch.device("meta"):
        return fastfreeze.split(build_model("resnet20"), torch.empty(2, 3, 32, 32))


def predicted(plan, of, **arguments):
    scheduled = replace(plan, schedule=fastfreeze.FreezeOut(**arguments))
    return scheduled.compute_saving if of == "compute" else scheduled.backward_saving


@pytest.mark.parametrize(
    ("saving", "of", "how_scale"),
    [(0.01, "compute", "cubic"), (0.2, "compute", "linear"), (0.3, "backward", "squared")],
)
def test_t_0_is_the_largest_that_saves_as_much(plan, saving, of, how_scale):
    found = fastfreeze.freezeout_for_saving(plan, saving, 10_000, of=of, how_scale=how_scale)
    assert (found.total_steps, found.how_scale) == (10_000, how_scale)
    assert round(found.t_0, 4) == found.t_0
    at = {"total_steps": 10_000, "how_scale": how_scale}
    assert saving <= predicted(plan, of, t_0=found.t_0, **at) < saving + 1e-3
    assert predicted(plan, of, t_0=found.t_0 + 1e-4, **at) < saving


def test_two_equal_layers_by_hand():
    """Layer 0 alone can freeze: half of the backward, gone after t_0 (linear) of the run.

    The first layer's backward is one product, for its input needs no gradient: a third.
    """
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    plan = fastfreeze.split(model, torch.zeros(4, 8))
    assert [layer.backward_flops for layer in plan.layers] == [512, 1024]
    found = fastfreeze.freezeout_for_saving(plan, 0.2, 1000, of="backward", how_scale="linear")
    assert found.t_0 == pytest.approx(1 - 0.2 * 3, abs=1e-3)
    found = fastfreeze.freezeout_for_saving(plan, 0.1, 1000, how_scale="linear")
    assert found.t_0 == pytest.approx(1 - 0.1 * 5, abs=1e-3)  # 2560 with the forward


def test_stages_and_scale_lr_are_the_schedules(plan):
    found = fastfreeze.freezeout_for_saving(plan, 0.2, 1000, stages=2, scale_lr=False)
    assert (found.stages, found.scale_lr) == (2, False)
    assert found.t_0 < fastfreeze.freezeout_for_saving(plan, 0.2, 1000).t_0  # later in stages


@pytest.mark.parametrize("of", ["compute", "backward"])
def test_what_cannot_be_saved(plan, of):
    highest = predicted(plan, of, total_steps=1000, t_0=1e-4)
    with pytest.raises(ValueError, match=rf"at most {highest:.4f} of the {of}, which t_0=0\.0001 "):
        fastfreeze.freezeout_for_saving(plan, highest + 1e-6, 1000, of=of)
    assert fastfreeze.freezeout_for_saving(plan, highest, 1000, of=of).t_0 >= 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"saving": 0}, r"saving must be in \(0, 1\), got 0"),
        ({"saving": 1}, "got 1"),
        ({"saving": float("nan")}, "got nan"),
        ({"of": "memory"}, "of must be 'compute' or 'backward', got 'memory'"),
        ({"how_scale": "quartic"}, "how_scale"),
        ({"total_steps": 0}, "total_steps"),
    ],
)
def test_bad_arguments(plan, arguments, message):
    with pytest.raises(ValueError, match=message):
        fastfreeze.freezeout_for_saving(plan, **{"saving": 0.2, "total_steps": 10} | arguments)


def test_plan_without_an_example():
    plan = fastfreeze.split(build_model("resnet8"))
    with pytest.raises(ValueError, match=r"plan must come from split\(model, example_inputs\)"):
        fastfreeze.freezeout_for_saving(plan, 0.2, 10)
