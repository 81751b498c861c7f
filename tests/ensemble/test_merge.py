"""Members as one graph: what they share runs once, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastfreeze.ensemble import SnapshotEnsemble
from fastfreeze.ensemble.members import hold_the_same, owners_of
from fastfreeze.recipes.models import build_model
from tests.covering import covering
from tests.nets import FAMILIES, Branching, Does, Many, Residual, torchvision_model

pytestmark = pytest.mark.usefixtures("one_thread")


def randomized(model):
    """With weights and statistics of its own."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) - 0.4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.add_(0.5)
    return model


def chain(make, shared, count):
    """State dicts of ``count`` members that have the entries named so in common."""
    first = randomized(make()).state_dict()
    found = [first]
    for _ in range(count - 1):
        own = copy.deepcopy(randomized(make()).state_dict())
        found.append({n: first[n].clone() if n.startswith(shared) else own[n] for n in first})
    return found


class Convolutions(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() in ("aten::convolution", "fastfreeze::winograd_conv2d")
        return function(*args, **(kwargs or {}))


def looped(ensemble, *args, **kwargs):
    """The truth: each member by itself, the mean in float64."""
    with torch.no_grad():
        found = [m(*args, **kwargs).double().softmax(-1) for m in ensemble.members]
    return torch.stack(found)


def assert_right(ensemble, *args, atol=1e-6, **kwargs):
    expected = looped(ensemble, *args, **kwargs)
    found = ensemble(*args, **kwargs)
    torch.testing.assert_close(found.double(), expected.mean(0), rtol=0, atol=atol)
    each = torch.stack(list(ensemble.member_probabilities(*args, **kwargs)))
    torch.testing.assert_close(each.double(), expected, rtol=0, atol=atol)


SHARED = {
    "nothing": ((), 21),
    "stem": (("stem",), 19),
    "a block": (("stem", "blocks.0"), 15),
    "all but the head": (("stem", "blocks", "scale"), 7),
    "all": (("",), 7),
    "not the stem": (("blocks", "scale", "head"), 21),
}


@covering(
    case=SHARED, size=[(1, 1, 1), (3, 8, 8), (2, 17, 5)], fold={"unfolded": False, "folded": True}
)
def test_what_is_shared_runs_once(case, fold, size):
    shared, expected = case
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, shared, 3), fold=fold)
    x = torch.randn(size[0], 3, *size[1:])
    assert_right(ensemble, x)
    with Convolutions() as ran, torch.no_grad():
        ensemble(x)
    assert ran.count == expected
    assert f"folded{': that was not wanted' if not fold else ''}" in ensemble.how_it_ran


def test_unfolded_has_the_bits_of_the_loop():
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem", "blocks.0"), 3), fold=False)
    x = torch.randn(4, 3, 6, 6)
    expected = [m(x).softmax(-1) for m in ensemble.members]
    for found, truth in zip(ensemble.member_probabilities(x), expected, strict=True):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("seed", range(4))
def test_any_pattern_of_sharing(seed):
    """Each tensor of each member is one of two: tries, and graphs that are none."""
    choice = random.Random(seed)
    pool = [copy.deepcopy(randomized(Residual()).state_dict()) for _ in range(2)]
    states = [{n: choice.choice(pool)[n].clone() for n in pool[0]} for _ in range(4)]
    for fold in (False, True):
        assert_right(SnapshotEnsemble(Residual(), states, fold=fold), torch.randn(3, 3, 7, 7))


def test_a_trie_of_three_levels():
    states = chain(Residual, ("stem", "blocks.0"), 4)
    for m in (1, 3):  # members 0 and 1, 2 and 3 have another block in common
        for name in states[0]:
            if name.startswith("blocks.1"):
                states[m][name] = states[m - 1][name].clone()
    ensemble = SnapshotEnsemble(Residual(), states)
    x = torch.randn(2, 3, 9, 9)
    assert_right(ensemble, x)
    with Convolutions() as ran, torch.no_grad():
        ensemble(x)
    assert ran.count == 1 + 2 + 2 * 2 + 4 * 2


