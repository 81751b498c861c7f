"""Members as one graph: what they share runs once, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import re
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastfreeze.ensemble import SnapshotEnsemble
from fastfreeze.ensemble.members import hold_the_same, owners_of
from fastfreeze.recipes.models import build_model
from tests.covering import covering
from tests.ensemble.members import Convolutions, assert_mean, assert_right, chain, randomized
from tests.nets import FAMILIES, Residual, torchvision_model

pytestmark = pytest.mark.usefixtures("one_thread")


def made(shared=("stem",), count=3, **options):
    return SnapshotEnsemble(Residual(), chain(Residual, shared, count), **options)


def trie():
    """All have the stem and a block in common, members 0 and 1, 2 and 3 another block."""
    states = chain(Residual, ("stem", "blocks.0"), 4)
    for m in (1, 3):
        for name in states[0]:
            if name.startswith("blocks.1"):
                states[m][name] = states[m - 1][name].clone()
    return states


SHARED = {  # what members have in common, and how many convolutions are left
    "nothing": ((), 21),
    "stem": (("stem",), 19),
    "a block": (("stem", "blocks.0"), 15),
    "all but the head": (("stem", "blocks", "scale"), 7),
    "all": (("",), 7),
    "not the stem": (("blocks", "scale", "head"), 21),
    "trie": (None, 1 + 2 + 2 * 2 + 4 * 2),
}


@covering(
    case=SHARED, size=[(1, 1, 1), (3, 8, 8), (2, 17, 5)], fold={"unfolded": False, "folded": True}
)
def test_what_is_shared_runs_once(case, fold, size):
    shared, expected = case
    states = trie() if shared is None else chain(Residual, shared, 3)
    ensemble = SnapshotEnsemble(Residual(), states, fold=fold)
    x = torch.randn(size[0], 3, *size[1:])
    assert_right(ensemble, x)
    with Convolutions() as ran, torch.no_grad():
        ensemble(x)
    assert ran.count == expected
    assert f"folded{': that was not wanted' if not fold else ''}" in ensemble.how_it_ran
    if not fold:
        found = ensemble.member_probabilities(x)
        assert all(map(torch.equal, found, [m(x).softmax(-1) for m in ensemble.members]))


@pytest.mark.parametrize("seed", range(4))
def test_any_pattern_of_sharing(seed):
    """Each tensor of each member is one of two: tries, and graphs that are none."""
    choice = random.Random(seed)
    pool = [copy.deepcopy(randomized(Residual()).state_dict()) for _ in range(2)]
    states = [{n: choice.choice(pool)[n].clone() for n in pool[0]} for _ in range(4)]
    for fold in (False, True):
        assert_right(SnapshotEnsemble(Residual(), states, fold=fold), torch.randn(3, 3, 7, 7))


def test_equal_parameters_are_held_once():
    ensemble = made(("stem", "blocks"), 5)
    held = {p.data_ptr(): p.numel() for p in ensemble.parameters()}
    first = ensemble.members[0]
    own = first.scale.numel() + sum(p.numel() for p in first.head.parameters())
    assert sum(held.values()) == sum(p.numel() for p in first.parameters()) + 4 * own


class Derived(Residual):
    """State that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__(blocks=1)
        self.slope, self.plain = 1.0, torch.ones(4)

    def forward(self, x):
        return super().forward(x) * self.slope + self.plain


def derived(*shared):
    return SnapshotEnsemble(Derived(), chain(Derived, shared, 3))


def write_in_common(e):
    with torch.no_grad():
        e.members[0].blocks[0].conv1.weight.mul_(1.5)


def swap(e):
    e.members[0], e.members[2] = e.members[2], e.members[0]


def hook(e):
    e.members[1].head.register_forward_hook(lambda *_: torch.zeros(2, 4))


def another_head():
    return nn.Linear(5, 4, bias=False).eval().requires_grad_(False)


ONE, UNLIKE = "one graph", "one by one: member 1 differs from the first in "
CHANGES = {  # and how the ensemble runs after that
    lambda e: e.members[1].stem[1].running_mean.add_(1): ONE,
    lambda e: e.members[2].shift.mul_(2): ONE,
    write_in_common: ONE,
    lambda e: setattr(e.members[0].head, "weight", nn.Parameter(torch.randn(4, 5))): ONE,
    lambda e: e.load_state_dict(derived().state_dict()): ONE,
    hook: "one by one: Linear has hooks",
    lambda e: e.members.append(randomized(Derived()).eval().requires_grad_(False)): ONE,
    lambda e: e.members.__delitem__(0): ONE,
    swap: ONE,
    lambda e: setattr(e, "members", e.members[1:]): ONE,
    lambda e: setattr(e.members[1].blocks[0], "relu", nn.Tanh().eval()): UNLIKE,
    lambda e: setattr(e.members[1].stem[1], "eps", 0.5): UNLIKE + "stem.1.eps",
    lambda e: setattr(e.members[1], "head", another_head()): UNLIKE,
    lambda e: [m.plain.add_(1) for m in e.members]: ONE,
    lambda e: e.members[1].plain.add_(1): UNLIKE + "plain",
    lambda e: setattr(e.members[1], "slope", 3.0): UNLIKE + "slope",
}


