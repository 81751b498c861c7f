"""Blockers of the backward: against FLOPs counted by hand, and by torch in a real backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastfreeze import FastfreezeWarning, split, trim
from fastfreeze.layers.blockers import BackwardBlocker, backward_blockers

SIZE, BATCH = 7, 3
CHANNELS = (3, 5, 4, 6, 2)


def block(i):
    return nn.Sequential(
        nn.Conv2d(CHANNELS[i], CHANNELS[i + 1], 3, padding=1, bias=False),
        nn.BatchNorm2d(CHANNELS[i + 1]),
        nn.ReLU(),
    )


def chain():
    blocks = [block(i) for i in range(len(CHANNELS) - 1)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))


def images():
    return torch.randn(BATCH, 3, SIZE, SIZE)


def conv_flops(i):
    return 2 * BATCH * SIZE**2 * 9 * CHANNELS[i] * CHANNELS[i + 1]


def freeze(model, *frozen, but=()):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) or name in but)
    return model


@pytest.mark.parametrize("trimmed", [False, True])
def test_share_is_what_lies_between_the_blocker_and_the_end(trimmed):
    model = freeze(chain(), "0.", "1.", "2.", but=("1.1.weight",))
    (blocker,) = backward_blockers(trim(model) if trimmed else model, images())
    prefix = sum(2 * conv_flops(i) for i in range(3))
    assert blocker.parameter == "1.1.weight"
    assert blocker.share == pytest.approx(conv_flops(2) / prefix, rel=1e-12)


def test_a_trained_weight_counts_its_own_gradient_as_well():
    model = freeze(chain(), "0.", "1.", "2.", but=("1.0.weight", "2.1.weight"))
    blockers = backward_blockers(model, images())
    prefix = sum(2 * conv_flops(i) for i in range(3))
    assert [b.parameter for b in blockers] == ["1.0.weight", "2.1.weight"]
    assert blockers[0].share == pytest.approx((conv_flops(1) + conv_flops(2)) / prefix, rel=1e-12)
    assert blockers[1].share == 0


def test_shares_are_those_of_a_real_backward():
    """What a blocker adds to the backward: its share, and the gradient of what the prefix gives."""
    x = images()
    counted = []
    for but in ((), ("0.1.bias",)):
        model = freeze(chain(), "0.", "1.", "2.", but=but)
        with FlopCounterMode(display=False) as counter:
            loss = model(x).sum()
            forward = counter.get_total_flops()
            loss.backward()
        counted.append(counter.get_total_flops() - forward)
    (blocker,) = backward_blockers(model, x)
    prefix = sum(2 * conv_flops(i) for i in range(3))
    assert counted[1] - counted[0] == round(blocker.share * prefix) + conv_flops(3)


@pytest.mark.parametrize(
    ("frozen", "but"),
    [
        ((), ()),  # nothing is frozen
        (("",), ()),  # everything is
        (("0.", "1."), ()),
        (("0.", "1.0."), ()),  # a block's convolution without its norm
        (("0.", "1.0.", "1.1.weight"), ()),  # half of a norm
        (("6.",), ()),  # the head alone
    ],
)
def test_no_blockers(frozen, but):
    assert backward_blockers(freeze(chain(), *frozen, but=but), images()) == []


def test_everything_below_what_is_frozen_blocks_if_it_is_the_smaller_part():
    model = freeze(chain(), "1.", "2.", "3.")
    names = [b.parameter for b in backward_blockers(model, images())]
    assert names == ["0.0.weight", "0.1.weight", "0.1.bias"]


def test_prefix_of_a_plan_consists_of_whole_layers():
    model, x = chain(), images()
    plan = split(model, x)
    freeze(model, "0.", "1.", "2.1.")  # the third layer's norm only: the layer is not meant
    model[2][1].bias.requires_grad_(True)
    assert backward_blockers(model, x, plan=plan) == []
    freeze(model, "0.", "1.", "2.0.")  # most of the third layer
    named = [b.parameter for b in backward_blockers(model, x, plan=plan)]
    assert named == ["2.1.weight", "2.1.bias"]
    assert backward_blockers(model, x) == []  # its norm may as well be where the rest begins


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)
        self.scale = nn.Parameter(torch.ones(8))
        self.after_left, self.after_right = nn.Linear(16, 4), nn.Linear(16, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        left = self.after_left(self.left(x * self.scale))
        return self.head(left + self.after_right(self.right(x)))


def test_a_branch_beside_the_blocker_does_not_count():
    model = freeze(Branches(), "left", "right", "after")
    (blocker,) = backward_blockers(model, torch.randn(5, 8))
    assert blocker == BackwardBlocker("scale", 0.25)  # the left half, of which one gradient runs


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        q, k, v = self.qkv(x * self.scale).chunk(3, -1)
        return self.head(self.out(self.softmax(q @ k.transpose(1, 2)) @ v))


def test_products_without_a_weight_have_two_gradients():
    """Queries with keys, and weights with values, behind a module that has no parameters."""
    model = freeze(Attention(), "qkv", "out")
    (blocker,) = backward_blockers(model, torch.randn(2, 5, 8))
    linear, product = 2 * 2 * 5 * 8 * 32, 2 * 2 * 2 * 5 * 5 * 8
    assert blocker.parameter == "scale"
    assert blocker.share == pytest.approx((linear + 2 * product) / (2 * linear + 2 * product))


class Tied(nn.Module):
    """The head's weight is used at the bottom as well."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.head = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.head(self.body(x @ self.head.weight))


def test_a_shared_parameter_blocks_from_its_first_use_and_belongs_to_its_last():
    model, x = Tied(), torch.randn(5, 6)
    with pytest.warns(FastfreezeWarning, match="also used before"):
        plan = split(model, x)
    freeze(model, "body")
    assert backward_blockers(model, x) == [BackwardBlocker("head.weight", 0.5)]
    assert backward_blockers(model, x, plan=plan) == [BackwardBlocker("head.weight", 0.5)]


def test_sentence():
    blocker = BackwardBlocker("layer3.bn1.weight", 0.7123)
    assert str(blocker) == "layer3.bn1.weight still trains: 71% of the prefix's backward runs"


def test_arguments_are_checked():
    model = chain()
    with pytest.raises(ValueError, match="plan must be of this Sequential, but is of another"):
        backward_blockers(model, images(), plan=split(chain(), images()))
    with pytest.raises(ValueError, match="does not run on example_inputs"):
        backward_blockers(model, torch.randn(2, 2))