def test_equal_parameters_are_held_once():
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem", "blocks"), 5))
    held = {p.data_ptr(): p.numel() for p in ensemble.parameters()}
    own = sum(
        p.numel() for p in [ensemble.members[0].scale, *ensemble.members[0].head.parameters()]
    )
    whole = sum(p.numel() for p in ensemble.members[0].parameters())
    assert sum(held.values()) == whole + 4 * own


def write_in_common(ensemble):
    with torch.no_grad():
        ensemble.members[0].blocks[0].conv1.weight.mul_(1.5)


def replace(ensemble):
    ensemble.members[0].head.weight = nn.Parameter(torch.randn(4, 5))


def load(ensemble):
    other = SnapshotEnsemble(Residual(), chain(Residual, ("stem",), 3))
    ensemble.load_state_dict(other.state_dict())


WRITES = (
    lambda ensemble: ensemble.members[1].stem[1].running_mean.add_(1),
    lambda ensemble: ensemble.members[2].shift.mul_(2),
    *(replace, write_in_common, load),
    lambda e: e.members[1].head.register_forward_hook(lambda *_: torch.zeros(2, 4)),
)


def test_never_stale():
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("",), 3))
    x, seen = torch.randn(2, 3, 6, 6), []
    assert_right(ensemble, x)
    plans = list(ensemble._prepared.values())
    ensemble(x)
    assert list(ensemble._prepared.values()) == plans  # kept while nothing changes
    for write in WRITES:
        write(ensemble)
        for fold in (True, False):
            ensemble.fold = fold
            assert_right(ensemble, x)
            assert ensemble.how_it_ran.endswith("run, folded") == (fold and "one graph" in ensemble.how_it_ran)
        seen.append(ensemble(x))
    for before, after in itertools.pairwise(seen):
        assert not torch.equal(before, after)


