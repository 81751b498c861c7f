"""Which models can be one graph, with which arguments; those that cannot run one by one."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastfreeze.ensemble import SnapshotEnsemble
from tests.ensemble.members import assert_right, chain
from tests.nets import Does, Many

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_an_argument_without_a_hash():
    class Sliced(nn.Linear):
        def forward(self, x, rows):
            return super().forward(x[rows])

    ensemble, x = SnapshotEnsemble(Sliced(3, 2), [Sliced(3, 2).state_dict()] * 2), torch.randn(4, 3)
    torch.testing.assert_close(ensemble(x, slice(1, 3)), ensemble(x[1:3], slice(None)))


def writes_to_shared(m, x):
    """A value that members have in common is written to by what they do not have in common."""
    y = m.a(x)
    view = y[:, :2]
    y *= m.b
    return m.c(y) + view


def writes_in_a_module(m, x):
    """Which does not say so."""
    return m.c(m.scaled(m.a(x)))


def writes_to_a_copy(m, x):
    """Which is none of a single row."""
    y = m.turned(m.a(x))
    y *= m.b
    return m.c(y)


def writes_to_images(m, x):
    y = m.conv(x[:, :, None, None])
    z = y * 2
    return (y.relu_() + z).flatten(1)


def writes_to_input(m, x):
    return m.c(x.add_(1))


def counts_its_calls(m, x):
    m.calls += 1
    return m.c(x) * m.calls


def branches(m, x):
    return m.c(x) if x.sum() > 0 else m.c(-x)


WRITING = [  # a forward, what members have in common, and how they run
    (writes_to_shared, ("a", "c"), "3 members as one graph"),
    (writes_in_a_module, ("a", "c"), "3 members as one graph"),
    (writes_to_a_copy, ("a", "c"), "3 members as one graph"),
    (writes_to_images, ("",), "not folded: relu_ writes in place to what others may read"),
    (writes_to_input, ("",), "the model writes to its inputs or to its own tensors in place"),
    (counts_its_calls, ("",), "forward changes attributes of the model"),
    (branches, ("",), "one by one: TraceError: symbolically traced variables cannot be used as"),
]


def with_parts(forward):
    parts = {"a": nn.Linear(3, 3), "b": nn.Parameter(torch.randn(3)), "c": nn.Linear(3, 2)}
    scaled = Does(lambda m, x: x.mul_(m.weight), weight=nn.Parameter(torch.randn(3)))
    turned, conv = Does(lambda m, x: x.t().contiguous().t()), nn.Conv2d(3, 2, 1)
    return Does(forward, **parts, scaled=scaled, turned=turned, conv=conv, calls=0)


def test_what_writes_or_branches():
    for forward, shared, text in WRITING:
        make = partial(with_parts, forward)
        states = chain(make, shared, 3)
        ensemble, truth = SnapshotEnsemble(make(), states), SnapshotEnsemble(make(), states)
        for rows in (4, 1, 4):
            x = torch.randn(rows, 3)
            after = x + 1 if forward is writes_to_input else x.clone()
            expected = torch.stack([m(x.clone()).softmax(-1) for m in truth.members]).mean(0)
            torch.testing.assert_close(ensemble(x), expected)
            assert torch.equal(x, after)
            assert text in ensemble.how_it_ran


def concatenates(m, x):
    y = m.c(torch.cat([m.a(x), F.relu(m.b(x))], 1))
    return m.head(y.view(y.shape[0], -1))


def test_concatenations_and_views_are_folded():
    def make():
        convolutions = {n: nn.Conv2d(3, 4, 1) for n in "ab"}
        return Does(concatenates, **convolutions, c=nn.Conv2d(8, 6, 1), head=nn.Linear(96, 3))

    ensemble = SnapshotEnsemble(make(), chain(make, ("a",), 3))
    assert_right(ensemble, torch.randn(3, 3, 4, 4))
    assert ensemble.how_it_ran.endswith("run, folded")


NOISE = [lambda x: F.dropout(x, 0.5), Does(lambda m, x: x + torch.rand_like(x))]


def noisy(noise):
    parts = {"a": nn.Linear(3, 64), "noise": noise, "b": nn.Linear(64, 2)}
    return Does(lambda m, x: m.b(m.noise(m.a(x))), **parts)


def test_members_draw_numbers_of_their_own():
    for noise in NOISE:
        state, x = noisy(noise).state_dict(), torch.randn(4, 3)
        ensemble = SnapshotEnsemble(noisy(noise), [state, state])
        for fold in (True, False):
            ensemble.fold = fold
            a, b = ensemble.member_probabilities(x)
            assert not torch.equal(a, b)


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


# Functions that members have in common, as those of classes are.
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
    _, ran, whole = [int(n) for n in ensemble.how_it_ran.split() if n.isdigit()]
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


@pytest.mark.parametrize("plain_first", [True, False])
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
