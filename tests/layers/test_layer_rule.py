"""The rule of split: what counts as a use, what is opened, which units are heads; and no traces."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.layers.frozen import note_frozen
from fastfreeze.layers.split import split
from fastfreeze.schedule import Cosine, FreezeOut
from tests.nets import Does

X = torch.ones(2, 4)


def names(plan):
    return [layer.name for layer in plan.layers]


def home(plan, parameter):
    return next(x.name for x in plan.layers if parameter in dict(x.parameters))


class Block(nn.Module):
    """Two linear modules; takes a second value, like a block that attends to a token."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, other=0):
        return self.b(self.a(x).relu()) + other


def weight(*shape):
    return nn.Parameter(torch.ones(*shape or (4, 4)))


READS = {  # what of the weight is multiplied with
    "twice in one operation": lambda w: w.t() * w.t(),
    "view": lambda w: w.view(4, 4),
    "index": lambda w: w[[3, 2, 1, 0]],
    "cat": lambda w: torch.cat([w[:1], w[1:]]),
    "repeat": lambda w: w.repeat(1, 2)[:, :4],
    "data": lambda w: w.data,
}
EARLY = {"expanded": lambda w: w.expand(4, 4).clone(), "stacked": lambda w: torch.stack([w, w])[0]}


def read_late(read):
    return lambda m, x: m.b(m.a(x) @ read(m.w))


def read_early(read):
    def forward(m, x):
        w = read(m.w)
        return m.b(m.a(x) @ w)

    return forward


def read_again(m, x):
    w = m.w.clone()
    return m.b(m.a(x) @ w) + w


def in_autocast(m, x):
    return m.b(torch.autocast("cpu", torch.bfloat16)(torch.mm)(m.a(x), m.w).float())


USES = {
    **{name: read_late(read) for name, read in READS.items()},
    **{f"{name} at first": read_early(read) for name, read in EARLY.items()},
    "checkpoint": lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False) @ m.w),
    "reentrant checkpoint": lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=True) @ m.w),
    "vmap": lambda m, x: m.b(torch.vmap(lambda row: m.w @ row)(m.a(x))),
    "autocast": in_autocast,
    "cat with values": lambda m, x: m.b(torch.cat([m.a(x), m.w])),
    "again, behind b": read_again,
    "given to a module": lambda m, x: m.b(nn.Identity()(m.w) @ m.a(x).T).T,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_parameter_belongs_where_its_values_are_used_first(use):
    plan = split(Does(use, a=linear(), w=weight(), b=linear()), torch.ones(4, 4))
    assert names(plan) == ["a", "w", "b"]
    assert [len(layer.parameters) for layer in plan.layers] == [2, 1, 2]


def test_an_expanded_parameter_goes_into_modules():
    def forward(m, x):
        token = m.token.expand(2, -1)
        for block in m.blocks:
            token = block(x, token)
        return m.head(token)

    blocks = nn.ModuleList(Block() for _ in range(3))
    plan = split(Does(forward, token=weight(1, 4), blocks=blocks, head=nn.Linear(4, 1)), X)
    assert names(plan) == ["blocks.0", "blocks.1", "blocks.2", "head"]
    assert home(plan, "token") == "blocks.0"


class Stage(nn.Module):
    """Blocks added under names of their own, and run one after the other."""

    def __init__(self, count):
        super().__init__()
        for i in range(count):
            self.add_module(f"b{i}", Block())

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


class Twice(nn.Module):
    """A block of two parts of one class, each with a name and a part to play."""

    def __init__(self):
        super().__init__()
        self.b0, self.b1 = Block(), Block()

    def forward(self, x):
        return x + self.b1(self.b0(x))


@pytest.mark.parametrize("example", [X, None], ids=["run", "symbolic"])
def test_a_stage_that_loops_over_its_blocks_is_opened(example):
    model = nn.Sequential(nn.Linear(4, 4), Stage(3), Twice(), nn.Linear(4, 2))
    assert names(split(model, example)) == ["0", "1.b0", "1.b1", "1.b2", "2", "3"]


