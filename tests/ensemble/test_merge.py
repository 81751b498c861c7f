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
from tests.nets import FAMILIES
from tests.nets import torchvision_model as build

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Net(nn.Module):
    """In-place sums, a parameter that is used by itself, dropout, a buffer."""

    def __init__(self, blocks=3, width=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.scale = nn.Parameter(torch.rand(width, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(width, 1, 1), persistent=False)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        y = F.relu(self.blocks(F.relu(self.stem(x))) * self.scale + self.shift)
        return self.head(self.dropout(y.mean((2, 3))))


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
    ensemble = SnapshotEnsemble(Net(), chain(Net, shared, 3), fold=fold)
    x = torch.randn(size[0], 3, *size[1:])
    assert_right(ensemble, x)
    with Convolutions() as ran, torch.no_grad():
        ensemble(x)
    assert ran.count == expected
    assert f"folded{': that was not wanted' if not fold else ''}" in ensemble.plan


def test_unfolded_has_the_bits_of_the_loop():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem", "blocks.0"), 3), fold=False)
    x = torch.randn(4, 3, 6, 6)
    expected = [m(x).softmax(-1) for m in ensemble.members]
    for found, truth in zip(ensemble.member_probabilities(x), expected, strict=True):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("seed", range(8))
def test_any_pattern_of_sharing(seed):
    """Each tensor of each member is one of two: tries, and graphs that are none."""
    choice = random.Random(seed)
    pool = [copy.deepcopy(randomized(Net()).state_dict()) for _ in range(2)]
    states = [{n: choice.choice(pool)[n].clone() for n in pool[0]} for _ in range(4)]
    for fold in (False, True):
        assert_right(SnapshotEnsemble(Net(), states, fold=fold), torch.randn(3, 3, 7, 7))


def test_a_trie_of_three_levels():
    states = chain(Net, ("stem", "blocks.0"), 4)
    for m in (1, 3):  # members 0 and 1, 2 and 3 have another block in common
        for name in states[0]:
            if name.startswith("blocks.1"):
                states[m][name] = states[m - 1][name].clone()
    ensemble = SnapshotEnsemble(Net(), states)
    x = torch.randn(2, 3, 9, 9)
    assert_right(ensemble, x)
    with Convolutions() as ran, torch.no_grad():
        ensemble(x)
    assert ran.count == 1 + 2 + 2 * 2 + 4 * 2


def test_equal_parameters_are_held_once():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem", "blocks"), 5))
    held = {p.data_ptr(): p.numel() for p in ensemble.parameters()}
    own = sum(
        p.numel() for p in [ensemble.members[0].scale, *ensemble.members[0].head.parameters()]
    )
    whole = sum(p.numel() for p in ensemble.members[0].parameters())
    assert sum(held.values()) == whole + 4 * own


@pytest.mark.parametrize("fold", [False, True])
def test_never_stale(fold):
    """Whatever is done to a member, the next call knows of it."""
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("",), 3), fold=fold)
    x = torch.randn(2, 3, 6, 6)
    assert_right(ensemble, x)

    def write_statistics():
        ensemble.members[1].stem[1].running_mean.add_(1)

    def write_hidden_buffer():
        ensemble.members[2].shift.mul_(2)

    def replace():
        ensemble.members[0].head.weight = nn.Parameter(torch.randn(4, 5))

    def write_in_common():
        with torch.no_grad():
            ensemble.members[0].blocks[0].conv1.weight.mul_(1.5)

    def load():
        ensemble.load_state_dict(SnapshotEnsemble(Net(), chain(Net, ("stem",), 3)).state_dict())

    def hook():
        ensemble.members[1].head.register_forward_hook(lambda *_: torch.zeros(2, 4))

    seen = []
    for change in (write_statistics, write_hidden_buffer, replace, write_in_common, load, hook):
        change()
        assert_right(ensemble, x)
        seen.append(ensemble(x))
    for before, after in itertools.pairwise(seen):
        assert not torch.equal(before, after)