def test_loading_gives_each_member_its_own_again():
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("",), 3))
    x = torch.randn(2, 3, 6, 6)
    ensemble(x)
    states = chain(Residual, ("blocks.2",), 3)
    other = SnapshotEnsemble(copy.deepcopy(ensemble.members[0]), states)
    holder = nn.ModuleDict({"ensemble": ensemble})
    holder.load_state_dict({f"ensemble.{k}": v for k, v in other.state_dict().items()})
    for member, state in zip(ensemble.members, states, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    torch.testing.assert_close(ensemble(x), other(x))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies(how):
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem",), 3))
    x = torch.randn(2, 3, 6, 6)
    expected = ensemble(x)
    other = how(ensemble)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.zero_()
    assert torch.equal(other(x), expected)
    assert other.members[0].stem[0].weight is other.members[1].stem[0].weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem",), 3)).to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    assert_right(ensemble, x, atol=1e-14 if dtype == torch.float64 else 2e-2)


def test_autocast():
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem",), 3))
    x = torch.randn(2, 3, 6, 6)
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


def test_arguments():
    ensemble = SnapshotEnsemble(Many(), chain(Many, ("a",), 3))
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    assert_right(ensemble, x, y)
    assert_right(ensemble, x, y, scale=3.0)
    assert_right(ensemble, x, y=y, extra=torch.randn(1, 4))
    named = {"y": y, "extra": torch.randn(5, 4)}
    for names in (named, dict(reversed(named.items()))):  # in whatever order
        assert_right(ensemble, x, scale=3.0, **names)
    assert_right(ensemble, x[:0], y[:0])
    for rows in range(1, 12):  # more kinds of calls than are kept
        assert_right(ensemble, x[:1].expand(rows, 2, 3), y[:1].expand(rows, 2, 4), scale=rows)


def writes_to_shared(m, x):
    """A value that members have in common is written to by what they do not have in common."""
    y = m.a(x)
    view = y[:, :2]
    y *= m.b
    return m.c(y) + view


def shared_value():
    parts = {"a": nn.Linear(3, 3), "b": nn.Parameter(torch.randn(3)), "c": nn.Linear(3, 2)}
    return Does(writes_to_shared, **parts)


def writes_in_a_module():
    """A module that writes to its input without saying so."""
    scale = Does(lambda m, x: x.mul_(m.weight), weight=nn.Parameter(torch.randn(3)))
    parts = {"a": nn.Linear(3, 3), "b": scale, "c": nn.Linear(3, 2)}
    return Does(lambda m, x: m.c(m.b(m.a(x))), **parts)


def writes_to_input():
    return Does(lambda m, x: m.linear(x.add_(1)), linear=nn.Linear(3, 2))


def counts_its_calls(m, x):
    m.calls += 1
    return m.linear(x) * m.calls


def counting():
    model = Does(counts_its_calls, linear=nn.Linear(3, 2))
    model.register_buffer("calls", torch.zeros(()))
    return model


def noisy():
    parts = {"a": nn.Linear(3, 64), "b": nn.Linear(64, 2)}
    return Does(lambda m, x: m.b(F.dropout(m.a(x), 0.5)), **parts)


def noisy_module():
    noise = Does(lambda m, x: x + torch.rand_like(x))
    parts = {"a": nn.Linear(3, 64), "noise": noise, "b": nn.Linear(64, 2)}
    return Does(lambda m, x: m.b(m.noise(m.a(x))), **parts)


@pytest.mark.parametrize("make", [shared_value, writes_in_a_module])
def test_a_shared_value_that_one_member_writes_to(make):
    ensemble = SnapshotEnsemble(make(), chain(make, ("a", "c"), 3))
    assert_right(ensemble, torch.randn(4, 3))
    assert "one graph" in ensemble.how_it_ran


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (writes_to_input, "the model writes to its inputs or to its own tensors in place"),
        (counting, "forward changes attributes of the model"),
        (Branching, "one by one: .*control flow"),
    ],
)
def test_what_cannot_be_one_graph_runs_as_a_loop(make, reason):
    states = chain(make, ("",), 3)
    if make is counting:
        for state in states:
            state["calls"].zero_()
    ensemble, truth = SnapshotEnsemble(make(), states), SnapshotEnsemble(make(), states)
    for _ in range(3):
        x = torch.randn(4, 3)
        after = x + 1 if make is writes_to_input else x.clone()
        expected = torch.stack([m(x.clone()).softmax(-1) for m in truth.members]).mean(0)
        torch.testing.assert_close(ensemble(x), expected)
        assert torch.equal(x, after)
        assert re.search(reason, ensemble.how_it_ran), ensemble.how_it_ran


@pytest.mark.parametrize("make", [noisy, noisy_module])
def test_members_draw_numbers_of_their_own(make):
    ensemble = SnapshotEnsemble(make(), chain(make, ("",), 2))
    x = torch.randn(4, 3)
    for fold in (True, False):
        ensemble.fold = fold
        a, b = ensemble.member_probabilities(x)
        assert not torch.equal(a, b)


def test_bits():
    a = torch.tensor([0.0, float("nan")])
    assert hold_the_same(a, a.clone())
    assert not hold_the_same(a, torch.tensor([-0.0, float("nan")]))
    assert not hold_the_same(a, a.double())
    assert hold_the_same(torch.tensor(1), torch.tensor(1))
    assert hold_the_same(torch.empty(0, 3), torch.empty(0, 3))
    assert not hold_the_same(torch.empty(0, 3), torch.empty(3, 0))
    image = torch.randn(2, 3, 4, 4)
    assert not hold_the_same(image, image.to(memory_format=torch.channels_last))
    assert hold_the_same(
        image.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    )
    for dtype in (torch.bool, torch.complex64, torch.bfloat16, torch.int8):
        ones = torch.ones(3, dtype=dtype)
        assert hold_the_same(ones, ones.clone())
        assert not hold_the_same(ones, torch.zeros(3, dtype=dtype))


