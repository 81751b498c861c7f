"""Models for the tests of layers."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tests.nets import Does

X = torch.ones(2, 3)


def fixed(model, *parts):
    for part in parts:
        model.get_submodule(part).requires_grad_(False)
    return model


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.b(F.relu(self.a(self.norm(x))))


def stack():
    """Three blocks, a norm and a head."""
    body = nn.Sequential(Block(8), Block(8), Block(8))
    parts = {"stem": nn.Linear(3, 8), "body": body, "norm": nn.BatchNorm1d(8)}
    return nn.Sequential(OrderedDict(parts, head=nn.Linear(8, 2)))


def ones(*shape):
    return nn.Parameter(torch.ones(shape))


def functional(**parts):
    """Owns its weights and calls F.linear, in another order than they are registered."""
    return Does(
        lambda m, x: F.linear(F.linear(x, m.w1, m.b1).relu(), m.w2, m.b2),
        **{"w2": ones(2, 4), "b2": ones(2), "w1": ones(4, 3), "b1": ones(4), **parts},
    )


def reversed_net():
    """Registered from the head to the stem."""
    return Does(
        lambda m, x: m.head(m.middle(m.norm(m.stem(x)))),
        head=nn.Linear(4, 2),
        middle=nn.Linear(4, 4),
        norm=nn.BatchNorm1d(4),
        stem=nn.Linear(3, 4),
    )


def attention():
    """Multi-head attention, whose out_proj is never called as a module, behind a token."""

    def forward(m, x):
        x = m.embed(x)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
        x = x + m.attention(x, x, x, need_weights=False)[0]
        return m.head(m.norm(x)[:, 0])

    return Does(
        forward,
        embed=nn.Linear(3, 8),
        token=ones(1, 1, 8),
        position=ones(1, 6, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 1),
    )


def tied(bias, functional=False):
    """A language model whose head shares the embedding's weight."""

    def forward(m, x):
        x = m.middle(m.tokens(x) + m.positions(torch.arange(3)))
        return F.linear(x, m.tokens.weight) if functional else m.head(x)

    parts = {"tokens": nn.Embedding(5, 4), "positions": nn.Embedding(3, 4)}
    model = Does(forward, **parts, middle=nn.Linear(4, 4))
    if not functional:
        model.head = nn.Linear(4, 5, bias=bias)
        model.head.weight = model.tokens.weight
    return model


def siamese():
    """Two passes through the same modules that do not depend on each other."""
    parts = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    return Does(lambda m, x: m.head(m.b(m.a(x)) - m.b(m.a(-x))), **parts)


def recurrent():
    """The modules a and b take turns: the second a depends on the first b."""
    parts = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}
    return Does(lambda m, x: m.b(m.a(m.b(m.a(x)))), **parts)


def sequence():
    """A recurrent module, with several weights but single, and a norm."""
    parts = {"rnn": nn.GRU(3, 4, batch_first=True), "norm": nn.BatchNorm1d(4)}
    return Does(lambda m, x: m.head(m.norm(m.rnn(x)[0][:, -1])), **parts, head=nn.Linear(4, 2))


def convolutions():
    parts = {"stem": nn.Conv2d(3, 4, 3), "down": nn.Conv2d(4, 6, 1), "conv": nn.Conv2d(4, 6, 1)}

    def forward(m, x):
        x = m.stem(x)
        return m.head((m.conv(x) + m.down(x)).mean((2, 3)))

    return Does(forward, **parts, head=nn.Linear(6, 2))


def added_product():
    """Operations of three matrices, two of which are multiplied."""
    parts = {"b": ones(4, 4), "v": ones(3, 4), "c": ones(4, 2), "w": ones(4, 2)}
    return Does(lambda m, x: torch.addmm(m.c, torch.addmm(m.b, x, m.v), m.w), **parts)


def auxiliary():
    """A classifier that runs in training only, with dropout by flag."""

    def forward(m, x):
        x = F.dropout(m.norm(m.stem(x)), training=m.training)
        return (m.auxiliary(x), m.head(x)) if m.training else m.head(x)

    parts = {"stem": nn.Linear(3, 8), "norm": nn.BatchNorm1d(8)}
    return Does(forward, **parts, auxiliary=nn.Linear(8, 2), head=nn.Linear(8, 2))


def mlp():
    norms = nn.BatchNorm1d(8, affine=False), nn.LayerNorm((8,))
    linear = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)
    return nn.Sequential(linear[0], norms[0], nn.ReLU(), linear[1], norms[1], linear[2])


def weight_normed():
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Linear(4, 2))


def wrapped(inner):
    return Does(lambda m, x: m.inner(x), inner=inner)
