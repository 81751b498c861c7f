"""The frozen prefix as a part of its own: what crosses, what runs again, and what refuses."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fastfreeze.graph import split as splitting
from fastfreeze.graph import trim
from fastfreeze.graph.cut import Dataflow, find_cut
from fastfreeze.graph.split import find_split
from fastfreeze.graph.trace import CallPattern, trace
from fastfreeze.recipes.models import build_model


class Net(nn.Module):
    """``body`` on frozen convolutions and norms ``a``, ``b``, ``c`` and ``late``, which trains."""

    def __init__(self, body, **parts):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(4)
        self.narrow = nn.Conv2d(4, 1, 1)
        self.late = nn.Conv2d(4, 4, 1)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("late"))

    def forward(self, x):
        return self.body(self, x)


def images(n=5):
    return torch.randn(n, 4, 8, 8)


def begun(model, *inputs, **options):
    return trim(model, fold=False, **options)._begin(inputs, {})


def names(nodes):
    return [node.name for node in nodes]


def cat_of_frozen(m, x):
    y = torch.cat([m.a(x), m.b(x), m.a(x)], 1)
    return m.late(F.relu(y).mean(1, keepdim=True).expand(-1, 4, -1, -1))


def pooled(m, x):
    return m.late(F.max_pool2d(F.relu(m.norm(m.a(x))), 2))


def upsampled(m, x):
    return m.late(F.interpolate(m.a(x), scale_factor=2.0))


def widened(m, x):
    return m.late(m.narrow(m.a(x)).expand(-1, 4, -1, -1).sigmoid())


def shortcut(m, x):
    y = F.relu(m.a(x))
    return m.late(m.norm(y)) + y


def two_paths(m, x):
    y = m.a(x)
    return m.late(y.sin()) + y.cos() + y.tanh()


def an_input_read_again(m, x):
    return m.late(m.a(x)) + x


def with_sizes(m, x):
    y = m.a(x)
    n, c, h, w = y.shape
    return m.late(y.flatten(2).sigmoid().view(n, c, h, w)) * h


def several_outputs(m, x):
    y = m.a(x)
    return {"late": m.late(y), "frozen": m.b(y), "sum": y.sum()}


BODIES = {
    "cat_of_frozen": (cat_of_frozen, ["mean"]),
    "pooled": (pooled, ["max_pool2d"]),
    "upsampled": (upsampled, ["a"]),
    "widened": (widened, ["narrow"]),
    "shortcut": (shortcut, ["relu"]),
    "two_paths": (two_paths, ["a"]),
    "an_input_read_again": (an_input_read_again, ["a"]),
    "with_sizes": (with_sizes, ["getitem_2", "view"]),
    "several_outputs": (several_outputs, ["a", "b"]),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_crosses(name):
    body, expected = BODIES[name]
    model, x = Net(body), images()
    call = begun(model, x)
    assert call.reason == ""
    split = call.prefix.split
    assert names(split.crossing) == expected
    values = call.prefix.run(call.tensors)
    crossing = [v for v in values if isinstance(v, torch.Tensor)]
    assert split.nbytes == sum(v.numel() * v.element_size() for v in crossing)
    assert not any(v.requires_grad for v in crossing)
    model.eval()
    reference = model(x)
    model.train()
    found = call.finish(values)
    for a, b in zip(_tensors(found), _tensors(reference), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad


def _tensors(value):
    return list(value.values()) if isinstance(value, dict) else [value]


def smallest_by_search(graph, flow, ahead, read, metas):
    """Bytes of the smallest set of nodes from which all that is read can be made, cheaply."""
    nodes = [node for node in graph.nodes if node in ahead]
    best, once = None, splitting._run_once(flow, ahead)
    for kept in itertools.chain.from_iterable(
        itertools.combinations(nodes, k) for k in range(len(nodes) + 1)
    ):
        pending, possible, seen = list(read), True, set()
        while pending and possible:
            node = pending.pop()
            if node in kept or node in seen or node not in ahead:
                continue
            seen.add(node)
            possible = node not in once
            pending += node.all_input_nodes
        if possible:
            size = sum(metas[n.name].numel() * metas[n.name].element_size() for n in kept)
            best = size if best is None else min(best, size)
    return best


class Random(nn.Module):
    """A graph of a few convolutions and cheap nodes of random widths, wired at random."""

    def __init__(self, seed, size=9):
        super().__init__()
        draw = random.Random(seed)
        self.steps, widths = [], [4]
        for i in range(size):
            a, b = draw.randrange(len(widths)), draw.randrange(len(widths))
            kind = draw.choice(["conv", "conv", "relu", "cat", "pick", "expand"])
            if kind == "conv":
                width = draw.randint(1, 6)
                self.add_module(f"conv{i}", nn.Conv2d(widths[a], width, 1))
            else:
                width = {"relu": widths[a], "cat": widths[a] + widths[b], "pick": 1}.get(kind, 5)
            self.steps.append((kind, i, a, b))
            widths.append(width)
        self.late = nn.Conv2d(1, 1, 1)
        self.read = [len(widths) - 1, *draw.sample(range(1, len(widths)), 2)]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("late"))

    def forward(self, x):
        values = [x]
        for kind, i, a, b in self.steps:
            if kind == "conv":
                y = getattr(self, f"conv{i}")(values[a])
            elif kind == "relu":
                y = F.relu(values[a])
            elif kind == "cat":
                y = torch.cat([values[a], values[b]], 1)
            elif kind == "pick":
                y = torch.narrow(values[a], 1, 0, 1)
            else:
                y = torch.narrow(values[a], 1, 0, 1).sigmoid().expand(-1, 5, -1, -1)
            values.append(y)
        return sum(self.late(torch.narrow(values[i], 1, 0, 1)) for i in self.read)


@pytest.mark.parametrize("seed", range(40))
def test_as_few_bytes_as_a_search_finds(seed):
    model = Random(seed)
    x = torch.randn(2, 4, 3, 3)
    call = begun(model, x)
    if call.prefix is None:
        assert "worth keeping" in call.reason or "nothing" in call.reason
        return
    pattern, _ = CallPattern.of(model, (x,), {})
    traced = trace(model, pattern)
    flow, cut = Dataflow(traced.graph, model), find_cut(traced, model)
    metas = values_of(traced.graph, model, x)
    ahead = splitting._may_run_ahead(traced.graph, flow, frozenset(cut.in_eval))
    read = splitting._read_behind(traced.graph, ahead)
    split = find_split(flow, cut, metas)
    assert split.nbytes == smallest_by_search(traced.graph, flow, ahead, read, metas)
    assert split.nbytes == call.prefix.split.nbytes
    values = call.prefix.run(call.tensors)
    assert torch.equal(call.finish(values), model(x))


def values_of(graph, model, x):
    class Recorder(fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    values = {}
    with torch.no_grad():
        Recorder(model, graph=graph).run(x)
    return values


# --- writes in place ---------------------------------------------------------------------------


def written_before(m, x):
    y = m.a(x)
    y.mul_(2)
    return m.late(y)


def written_under_another_name(m, x):
    y = m.a(x)
    z = F.relu(y)
    z.sub_(1)
    return m.late(torch.cat([z, y], 1)[:, 2:6])


def written_after_a_view(m, x):
    y = m.a(x)
    z = y[:, :2]
    y.relu_()
    return m.late(torch.cat([z, z], 1))


def written_at_the_boundary(m, x):
    return F.relu_(m.late(F.relu_(m.a(x))))


def written_by_what_trains(m, x):
    y = m.a(x)
    z = y + 1
    y.add_(m.late(z).mean())
    return y + z


def input_written_first(m, x):
    x = x.mul_(2)
    return m.late(m.a(x))


def input_written_behind(m, x):
    y = m.late(m.a(x))
    x.mul_(2)
    return y + x


@pytest.mark.parametrize(
    "body",
    [
        written_before,
        written_under_another_name,
        written_after_a_view,
        written_at_the_boundary,
        written_by_what_trains,
        input_written_first,
        input_written_behind,
    ],
)
def test_writes_in_place(body):
    """Whether or not it can be split, outputs, gradients and the input are the model's."""
    model, x = Net(body), images()
    reference, given, expected_given = copy.deepcopy(model), x.clone(), x.clone()
    for module in reference.modules():
        module.eval()
    trimmed = trim(model, fold=False)
    found, expected = trimmed(given), reference(expected_given)
    assert torch.equal(found, expected)
    assert torch.equal(given, expected_given)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(model.late.weight.grad, reference.late.weight.grad)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (input_written_first, "writes to what the model was given"),
        (lambda m, x: m.late(x) + m.norm(x), "nothing in the frozen prefix is worth keeping"),
        (lambda m, x: m.late(x) + F.dropout(m.a(m.late(x))), "nothing frozen"),
    ],
)
def test_reasons(body, reason):
    call = begun(Net(body), images())
    assert call.prefix is None
    assert reason in call.reason