def test_owners():
    members = [nn.Linear(2, 1) for _ in range(4)]
    members[2].load_state_dict(members[1].state_dict())
    with torch.no_grad():
        members[3].bias.copy_(members[0].bias)
    assert owners_of(members) == {"weight": (0, 1, 1, 3), "bias": (0, 1, 1, 0)}


@pytest.mark.parametrize("name", ["resnet8-w4", "densenet-bc-10", "wrn10-1"])
def test_the_papers_networks(name):
    def make():
        return build_model(name, num_classes=5)

    names = list(make().state_dict())
    for part in (0, len(names) // 2, len(names)):
        states = chain(make, tuple(names[:part]), 3)
        assert_right(SnapshotEnsemble(make(), states), torch.randn(3, 3, 16, 16), atol=2e-6)


def check_torchvision(name):
    """Three members, of which each has a third of the tensors in common with the one before."""
    model, x = torchvision_model(name)
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
    assert "one graph" in ensemble.how_it_ran
    shared, whole = map(int, re.findall(r"(\d+) of (\d+) nodes", ensemble.how_it_ran)[0])
    assert shared < whole


QUICK = ["resnet18", "mobilenet_v3_small", "swin_t"]


@pytest.mark.parametrize("name", QUICK)
def test_torchvision(name):
    check_torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*FAMILIES, "vit_b_16"} - set(QUICK)))
def test_every_family_of_torchvision(name):
    check_torchvision(name)


def test_called_by_threads_at_once():
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem",), 3))
    inputs = [torch.randn(2, 3, size, size) for size in (5, 6, 7)] * 10
    with torch.no_grad():
        expected = [looped(ensemble, x).mean(0) for x in inputs]
        for x in inputs[:3]:
            ensemble(x)
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(torch.no_grad()(ensemble), inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["loop", "shared", None])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)])
def test_members_that_need_gradients_lose_none(how, which):
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem",), 3), how=how)
    x = torch.randn(2, 3, 6, 6)
    for m in which:
        ensemble.members[m].head.weight = nn.Parameter(torch.randn(4, 5))
    truth = torch.stack([m(x).softmax(-1) for m in ensemble.members]).mean(0)
    found = ensemble(x)
    torch.testing.assert_close(found, truth)
    weights = [ensemble.members[m].head.weight for m in which]
    expected = torch.autograd.grad(truth[:, 0].sum(), weights)
    torch.testing.assert_close(torch.autograd.grad(found[:, 0].sum(), weights), expected)


class Derived(nn.Module):
    """State that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.linear, self.slope = nn.Linear(3, 2), 1.0
        self.plain = torch.ones(2)

    def forward(self, x):
        return self.linear(x) * self.slope + self.plain


def swap(members):
    members[0], members[2] = members[2], members[0]


def other_head(members):
    members[1].head = nn.Linear(5, 4, bias=False).eval().requires_grad_(False)


CHANGES = {
    "append": lambda members: members.append(randomized(Residual()).eval().requires_grad_(False)),
    "remove": lambda members: members.__delitem__(0),
    "swap": swap,
    "unlike: activation": lambda members: setattr(members[1].blocks[0], "relu", nn.Tanh().eval()),
    "unlike: eps": lambda members: setattr(members[1].stem[1], "eps", 0.5),
    "unlike: head": other_head,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first_called", [False, True])
def test_members_that_are_changed(change, first_called):
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem", "blocks"), 3))
    x = torch.randn(2, 3, 6, 6)
    if first_called:
        assert_right(ensemble, x)
    CHANGES[change](ensemble.members)
    assert_right(ensemble, x)
    if change.startswith("unlike"):
        assert "one by one: member 1 differs from the first in" in ensemble.how_it_ran
    ensemble.members = nn.ModuleList(list(ensemble.members)[::-1][:2])
    assert_right(ensemble, x)


def test_members_that_differ_in_other_state():
    ensemble = SnapshotEnsemble(Derived(), chain(Derived, ("",), 3))
    x = torch.randn(4, 3)
    for change, plan in [
        (lambda first, *_: first.plain, "one graph, 3 of 9 nodes run"),  # a tensor, alike in all
        (lambda *members: [m.plain.add_(1) for m in members], "one graph, 3 of 9 nodes run"),
        (lambda *members: members[2].plain.add_(1), "member 2 differs from the first in plain"),
        (lambda *members: setattr(members[1], "slope", 3.0), "member 1 differs from the first in"),
    ]:
        change(*ensemble.members)
        assert_right(ensemble, x)
        assert plan in ensemble.how_it_ran


class Listing(nn.Module):
    """Reads its parameters from a list of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.read = [self.linear.weight]

    def forward(self, x):
        return F.linear(x, self.read[0], self.linear.bias), None


