"""Blockers of the backward, against FLOPs counted by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastfreeze import FastfreezeWarning, split, trim
from fastfreeze.layers.blockers import BackwardBlocker, backward_blockers
from tests.nets import Does, Skipping

SIZE, BATCH = 7, 3
CHANNELS = (3, 5, 4, 6, 2)


def block(i):
    conv = nn.Conv2d(CHANNELS[i], CHANNELS[i + 1], 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(CHANNELS[i + 1]), nn.ReLU())


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
    prefix = sum(2 * conv_flops(i) for i in range(3))
    for but, shares in (
        (("1.1.weight",), [conv_flops(2) / prefix]),
        # A trained weight counts its own gradient as well.
        (("1.0.weight", "2.1.weight"), [(conv_flops(1) + conv_flops(2)) / prefix, 0]),
    ):
        model = freeze(chain(), "0.", "1.", "2.", but=but)
        blockers = backward_blockers(trim(model) if trimmed else model, images())
        assert tuple(b.parameter for b in blockers) == but
        assert [b.share for b in blockers] == pytest.approx(shares, rel=1e-12)


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
    def forward(m, x):
        left = m.after_left(m.left(x * m.scale))
        return m.head(left + m.after_right(m.right(x)))

    parts = {name: nn.Linear(8, 16) for name in ("left", "right")}
    parts |= {f"after_{name}": nn.Linear(16, 4) for name in ("left", "right")}
    model = Does(forward, **parts, scale=nn.Parameter(torch.ones(8)), head=nn.Linear(4, 2))
    (blocker,) = backward_blockers(freeze(model, "left", "right", "after"), torch.randn(5, 8))
    assert blocker == BackwardBlocker("scale", 0.25)  # the left half, of which one gradient runs


def test_products_without_a_weight_have_two_gradients():
    """Queries with keys, and weights with values, behind a module that has no parameters."""

    def forward(m, x):
        q, k, v = m.qkv(x * m.scale).chunk(3, -1)
        return m.head(m.out(m.softmax(q @ k.transpose(1, 2)) @ v))

    parts = {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8), "head": nn.Linear(8, 8)}
    model = Does(forward, **parts, softmax=nn.Softmax(-1), scale=nn.Parameter(torch.ones(8)))
    (blocker,) = backward_blockers(freeze(model, "qkv", "out"), torch.randn(2, 5, 8))
    linear, product = 2 * 2 * 5 * 8 * 32, 2 * 2 * 2 * 5 * 5 * 8
    assert blocker.parameter == "scale"
    assert blocker.share == pytest.approx((linear + 2 * product) / (2 * linear + 2 * product))
    text = "scale still trains: 71% of the prefix's backward runs"
    assert str(BackwardBlocker("scale", 0.7123)) == text


def test_a_shared_parameter_blocks_from_its_first_use_and_belongs_to_its_last():
    model, x = Skipping(), torch.randn(5, 6)
    with pytest.warns(FastfreezeWarning, match="also used before"):
        plan = split(model, x)
    freeze(model, "a", "b")
    expected = [BackwardBlocker("head.weight", 0.5)]
    assert backward_blockers(model, x) == backward_blockers(model, x, plan=plan) == expected


def test_model_is_left_as_it_was():
    model, x = freeze(chain(), "0.", "1.", "2.", but=("0.1.bias",)).train(), images()
    model(images()).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    backward_blockers(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])
        assert parameter.requires_grad == (name == "0.1.bias" or name[0] in "36")
    assert all(m.training for m in model.modules())


def test_arguments_are_checked():
    model = chain()
    with pytest.raises(ValueError, match="plan must be of this Sequential, but is of another"):
        backward_blockers(model, images(), plan=split(chain(), images()))
    with pytest.raises(ValueError, match="does not run on example_inputs"):
        backward_blockers(model, torch.randn(2, 2))