def test_hooks_and_inputs_that_require_grad():
    model = Net(shortcut)
    assert begun(model, images().requires_grad_()).reason == "an input requires grad"
    model.a.register_forward_hook(lambda *_: None)
    assert begun(model, images()).reason == "Conv2d has hooks"


# --- moving on, and what values depend on ------------------------------------------------------


def freeze_share(model, share):
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i >= share * len(parameters))


@pytest.mark.parametrize("name", ["resnet20", "wrn16-2", "densenet-bc-40", "vgg16"])
def test_values_of_an_earlier_cut_are_carried_on(name):
    model = build_model(name).train()
    trimmed, x = trim(model, fold=False), torch.randn(2, 3, 16, 16)
    steps = []
    for share in (0.2, 0.5, 0.8):
        freeze_share(model, share)
        call = trimmed._begin((x,), {})
        steps.append((call.prefix, call.prefix.run(call.tensors)))
    for (earlier, values), (later, expected) in itertools.combinations(steps, 2):
        found = later.advance(earlier, call.tensors, values)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(LookupError):
        steps[0][0].advance(steps[1][0], call.tensors, steps[1][1])
    freeze_share(model, 0.5)
    other = trim(copy.deepcopy(model), fold=False)._begin((x,), {})
    with pytest.raises(LookupError, match="another graph"):
        steps[2][0].advance(other.prefix, call.tensors, steps[1][1])