class Guarded(nn.Module):
    """Cannot be copied, and is parametrized, by a class of its own."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        with self.lock:
            return self.linear(x), None


def attend(m, x):
    return m.attention(x, x, x)


def in_bags(m, x):
    return m.bag((x[..., 0].abs() * 3).long().clamp(max=8))[:, None], None


def powers(m, x):
    return sum(x @ w for w in m.all), None


def of_sequence(m, x):
    return m.head(m.inner(x)[0].mean(1))


def weights():
    return nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])


BODIES = {
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "gru": lambda: nn.GRU(4, 2, 2, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(4, 4, bias=False, batch_first=True),
    "attention": lambda: Does(attend, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
    "embedding bag": lambda: Does(in_bags, bag=nn.EmbeddingBag(9, 4)),
    "parameter list": lambda: Does(powers, all=weights()),
    "own list": Listing,
    "lock and weight norm": Guarded,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_modules_that_hold_tensors_in_their_own_way(body):
    def make():
        return Does(of_sequence, inner=body(), head=nn.Linear(4, 3))

    ensemble, x = SnapshotEnsemble(make, chain(make, ("inner",), 3)), torch.randn(3, 5, 4)
    assert_right(ensemble, x)
    ran, whole = map(int, re.search(r"as one graph, (\d+) of (\d+) nodes", ensemble.how_it_ran).groups())
    assert ran == whole // 3 + 2  # the head's own
    in_common = {id(p) for m in ensemble.members for p in m.inner.parameters()}
    again = body is Listing  # what is read elsewhere too is each member's own
    assert len(in_common) == len(list(ensemble.members[0].inner.parameters())) + 2 * again
    torch.testing.assert_close(ensemble.as_module(x)(x[:2]), ensemble(x[:2]))
    with torch.no_grad():
        for p in ensemble.members[1].inner.parameters():
            p.mul_(1.5)
    assert_right(ensemble, x)
    other = SnapshotEnsemble(make, chain(make, (), 3))
    ensemble.load_state_dict(other.state_dict())
    torch.testing.assert_close(ensemble(x), other(x))


@pytest.mark.parametrize("plain_first", [False, True])
def test_a_block_without_autocast(plain_first):
    def forward(m, x):
        with torch.autocast("cpu", enabled=False):
            return m.linear(x.float() + 100)

    def make():
        return Does(forward, linear=nn.Linear(3, 2))

    ensemble, x = SnapshotEnsemble(make(), chain(make, (), 3)), torch.randn(4, 3)
    expected = ensemble(x) if plain_first else None
    with torch.autocast("cpu", torch.bfloat16):
        found = ensemble(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ensemble(x) if expected is None else expected)


def test_an_argument_without_a_hash():
    class Sliced(nn.Linear):
        def forward(self, x, rows):
            return super().forward(x[rows])

    ensemble, x = SnapshotEnsemble(Sliced(3, 2), [Sliced(3, 2).state_dict()] * 2), torch.randn(4, 3)
    torch.testing.assert_close(ensemble(x, slice(1, 3)), ensemble(x[1:3], slice(None)))


def test_an_ensemble_is_freed_at_once():
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem",), 3))
    ensemble(torch.randn(2, 3, 6, 6))
    weight = weakref.ref(ensemble.members[0].head.weight)
    gc.collect()
    gc.disable()
    try:
        del ensemble
        assert weight() is None
    finally:
        gc.enable()