def linear():
    return nn.Linear(4, 4)


def deep():
    return nn.Sequential(linear(), nn.ReLU(), linear())


def normed(part):
    return nn.Sequential(part, nn.LayerNorm(4))


def exits(m, x):
    x = m.a(x)
    early = m.early(x) if m.training or not m.only_training else None
    return early, m.head(m.b(x))


def two(m, x):
    x = m.a(x)
    return m.h1(x), m.h2(x)


def added(m, x):
    first, second = two(m, x)
    return first + second


def written(m, x):
    out = torch.zeros(2, 4)
    out[:, :4] = m.a(x)
    return m.h2(m.h1(out))


HEADS = {
    "two": (two, {}, ["a", "h1"]),
    "added": (added, {}, ["a", "h1"]),
    "deep": (two, {"h2": deep()}, ["a", "h2.0", "h1"]),
    "behind a norm": (two, {"a": normed(Block()), "h2": deep()}, ["a.0", "h2.0", "h1"]),
    "with norms": (
        *(two, {"h1": normed(linear()), "h2": nn.Sequential(nn.LayerNorm(4), linear())}),
        ["a", "h1.0"],
    ),
    "none, by a write into a buffer": (written, {}, ["a", "h1", "h2"]),
    "exit": (exits, {"only_training": False}, ["a", "b", "early"]),
    "auxiliary": (exits, {"only_training": True}, ["a", "early", "b", "head"]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("example", [X, None], ids=["run", "symbolic"])
def test_no_head_freezes(case, example):
    forward, parts, expected = HEADS[case]
    usual = ("a", "early", "b", "head") if forward is exits else ("a", "h1", "h2")
    parts = {**{name: linear() for name in usual}, **copy.deepcopy(parts)}
    plan = split(Does(forward, **parts), example)
    assert names(plan) == expected
    assert not any(layer.held_by for layer in plan.layers)


@pytest.mark.filterwarnings("error")
def test_layers_dropped_at_random_are_in_their_places():
    def forward(m, x):
        x = m.first(x) + (m.noise if m.training else 0)
        for layer in m.layers:
            x = x if m.training and torch.rand(()) < 1 else layer(x)
        return m.head(x)

    layers = nn.ModuleList(Block() for _ in range(3))
    model = Does(forward, first=linear(), noise=weight(4), layers=layers, head=linear())
    plan = split(model, X)
    assert names(plan) == ["first", "layers.0", "layers.1", "layers.2", "head"]
    assert home(plan, "noise") == "first"


FREEZING = FreezeOut(10, t_0=0.5)


@pytest.mark.parametrize(
    ("fixed", "marked", "schedule", "message"),
    [
        (["0"], ["0"], None, r"layers 0 \(0\) do not train: a schedule froze them in an earlier"),
        (["0", "1"], ["0"], FREEZING, r"layers 0 \(0\) do not train: .*requires_grad_\(True\) bef"),
        (["0", "1"], [], FREEZING, r"layers 0..1 do not train .* and the schedule has nothing to"),
        (["0", "1"], [], Cosine(10), None),  # a head that is trained alone
        (["0"], [], FREEZING, None),  # a frozen prefix, by hand
        ([], ["0"], FREEZING, None),  # thawed by hand
        ([], [], FREEZING, None),
    ],
)
def test_a_second_run_hears_what_is_fixed(fixed, marked, schedule, message):
    model = nn.Sequential(linear(), linear(), linear())
    for name in marked:
        note_frozen(model.get_submodule(name).parameters())
    for name in fixed:
        model.get_submodule(name).requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split(model, X, schedule=schedule)
    assert len(caught) == (message is not None)
    if message:
        assert caught[0].category is FastfreezeWarning
        assert caught[0].filename == __file__
        assert re.search(message, str(caught[0].message))