def test_key_tells_what_values_depend_on():
    model, x = Net(pooled), images()

    def key(network):
        return network._begin((x,), {}).prefix.key

    trimmed = trim(model)
    first = key(trimmed)
    assert key(trimmed) == first
    assert key(trim(copy.deepcopy(model))) == first
    assert key(trim(model, fold=False)) != first
    seen = {first}
    for tensor in (model.a.weight, model.norm.running_var, model.norm.bias):
        with torch.no_grad():
            tensor.mul_(2).add_(1)
        assert key(trimmed) not in seen
        seen.add(key(trimmed))
    with torch.no_grad():
        model.late.weight.mul_(2)  # does not matter
    assert key(trimmed) in seen
    model.norm.eps = 0.1
    assert key(trimmed) not in seen


def test_splitting_again_when_the_cut_moves():
    model, x = Net(lambda m, x: m.late(m.c(m.b(m.a(x))))), images()
    trimmed = trim(model)
    prefixes = []
    for frozen in ("ab", "ab", "abc", "a"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name[0] not in frozen)
        prefixes.append(trimmed._begin((x,), {}).prefix)
    assert [names(p.split.crossing) for p in prefixes] == [["b"], ["b"], ["c"], ["a"]]
    assert prefixes[0] is prefixes[1]


def test_in_words():
    model, x = Net(cat_of_frozen), images()
    trimmed = trim(model)
    assert trimmed.prefix == "nothing runs first: not called yet"
    trimmed(x)
    first, last = "6 nodes run first, ", "; crossing: mean, 0.00 MiB; 1 run again"
    assert trimmed.prefix == f"{first}folded{last}"
    plain = trim(model, fold=False)
    plain(x)
    assert plain.prefix == f"{first}as they are (asked for by fold=False){last}"
    model.requires_grad_(True)
    assert "nothing runs first" in trimmed.prefix
