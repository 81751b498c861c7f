"""Blockers of the backward: against FLOPs counted by hand, and by torch in a real backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastfreeze import FastfreezeWarning, split, trim
from fastfreeze.layers.blockers import BackwardBlocker, backward_blockers
from tests.nets import Does, Skipping

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


def scale():
    return nn.Parameter(torch.ones(8))


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
    """Of a weight, its own gradient counts as well."""
    model = freeze(chain(), "0.", "1.", "2.", but=("1.0.weight", "1.1.weight", "2.1.weight"))
    blockers = backward_blockers(trim(model) if trimmed else model, images())
    prefix = sum(2 * conv_flops(i) for i in range(3))
    shares = {b.parameter: pytest.approx(b.share * prefix, rel=1e-12) for b in blockers}
    both = conv_flops(1) + conv_flops(2)
    assert shares == {"1.0.weight": both, "1.1.weight": conv_flops(2), "2.1.weight": 0}
    assert list(shares) == ["1.0.weight", "1.1.weight", "2.1.weight"]


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


def test_a_branch_beside_the_blocker_does_not_count():
    parts = {"left": nn.Linear(8, 16), "right": nn.Linear(8, 16), "scale": scale()}
    parts |= {"after_left": nn.Linear(16, 4), "after_right": nn.Linear(16, 4)}

    def forward(m, x):
        left = m.after_left(m.left(x * m.scale))
        return m.head(left + m.after_right(m.right(x)))

    model = freeze(Does(forward, **parts, head=nn.Linear(4, 2)), "left", "right", "after")
    (blocker,) = backward_blockers(model, torch.randn(5, 8))
    assert blocker == BackwardBlocker("scale", 0.25)  # the left half, of which one gradient runs


def test_products_without_a_weight_have_two_gradients():
    """Queries with keys, and weights with values, behind a module that has no parameters."""

    def forward(m, x):
        q, k, v = m.qkv(x * m.scale).chunk(3, -1)
        return m.head(m.out(m.softmax(q @ k.transpose(1, 2)) @ v))

    parts = {"scale": scale(), "qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)}
    model = Does(forward, **parts, head=nn.Linear(8, 8), softmax=nn.Softmax(-1))
    (blocker,) = backward_blockers(freeze(model, "qkv", "out"), torch.randn(2, 5, 8))
    linear, product = 2 * 2 * 5 * 8 * 32, 2 * 2 * 2 * 5 * 5 * 8
    assert blocker.parameter == "scale"
    assert blocker.share == pytest.approx((linear + 2 * product) / (2 * linear + 2 * product))


def test_a_shared_parameter_blocks_from_its_first_use_and_belongs_to_its_last():
    model, x = Skipping(), torch.randn(5, 6)
    with pytest.warns(FastfreezeWarning, match="also used before"):
        plan = split(model, x)
    freeze(model, "a", "b")
    model.head.bias.requires_grad_(False)
    for known in (None, plan):
        assert backward_blockers(model, x, plan=known) == [BackwardBlocker("head.weight", 0.5)]


def test_sentence():
    blocker = BackwardBlocker("layer3.bn1.weight", 0.7123)
    assert str(blocker) == "layer3.bn1.weight still trains: 71% of the prefix's backward runs"


def test_arguments_are_checked():
    model = chain()
    with pytest.raises(ValueError, match="plan must be of this Sequential, but is of another"):
        backward_blockers(model, images(), plan=split(chain(), images()))
    with pytest.raises(ValueError, match="does not run on example_inputs"):
        backward_blockers(model, torch.randn(2, 2))