@pytest.mark.parametrize("first_called", [True, False])
def test_never_stale(first_called):
    x = torch.randn(2, 3, 6, 6)
    for change, text in CHANGES.items():
        ensemble = derived("stem", "blocks")
        if first_called:
            ensemble(x)
            prepared = list(ensemble._prepared.values())
            ensemble(x)
            assert list(ensemble._prepared.values()) == prepared  # kept while nothing changes
        change(ensemble)
        assert_right(ensemble, x)
        assert text in ensemble.how_it_ran
        assert ensemble.how_it_ran.endswith("run, folded") == (text == ONE)
        ensemble.fold = False
        ensemble(x)
        assert ensemble.how_it_ran.endswith("not wanted") == (text == ONE)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies(how):
    ensemble, x = made(), torch.randn(2, 3, 6, 6)
    expected = ensemble(x)
    other = how(ensemble)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.zero_()
    assert torch.equal(other(x), expected)
    assert other.members[0].stem[0].weight is other.members[1].stem[0].weight


def test_other_dtypes():
    for dtype, atol in [(torch.float64, 1e-14), (torch.bfloat16, 2e-2)]:
        assert_right(made().to(dtype), torch.randn(2, 3, 6, 6, dtype=dtype), atol=atol)


def test_autocast():
    ensemble, x = made(), torch.randn(2, 3, 6, 6)
    ensemble(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.stack([m(x).softmax(-1, torch.float32) for m in ensemble.members]).mean(0)
        found = ensemble(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_made_and_called_in_any_mode(mode):
    states, x, model = chain(Residual, ("stem",), 3), torch.randn(2, 3, 6, 6), Residual()
    expected = SnapshotEnsemble(model, states)(x)
    with mode():
        ensemble = SnapshotEnsemble(model, states)
        found = ensemble(x)
        assert torch.equal(found, expected)
        assert not found.requires_grad
        assert found.is_inference() == (mode is torch.inference_mode)
        assert "one graph" in ensemble.how_it_ran
    assert torch.equal(ensemble(x), expected)


@pytest.mark.parametrize("how", [None, "loop", "shared"])
@pytest.mark.parametrize("which", [(0, 2), (0,), (1,), (2,)])
def test_members_that_need_gradients_lose_none(how, which):
    ensemble, x = made(how=how), torch.randn(2, 3, 6, 6)
    readers = [r for m in which for r in (ensemble.members[m].head, ensemble.members[m].stem[0])]
    for reader in readers:
        reader.weight = nn.Parameter(torch.randn_like(reader.weight))
    truth = torch.stack([m(x).softmax(-1) for m in ensemble.members]).mean(0)
    found = ensemble(x)
    torch.testing.assert_close(found, truth)
    weights = [reader.weight for reader in readers]
    expected = torch.autograd.grad(truth[:, 0].sum(), weights)
    torch.testing.assert_close(torch.autograd.grad(found[:, 0].sum(), weights), expected)


def test_bits():
    ones, empty, image = torch.ones(3), torch.empty(0, 3), torch.randn(2, 3, 4, 4)
    nan, last = torch.tensor([0.0, torch.nan]), image.to(memory_format=torch.channels_last)
    for dtype in (torch.bool, torch.complex64, torch.bfloat16, torch.int8):
        assert hold_the_same(ones.to(dtype), ones.to(dtype))
        assert not hold_the_same(ones.to(dtype), torch.zeros(3, dtype=dtype))
    assert all(hold_the_same(t, t.clone()) for t in (nan, last, empty, torch.tensor(1)))
    assert not hold_the_same(nan, torch.tensor([-0.0, torch.nan]))
    others = [(nan, nan.double()), (empty, torch.empty(3, 0)), (image, last)]
    assert not any(hold_the_same(a, b) for a, b in others)


def test_owners():
    members = [nn.Linear(2, 1) for _ in range(4)]
    members[2].load_state_dict(members[1].state_dict())
    with torch.no_grad():
        members[3].bias.copy_(members[0].bias)
    assert owners_of(members) == {"weight": (0, 1, 1, 3), "bias": (0, 1, 1, 0)}


def check_network(model, x):
    """Three members, of which each has a third of the tensors in common with the one before."""
    names = list(model.state_dict())
    states = [copy.deepcopy(model.state_dict())]
    for part in (1, 2):
        state = copy.deepcopy(states[-1])
        for entry in names[part * len(names) // 3 :]:
            if state[entry].is_floating_point() and "running_var" not in entry:
                state[entry] += 0.01 * torch.randn_like(state[entry])
        states.append(state)
    ensemble = SnapshotEnsemble(model, states)
    assert_right(ensemble, x, atol=1e-5)  # weights that were never trained make large logits
    ran, whole = map(int, re.findall(r"one graph, (\d+) of (\d+) nodes", ensemble.how_it_ran)[0])
    assert ran < whole
    assert ensemble.how_it_ran.endswith("run, folded")


def test_the_papers_networks():
    for name in ("resnet8-w4", "densenet-bc-10", "wrn10-1"):
        check_network(randomized(build_model(name, num_classes=5)), torch.randn(3, 3, 16, 16))


QUICK = ["resnet18", "mobilenet_v3_small", "swin_t"]
SLOW = sorted({*FAMILIES, "vit_b_16"} - set(QUICK))


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_torchvision(name):
    pytest.importorskip("torchvision")
    check_network(*torchvision_model(name))


def test_called_by_threads_at_once():
    ensemble = made()
    inputs = [torch.randn(2, 3, size, size) for size in (5, 6, 7)] * 10
    with torch.no_grad():
        for x in inputs[:3]:
            ensemble(x)
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(torch.no_grad()(ensemble), inputs))
    for mean, x in zip(found, inputs, strict=True):
        assert_mean(mean, ensemble.members, x)


def test_an_ensemble_is_freed_at_once():
    ensemble = made()
    ensemble(torch.randn(2, 3, 6, 6))
    weight = weakref.ref(ensemble.members[0].head.weight)
    gc.collect()
    gc.disable()
    try:
        del ensemble
        assert weight() is None
    finally:
        gc.enable()
