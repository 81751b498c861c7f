"""The table of a plan, and schedules that a plan resolves."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.layers.split import split
from fastfreeze.optim import SGD
from fastfreeze.schedule import FreezeOut, FreezeOutCycles, Frozen, GradualUnfreezing
from fastfreeze.text import format_table, ranges
from tests.layers.models import X, attention, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def test_table():
    model = mlp()
    model[3].requires_grad_(False)
    model[4].requires_grad_(False)
    plan = split(model, torch.ones(4, 3), schedule=FreezeOut(100, t_0=0.5), lr=0.1)
    assert str(plan).splitlines() == [
        "layer  name  modules  parameters  backward  freezes at step  initial lr",
        "-" * 71,
        "    0     0        0          32     23.1%               13         0.8",
        "    1     3     3, 4          88     61.5%        0 (fixed)           -",
        "    2     5        5           9     15.4%                -         0.1",
        "",
        "fixed: 1, as requires_grad was False at the split; to train them, call "
        "model.requires_grad_(True) before it",
        "predicted saving: 38.3% of the compute, 73.6% of the backward",
    ]


def test_table_tells_what_an_earlier_training_has_left_frozen():
    model, schedule = mlp(), FreezeOut(4, t_0=0.5, how_scale="linear")
    for again in (False, True):
        told = pytest.warns(FastfreezeWarning, match="do not train")
        with told if again else contextlib.nullcontext():
            plan = split(model, torch.ones(4, 3), schedule=schedule, lr=0.1)
        assert ("fixed: 0..1, as requires_grad was False" in str(plan)) == again
        SGD(plan.param_groups(), lr=0.1, schedule=schedule).current_step = 3
    plan = split(model.requires_grad_(True), torch.ones(4, 3), schedule=schedule, lr=0.1)
    assert len(plan.param_groups()) == 3
    assert "fixed" not in str(plan)


THAW = FreezeOutCycles(100, num_cycles=5, t_0=0.5, composition="thaw")
UNFREEZING = GradualUnfreezing(9, unfreeze_every=3, layer_decay=0.5)
TABLES = {  # the last columns of each layer's row
    "cycles": (THAW, ["32  3, 23, 43 and 2 more  20, 40, 60 and 1 more  0.8"]),
    "rates": (FreezeOutCycles(100, num_cycles=2, t_0=0.5), ["57  0.1, 0.8"]),
    "unfreezing": (UNFREEZING, ["0  6  0.025", "0  3  0.05", "-  -  0.1"]),
    "frozen": (Frozen(9, until="5"), ["0  -", "0  -", "-  0.1"]),
    "stages": (FreezeOut(100, t_0=0.5, stages=1), ["43  0.237", "43  0.237", "-  0.1"]),
}


@pytest.mark.parametrize(("schedule", "expected"), TABLES.values(), ids=TABLES)
def test_tables_name_every_freeze_and_rate(schedule, expected):
    plan = split(mlp(), schedule=schedule, lr=0.1)
    for line, columns in zip(str(plan).splitlines()[2:], expected, strict=False):
        assert line.split()[-len(columns.split()) :] == columns.split()
    if isinstance(schedule, Frozen):
        assert plan.schedule == Frozen(9, until=2)


@pytest.mark.parametrize(
    ("schedule", "example", "message"),
    [
        (Frozen(9, until="6"), X, r"until must be one of the layers \['0', '3', '5'\], got '6'"),
        (Frozen(9, until=3), X, "until must be in 1..2, as the head trains, got 3"),
        (Frozen(9, until=0.5), None, "until=0.5 .* give split an example input"),
        (GradualUnfreezing(9, unfreeze_every=5), X, "would start layer 0 of 3 at step 10"),
    ],
)
def test_a_schedule_for_other_layers_is_refused(schedule, example, message):
    with pytest.raises(ValueError, match=message):
        split(mlp(), example, schedule=schedule)


def test_a_share_of_the_compute_is_frozen_at_most():
    plan = split(mlp(), torch.ones(4, 3))
    costs = [layer.forward_flops + layer.backward_flops for layer in plan.layers]
    shares = [sum(costs[:n]) / sum(costs) for n in (1, 2)]
    for until, first in [(shares[0] + 1e-6, 1), (shares[1] - 1e-6, 1), (shares[1] + 1e-6, 2)]:
        assert dataclasses.replace(plan, schedule=Frozen(9, until=until)).schedule.until == first


def test_table_leaves_out_what_it_does_not_know():
    plan = split(attention(), torch.ones(2, 5, 3))
    assert "freezes" not in str(plan)
    assert "saving" not in str(plan)
    assert "embed, token, position" in str(plan)
    plan = split(mlp())
    assert str(plan).splitlines()[0] == "layer  name  modules  parameters"
    assert repr(plan) == "<LayerPlan: Sequential in 3 layers>"
    with_schedule = dataclasses.replace(plan, schedule=FreezeOut(10), lr=0.1)
    assert str(with_schedule).splitlines()[0].endswith("freezes at step  initial lr")


def test_counts_are_readable():
    texts = {999: "999", 1000: "1k", 9_536: "9.54k", 999_900: "1M", 11_689_512: "11.7M"}
    for count, text in texts.items():
        with torch.device("meta"):
            assert str(split(nn.Linear(count, 1, bias=False))).split()[-1] == text


def test_format_table():
    assert format_table(["name", "n"], [["a", "10"], ["bc", "-"]]) == (
        "name   n\n--------\na     10\nbc     -"
    )
    assert format_table(["name", "n"], []) == "name  n\n-------"
    assert ranges([0, 1, 3, 5, 6]) == "0..1, 3, 5..6"
    with pytest.raises(ValueError, match="zip"):
        format_table(["name", "n"], [["a"]])