def test_loading_gives_each_member_its_own_again():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("",), 3))
    x = torch.randn(2, 3, 6, 6)
    ensemble(x)
    states = chain(Net, ("blocks.2",), 3)
    other = SnapshotEnsemble(copy.deepcopy(ensemble.members[0]), states)
    holder = nn.ModuleDict({"ensemble": ensemble})
    holder.load_state_dict({f"ensemble.{k}": v for k, v in other.state_dict().items()})
    for member, state in zip(ensemble.members, states, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    torch.testing.assert_close(ensemble(x), other(x))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies(how):
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3))
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
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3)).to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    assert_right(ensemble, x, atol=1e-14 if dtype == torch.float64 else 2e-2)


def test_autocast():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3))
    x = torch.randn(2, 3, 6, 6)
    ensemble(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.stack([m(x).softmax(-1, torch.float32) for m in ensemble.members]).mean(0)
        found = ensemble(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_made_and_called_in_any_mode(mode):
    states, x, model = chain(Net, ("stem",), 3), torch.randn(2, 3, 6, 6), Net()
    expected = SnapshotEnsemble(model, states)(x)
    with mode():
        ensemble = SnapshotEnsemble(model, states)
        assert torch.equal(ensemble(x), expected)
        assert "one graph" in ensemble.plan
    assert torch.equal(ensemble(x), expected)


def test_gradients_reach_the_input():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem", "blocks.0"), 3)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    truth = torch.stack([m(x).softmax(-1) for m in ensemble.members]).mean(0)
    expected = torch.autograd.grad(truth[:, 0].sum(), x)[0]
    found = torch.autograd.grad(ensemble(x)[:, 0].sum(), x)[0]
    torch.testing.assert_close(found, expected)


class Many(nn.Module):
    """Several inputs, by position and by name, one of them no tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x, y, *, scale=1.0, extra=None):
        z = self.a(x) + y * scale
        return self.b(z if extra is None else z + extra)


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


class WritesToInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x.add_(1))


class WritesToShared(nn.Module):
    """A value that members have in common is written to by what they do not have in common."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x):
        y = self.a(x)
        view = y[:, :2]
        y *= self.b
        return self.c(y) + view


class Scale(nn.Module):
    """Writes to its input without saying so."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return x.mul_(self.weight)


class WritesInAModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), Scale(), nn.Linear(3, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class NoisyModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.noise, self.b = nn.Linear(3, 64), Noise(), nn.Linear(64, 2)

    def forward(self, x):
        return self.b(self.noise(self.a(x)))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 64), nn.Linear(64, 2)

    def forward(self, x):
        return self.b(F.dropout(self.a(x), 0.5))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize("make", [WritesToShared, WritesInAModule])
def test_a_shared_value_that_one_member_writes_to(make):
    ensemble = SnapshotEnsemble(make(), chain(make, ("a", "c"), 3))
    assert_right(ensemble, torch.randn(4, 3))
    assert "one graph" in ensemble.plan


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (WritesToInput, "the model writes to its inputs or to its own tensors in place"),
        (Counting, "forward changes attributes of the model"),
        (Branching, "one by one: .*control flow"),
    ],
)
def test_what_cannot_be_one_graph_runs_as_a_loop(make, reason):
    states = chain(make, ("",), 3)
    if make is Counting:
        for state in states:
            state["calls"].zero_()
    ensemble, truth = SnapshotEnsemble(make(), states), SnapshotEnsemble(make(), states)
    for _ in range(3):
        x = torch.randn(4, 3)
        after = x + 1 if make is WritesToInput else x.clone()
        expected = torch.stack([m(x.clone()).softmax(-1) for m in truth.members]).mean(0)
        torch.testing.assert_close(ensemble(x), expected)
        assert torch.equal(x, after)
        assert re.search(reason, ensemble.plan), ensemble.plan


@pytest.mark.parametrize("make", [Noisy, NoisyModule])
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
    model, x = build(name)
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
    assert "one graph" in ensemble.plan
    shared, whole = map(int, re.findall(r"(\d+) of (\d+) nodes", ensemble.plan)[0])
    assert shared < whole


QUICK = ["resnet18", "mobilenet_v3_small", "vit_b_16", "swin_t"]


@pytest.mark.parametrize("name", QUICK)
def test_torchvision(name):
    check_torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(QUICK)))
def test_every_family_of_torchvision(name):
    check_torchvision(name)


def test_called_by_threads_at_once():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3))
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
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3), how=how)
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


def append(ensemble):
    ensemble.members.append(randomized(Net()).eval().requires_grad_(False))


def remove(ensemble):
    del ensemble.members[0]


def swap(ensemble):
    ensemble.members[0], ensemble.members[2] = ensemble.members[2], ensemble.members[0]


def renew(ensemble):
    ensemble.members = nn.ModuleList(list(ensemble.members)[::-1][:2])


def other_activation(ensemble):
    ensemble.members[1].blocks[0].relu = nn.Tanh().eval()


def other_eps(ensemble):
    ensemble.members[1].stem[1].eps = 0.5


def other_head(ensemble):
    ensemble.members[1].head = nn.Linear(5, 4, bias=False).eval().requires_grad_(False)


UNLIKE = (other_activation, other_eps, other_head)
CHANGES = [append, remove, swap, renew, *UNLIKE]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first_called", [False, True])
def test_members_that_are_changed(change, first_called):
    """The next call is right."""
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem", "blocks"), 3))
    x = torch.randn(2, 3, 6, 6)
    if first_called:
        assert_right(ensemble, x)
    change(ensemble)
    assert_right(ensemble, x)
    if change in UNLIKE:
        assert "one by one: member 1 differs from the first in" in ensemble.plan


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
        assert plan in ensemble.plan


def test_a_graph_is_kept_while_nothing_changes():
    ensemble, x = SnapshotEnsemble(Derived(), chain(Derived, (), 2)), torch.randn(4, 3)
    ensemble(x)
    (plan,) = ensemble._prepared.values()
    ensemble(x)
    assert list(ensemble._prepared.values()) == [plan]


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4)

    def forward(self, x):
        return self.bag((x[..., 0].abs() * 3).long().clamp(max=8))[:, None], None


class Powers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])

    def forward(self, x):
        return sum(x @ w for w in self.weights), None


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


class Sequences(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x)[0].mean(1))


BODIES = {
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "gru": lambda: nn.GRU(4, 2, 2, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(4, 4, bias=False, batch_first=True),
    "attention": Attending,
    "embedding bag": Counts,
    "parameter list": Powers,
    "own list": Listing,
    "lock and weight norm": Guarded,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_modules_that_hold_tensors_in_their_own_way(body):
    """They are shared where frozen, run once, exported, and load."""

    def make():
        return Sequences(body())

    ensemble, x = SnapshotEnsemble(make, chain(make, ("body",), 3)), torch.randn(3, 5, 4)
    assert_right(ensemble, x)
    ran, whole = map(int, re.search(r"as one graph, (\d+) of (\d+) nodes", ensemble.plan).groups())
    assert ran == whole // 3 + 2  # the head's own
    in_common = {id(p) for m in ensemble.members for p in m.body.parameters()}
    again = body is Listing  # what is read elsewhere too is each member's own
    assert len(in_common) == len(list(ensemble.members[0].body.parameters())) + 2 * again
    torch.testing.assert_close(ensemble.as_module(x)(x[:2]), ensemble(x[:2]))
    with torch.no_grad():
        for p in ensemble.members[1].body.parameters():
            p.mul_(1.5)
    assert_right(ensemble, x)
    other = SnapshotEnsemble(make, chain(make, (), 3))
    ensemble.load_state_dict(other.state_dict())
    torch.testing.assert_close(ensemble(x), other(x))


def test_fold_may_be_set():
    ensemble, x = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3)), torch.randn(2, 3, 6, 6)
    for fold in (True, False, True):
        ensemble.fold = fold
        assert_right(ensemble, x)
        assert ensemble.plan.endswith("run, folded") == fold


class Precise(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.linear(x.float() + 100)


@pytest.mark.parametrize("plain_first", [False, True])
def test_a_block_without_autocast(plain_first):
    ensemble, x = SnapshotEnsemble(Precise(), chain(Precise, (), 3)), torch.randn(4, 3)
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
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3))
    ensemble(torch.randn(2, 3, 6, 6))
    weight = weakref.ref(ensemble.members[0].head.weight)
    gc.collect()
    gc.disable()
    try:
        del ensemble
        assert weight() is None
    finally:
        gc.enable()
