"""The rewriter: trimmed models against the same models with their frozen parts frozen by hand."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves
from torchvision.models import get_model, list_models
from torchvision.models.maxvit import MaxVit

from fastfreeze import graph
from fastfreeze.errors import FastfreezeWarning
from fastfreeze.trim.compare import excess
from tests.conftest import every_device, rows_by_device

trim = partial(graph.trim, fold=False)  # bits are compared here; folding has its own tests


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the same, by hand -------------------------------------------------------------------------


def in_execution_order(model, *inputs):
    """Parameters by their module's first call; those of modules never called, after the caller."""
    order = []
    hooks = []
    for module in model.modules():
        own, all_of_it = list(module.parameters(recurse=False)), list(module.parameters())
        hooks.append(module.register_forward_pre_hook(lambda *_, p=own: order.extend(p)))
        hooks.append(module.register_forward_hook(lambda *_, p=all_of_it: order.extend(p)))
    mode = model.training
    model.eval()
    with torch.no_grad():
        model(*inputs)
    model.train(mode)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(order))


def call_by_hand(model, *inputs):
    """A plain call; a module runs in eval mode if autograd finds nothing to train up to it."""
    hooks, modes = [], {}

    def enter(module, args, kwargs):
        modes[module] = module.training
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(t.requires_grad for t in (*tensors, *module.parameters())):
            module.eval()

    def leave(module, *_):
        module.train(modes[module])

    for module in model.modules():
        if not module._modules or isinstance(module, nn.MultiheadAttention):
            hooks.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
    output = model(*inputs)
    for hook in hooks:
        hook.remove()
    return output


def tensors(value):
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    if hasattr(value, "__dataclass_fields__"):
        items = [getattr(value, name) for name in value.__dataclass_fields__]
    return [t for item in items if item is not None for t in tensors(item)]


def step(model, call, *inputs, steps=1):
    """Outputs, gradients and buffers after forward and backward; gradients and buffers reset."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(1)
    for _ in range(steps):
        model.zero_grad()
        outputs = tensors(call(*inputs))
        weights = [torch.arange(t.numel(), device=t.device).cos().view_as(t) for t in outputs]
        loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
        if loss.requires_grad:
            loss.backward()
    result = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    result |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    result |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    model.zero_grad()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return result


def differing(a, b):
    assert a.keys() == b.keys()
    return [
        name
        for name in a
        if (a[name] is None) != (b[name] is None)
        or (a[name] is not None and not torch.equal(a[name], b[name]))
    ]


def freeze(model, *prefixes):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))
    return model


def assert_trims_exactly(model, *inputs, steps=2):
    """A fresh trim of ``model`` gives its bits, and does not move frozen parts; returns it."""
    expected = step(model, lambda *x: call_by_hand(model, *x), *inputs, steps=steps)
    trimmed = trim(model)
    assert differing(step(model, trimmed, *inputs, steps=steps), expected) == []
    return trimmed


def graph_size(output):
    """Number of nodes of the backward graph."""
    seen, stack = set(), [t.grad_fn for t in tensors(output)]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return len(seen)


def saved_bytes(call):
    """Bytes of storage that the forward keeps for the backward."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that kept its own output itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = call()
    del output
    return sum(kept.values())


# --- torchvision -------------------------------------------------------------------------------


AUX = ("googlenet", "inception_v3")


class EmptyOnMeta(TorchFunctionMode):
    """Modules built inside have parameters without storage; other tensors stay real."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def small_maxvit():
    return MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 8, stochastic_depth_prob=0.5, num_classes=4)


def build(name, size=None):
    """A torchvision model without its weights, and an input."""
    sizes = {"alexnet": 64, "inception_v3": 299, "maxvit_t": 224, "vit_h_14": 28}
    size = size or sizes.get(name, 32)
    options = {}
    if name.startswith("vit"):
        options["image_size"] = size
    if name in AUX:
        options["init_weights"] = False
    return get_model(name, weights=None, **options).train(), torch.randn(2, 3, size, size)


QUICK = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5"),
    *("mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnet50", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t"),
]


def check_frozen(model, x, share):
    """Freeze this share of the parameters, in the order of execution."""
    order = in_execution_order(model, x)
    count = int(share * len(order))
    assert len(order) == len(list(model.parameters()))
    for number, parameter in enumerate(order):
        parameter.requires_grad_(number >= count)
    trimmed = assert_trims_exactly(model, x)
    assert trimmed.cut.mode == "fx"
    assert 0.75 * count < trimmed.cut.frozen_parameters <= count


def check_folded(model, *inputs):
    """Values, not gradients: norms over two samples make much of rounding in what they read."""
    trimmed = graph.trim(model)
    trimmed.verify(*inputs)
    call = trimmed._begin(inputs, {})
    values = call.prefix.run(call.tensors)
    assert call.prefix.unfolded in ("", "there is no convolution")
    assert excess(values, call.prefix.run(call.tensors, fold=False)) < 0.1


@pytest.mark.parametrize("name", QUICK)
def test_torchvision_families(name):
    check_frozen(*build(name), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models(module=torchvision.models))
def test_every_torchvision_model(name):
    """Those that are too large to run are traced and cut on the meta device."""
    with EmptyOnMeta():
        model = get_model(name, weights=None, **({"init_weights": False} if name in AUX else {}))
    if sum(p.numel() for p in model.parameters()) < 60e6:
        model, x = build(name)
        for share in (1 / 3, 2 / 3):
            check_frozen(model, x, share)
            check_folded(model, x)
        return
    parameters = list(model.train().parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(False)
    cut = trim(model).cut
    assert cut.mode == "fx"
    assert 0 < len(cut.frozen) < cut.num_nodes
    assert 0.8 * (len(parameters) // 2) < cut.frozen_parameters <= len(parameters) // 2


# --- small models, each with the parts that are frozen -----------------------------------------


def conv(channels=4, inputs=4):
    return nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels))


class Net(nn.Module):
    """Three blocks and a head, put together by ``body``."""

    def __init__(self, body=None, **modules):
        super().__init__()
        self.a, self.b, self.c = conv(inputs=3), conv(), conv()
        self.head = nn.Linear(4, 2)
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = body

    def forward(self, *x):
        return self.body(self, *x)


def chain(m, x):
    return m.head(m.c(m.b(m.a(x).relu()).relu()).mean((2, 3)))


def residual(m, x):
    x = m.a(x).relu()
    x = x + m.b(x)
    x = x + m.c(x)
    return m.head(x.mean((2, 3)))


def dense(m, x):
    features = [m.a(x)]
    for layer in (m.b, m.c):
        features.append(layer(sum(features)))
    return m.head(torch.cat(features, 2).mean((2, 3)))


def branching(m, x):
    stem = m.a(x)
    return m.head((m.b(stem) * torch.sigmoid(m.c(stem))).mean((2, 3)))


def frozen_branch_runs_last(m, x):
    return m.head((m.c(m.b(x[:, [0, 0, 0, 0]])) + m.a(x)).mean((2, 3)))


def two_inputs(m, x, y):
    return m.head((m.a(x) + m.b(y)).mean((2, 3)))


def two_outputs(m, x):
    x = m.a(x)
    return m.head(m.b(x).mean((2, 3))), x


def named(m, x):
    x = m.a(x)
    return {"features": x, "scores": [m.head(m.b(x).mean((2, 3))), None]}


def ordered(m, x):
    return OrderedDict(out=m.head(m.a(x).mean((2, 3))))


class Pair(NamedTuple):
    scores: Tensor
    features: Tensor


def named_tuple(m, x):
    x = m.a(x)
    return Pair(m.head(m.b(x).mean((2, 3))), x)


@dataclass
class Result:
    scores: Tensor
    features: Tensor | None = None


def data_class(m, x):
    x = m.a(x)
    return Result(m.head(m.b(x).mean((2, 3))), x)


def reused(m, x):
    """One block and one dropout, before and after the cut."""
    x = m.drop(m.act(m.a(x)))
    x = m.drop(m.act(m.b(x)))
    x = m.drop(m.act(m.b(m.c(x))))
    return m.head(x.mean((2, 3)))


def in_place_relu(m, x):
    x = m.act(m.a(x))
    return m.head(m.act(m.b(x)).mean((2, 3)))


def adds_to_frozen(m, x):
    x = m.a(x).relu_().flatten(2).transpose(1, 2)
    x += m.scale
    return m.head(x.mean(1))


def adds_to_base_of_view(m, x):
    """A view made before the write must carry its gradient."""
    x = m.a(x)
    view = x.flatten(2)
    x += m.scale.view(4, 1, 1)
    return m.head(view.mean(2))


def adds_to_view(m, x):
    x = m.a(x)
    x[:, :2].mul_(m.scale.view(4, 1, 1)[:2])
    return m.head(m.b(x).mean((2, 3)))


def writes_one_of_two_views(m, x):
    x = m.a(x)
    one, other = x.flatten(2), x.transpose(2, 3)
    one *= m.scale.view(4, 1)
    return m.head(other.mean((2, 3)))


def writes_view_of_view(m, x):
    view = m.a(x).relu_().flatten(2)
    view[:, :2] *= m.scale.view(4, 1)[:2]
    return m.head(view.mean(2))


def reads_what_was_written(m, x):
    """Written through one name, read as the result and through a view of it."""
    x = m.a(x).relu_()
    y = m.b(x)
    z = x.mul_(m.scale.view(4, 1, 1))
    return m.head((y + z.transpose(2, 3) + x).mean((2, 3)))


def writes_result_of_in_place_relu(m, x):
    x = m.a(x)
    y = F.relu(x, inplace=True)
    y.mul_(m.scale.view(4, 1, 1))
    return m.head(x.mean((2, 3)))


def clone(x, training=False):
    """No clone at all, for all that an operator of that name says."""
    return x.view_as(x)


def writes_beside_a_view(m, x):
    x = m.a(x)
    y = clone(x)
    x.mul_(m.scale.view(4, 1, 1))
    return m.head(y.mean((2, 3)))


def writes_own_values(m, x):
    """A module that writes in place, unsaid, to what trains: no concern of the cut."""
    return m.head(m.writes(m.b(m.a(x))).mean((2, 3)))


def scaled_input(m, x):
    return m.head(m.b(m.a(x * 2)).mean((2, 3)))


def only_shape_crosses(m, x):
    y = m.a(x)
    return m.head(m.b(x[:, [0, 0, 0, 0]]).mean((2, 3))) * y.shape[1]


def writes_items(m, x):
    x = m.a(x)
    out = x.new_zeros(x.shape[0], 4)
    out[:, 1:] = x.mean((2, 3))[:, 1:]
    out[:, 0] = m.scale[0]
    return m.head(out)


def frozen_reads_after_write(m, x):
    x = m.a(x)
    x *= m.scale.view(4, 1, 1)
    return m.head(m.b(x).mean((2, 3)))


def view_crosses(m, x):
    """A view that was made under no_grad and is written to in grad mode."""
    y = m.a(x).flatten(2)
    return m.head(y.add_(m.scale.view(4, 1)).mean(2))


def write_before_trained_read(m, x):
    x = m.a(x)
    y = x.clone()
    y.clamp_(min=0.1)
    return m.head((m.b(y) + x).mean((2, 3)))


def old_value_after_write(m, x):
    """``+=`` changes what the other name refers to."""
    x = m.a(x)
    kept = x
    x += 1
    return m.head((m.b(x) * kept).mean((2, 3)))


def makes_tensors(m, x):
    x = m.a(x)
    x = x + torch.arange(8, device=x.device) / 8 + torch.linspace(0, 1, 8)
    return m.head(m.b(x).mean((2, 3)))


def draws(m, x):
    """Randomness on both sides of the cut, not that of a dropout."""
    x = m.a(x)
    x = x + torch.randn(4, 1, 1)
    return m.head(m.drop(m.b(x) * torch.rand(1)).mean((2, 3)))


def trained_shape(m, x):
    """What depends on a trained tensor's shape alone is still frozen."""
    y = m.b(x[:, [0, 0, 0, 0]])
    return m.head((m.a(F.interpolate(x, size=y.shape[-2:])) + y).mean((2, 3)))


def buffered(m, x):
    return m.head(((m.a(x) - m.mean) / m.plain).mean((2, 3)))


def whole(m, x):
    return m.head(m.a(x).mean((2, 3)))


def scale():
    return nn.Parameter(torch.tensor([0.5, 1.5, -1.0, 2.0]))


def dropout():
    return {"drop": nn.Dropout(0.5), "act": nn.ReLU()}


class Custom(nn.Module):
    """A leaf with its own Python."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return x * self.weight * torch.rand(()) if self.training and x.mean() < 9 else x


class WritesUnseen(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x.mul_(self.weight)


MODELS = {
    # name: (model, what is frozen, number of inputs)
    "chain": (lambda: Net(chain), ("a", "b"), 1),
    "chain, partial layer": (lambda: Net(chain), ("a", "b.0.weight"), 1),
    "chain, norm not frozen": (lambda: Net(chain), ("a.0", "b"), 1),
    "frozen middle": (lambda: Net(chain), ("b",), 1),
    "everything frozen": (lambda: Net(chain), ("",), 1),
    "residual": (lambda: Net(residual), ("a", "b"), 1),
    "dense": (lambda: Net(dense), ("a", "b"), 1),
    "branching, one branch": (lambda: Net(branching), ("a", "c"), 1),
    "branching, stem": (lambda: Net(branching), ("a",), 1),
    "frozen branch runs last": (lambda: Net(frozen_branch_runs_last), ("a",), 1),
    "frozen branch runs first": (lambda: Net(frozen_branch_runs_last), ("b", "c"), 1),
    "two inputs": (lambda: Net(two_inputs, b=conv(inputs=3)), ("b",), 2),
    "two outputs": (lambda: Net(two_outputs), ("a",), 1),
    "dict output": (lambda: Net(named), ("a",), 1),
    "ordered dict output": (lambda: Net(ordered), ("a",), 1),
    "named tuple output": (lambda: Net(named_tuple), ("a",), 1),
    "dataclass output": (lambda: Net(data_class), ("a",), 1),
    "shared modules": (lambda: Net(reused, **dropout()), ("a", "b"), 1),
    "shared modules, all of it": (lambda: Net(reused, **dropout()), ("a", "b", "c"), 1),
    "in-place relu": (lambda: Net(in_place_relu, act=nn.ReLU(inplace=True)), ("a",), 1),
    "writes to frozen": (lambda: Net(adds_to_frozen, scale=scale()), ("a",), 1),
    "writes under a view": (lambda: Net(adds_to_base_of_view, scale=scale()), ("a",), 1),
    "writes to a view": (lambda: Net(adds_to_view, scale=scale()), ("a", "b"), 1),
    "writes one of two views": (lambda: Net(writes_one_of_two_views, scale=scale()), ("a",), 1),
    "writes view of view": (lambda: Net(writes_view_of_view, scale=scale()), ("a",), 1),
    "reads what was written": (lambda: Net(reads_what_was_written, scale=scale()), ("a", "b"), 1),
    "writes relu's result": (lambda: Net(writes_result_of_in_place_relu, scale=scale()), ("a",), 1),
    "writes beside a view": (lambda: Net(writes_beside_a_view, scale=scale()), ("a",), 1),
    "writes own": (lambda: Net(writes_own_values, writes=WritesUnseen()), ("a",), 1),
    "scaled input": (lambda: Net(scaled_input), ("b",), 1),
    "only a shape crosses": (lambda: Net(only_shape_crosses), ("a",), 1),
    "writes items": (lambda: Net(writes_items, scale=scale()), ("a",), 1),
    "reads after write": (lambda: Net(frozen_reads_after_write, scale=scale()), ("a", "b"), 1),
    "view crosses": (lambda: Net(view_crosses, scale=scale()), ("a",), 1),
    "clone is written to": (lambda: Net(write_before_trained_read), ("a",), 1),
    "two names": (lambda: Net(old_value_after_write), ("a",), 1),
    "makes tensors": (lambda: Net(makes_tensors), ("a",), 1),
    "draws": (lambda: Net(draws, **dropout()), ("a",), 1),
    "shape of trained": (lambda: Net(trained_shape), ("a",), 1),
    "custom leaf": (lambda: Net(lambda m, x: chain(m, m.leaf(x)), leaf=Custom()), ("leaf", "a"), 1),
    "custom leaf trains": (lambda: Net(lambda m, x: chain(m, m.leaf(x)), leaf=Custom()), ("a",), 1),
    "no statistics": (
        lambda: Net(whole, a=nn.BatchNorm2d(3, track_running_stats=False), head=nn.Linear(3, 2)),
        ("a",),
        1,
    ),
    "weight norm": (
        lambda: Net(chain, b=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
        ("a", "b"),
        1,
    ),
    "weight norm, half": (
        lambda: Net(chain, b=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
        ("a", "b.parametrizations.weight.original0"),
        1,
    ),
    "spectral norm": (
        lambda: Net(chain, b=nn.utils.spectral_norm(nn.Conv2d(4, 4, 3))),
        ("a", "b"),
        1,
    ),
}


def small(name, device="cpu"):
    make, frozen, inputs = MODELS[name]
    model = freeze(make(), *frozen).to(device)
    return model, [torch.randn(4, 3, 8, 8).to(device) for _ in range(inputs)]


SOME = ["chain", "reads after write", "writes to frozen", "two outputs", "shared modules"]


@pytest.mark.parametrize(("name", "device"), rows_by_device(MODELS, SOME))
def test_small_models(name, device):
    model, inputs = small(name, device)
    trimmed = assert_trims_exactly(model, *inputs)
    assert trimmed.cut.mode == "fx"
    trimmed.verify(*inputs)


def test_maxvit():
    check_frozen(small_maxvit().train(), torch.randn(2, 3, 32, 32), 0.5)


@pytest.mark.parametrize(
    ("name", "frozen", "missing", "boundary"),
    [
        ("chain", {"a_0", "a_1", "b_0", "b_1", "relu", "relu_1"}, set(), ["relu_1"]),
        ("chain, partial layer", {"a_0", "a_1", "relu"}, {"b_0"}, ["relu"]),
        ("frozen branch runs last", {"a_0", "a_1"}, {"b_0", "add"}, ["getitem", "a_1"]),
        ("reads after write", {"a_0", "a_1"}, {"b_0", "b_1"}, ["a_1"]),
        ("writes under a view", {"a_0", "a_1"}, {"flatten"}, ["a_1"]),
        ("writes to frozen", {"a_0", "a_1", "flatten", "transpose"}, set(), ["transpose"]),
        ("two names", {"a_0", "a_1", "iadd"}, {"b_0"}, ["a_1", "iadd"]),
        ("shape of trained", {"a_0", "a_1", "interpolate"}, {"b_0"}, ["getitem", "a_1"]),
        ("frozen middle", set(), {"b_0"}, []),
        ("two outputs", {"a_0", "a_1"}, {"b_0"}, ["a_1"]),
        ("scaled input", set(), {"mul"}, []),
        ("only a shape crosses", {"a_0", "a_1"}, {"b_0"}, ["getitem"]),
    ],
)
def test_cut(name, frozen, missing, boundary):
    model, _ = small(name)
    cut = trim(model).cut
    assert frozen <= set(cut.frozen)
    assert not missing & set(cut.frozen)
    assert list(cut.boundary) == boundary
    assert isinstance(hash(cut), int)


@pytest.mark.parametrize(
    ("frozen", "text"),
    [
        (("a",), "3 of 10 nodes frozen, 4 parameters; crossing: relu"),
        (("c",), "nothing frozen before the first of 10 nodes that trains"),
    ],
)
def test_cut_in_words(frozen, text):
    assert str(trim(freeze(Net(chain), *frozen)).cut) == text


# --- what is switched off ----------------------------------------------------------------------


def stochastic(function):
    """Frozen block, ``function`` in the prefix, trained block, dropout that goes on."""

    def body(m, x):
        x = function(m, m.a(x))
        return m.head(F.dropout(m.b(x), 0.5, m.training).mean((2, 3)))

    return body


def attention(dropout_p):
    def call(m, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=dropout_p)

    return call


def drop_path(x, probability=0.0, training=False):
    """Someone's own, with Python that cannot be traced."""
    if probability == 0.0 or not training or x.ndim < 2:
        return x
    return x * (torch.rand(x.shape[0], *[1] * (x.ndim - 1)) > probability)


STATISTICS = (torch.full((4,), 0.5), torch.full((4,), 2.0))
SWITCHED_OFF = {
    "F.dropout": (lambda m, x: F.dropout(x, 0.5), lambda m, x: x),
    "F.dropout, by keyword": (lambda m, x: F.dropout(x, training=m.training), lambda m, x: x),
    "F.dropout2d": (lambda m, x: F.dropout2d(x, 0.5, True), lambda m, x: x),
    "F.alpha_dropout": (lambda m, x: F.alpha_dropout(x, 0.5, True), lambda m, x: x),
    "torch.dropout": (lambda m, x: torch.dropout(x, 0.5, True), lambda m, x: x),
    "F.rrelu": (lambda m, x: F.rrelu(x, training=True), lambda m, x: F.rrelu(x)),
    "stochastic_depth": (
        lambda m, x: torchvision.ops.stochastic_depth(x, 0.5, "row", m.training),
        lambda m, x: x,
    ),
    "drop_path": (lambda m, x: drop_path(x, 0.5, m.training), lambda m, x: x),
    "attention": (attention(0.5), attention(0.0)),
    "F.batch_norm": (
        lambda m, x: F.batch_norm(x, m.mean, m.var, training=True),
        lambda m, x: F.batch_norm(x, m.mean, m.var),
    ),
    "F.instance_norm": (
        lambda m, x: F.instance_norm(x, m.mean, m.var),
        lambda m, x: F.instance_norm(x, m.mean, m.var, use_input_stats=False),
    ),
    "F.batch_norm, no statistics": (lambda m, x: F.batch_norm(x, None, None, training=True),) * 2,
    "F.instance_norm, no statistics": (lambda m, x: F.instance_norm(x),) * 2,
    "MultiheadAttention": (
        lambda m, x: m.attention(*[x.flatten(2).transpose(1, 2)] * 3)[0][:, :, :, None],
        lambda m, x: m.attention.eval()(*[x.flatten(2).transpose(1, 2)] * 3)[0][:, :, :, None],
    ),
}


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_training_is_switched_off_in_the_prefix_alone(name):
    function, expected = SWITCHED_OFF[name]
    model = Net(stochastic(function), attention=nn.MultiheadAttention(4, 2, dropout=0.5))
    if name == "MultiheadAttention":
        model.b = conv(inputs=64)
    for key, value in zip(("mean", "var"), STATISTICS, strict=True):
        model.register_buffer(key, value.clone())
    freeze(model, "a", "attention")
    x = torch.randn(2, 3, 8, 8)
    by_hand = copy.deepcopy(model)
    by_hand.body = stochastic(expected)
    by_hand.a.eval()
    trimmed = trim(model)
    assert differing(step(model, trimmed, x, steps=2), step(by_hand, by_hand, x, steps=2)) == []
    assert trimmed.cut.mode == "fx"


class TwoTowers(nn.Module):
    """Each with a dropout and a norm without parameters at its input."""

    def __init__(self):
        super().__init__()
        self.drop = nn.ModuleList(nn.Dropout(0.5) for _ in range(2))
        self.norm = nn.ModuleList(nn.BatchNorm1d(4, affine=False) for _ in range(2))
        self.linear = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        towers = zip(self.drop, self.norm, self.linear, strict=True)
        return sum(linear(norm(drop(x))) for drop, norm, linear in towers)


@pytest.mark.parametrize(
    ("frozen", "in_eval"),
    [((), ()), (("linear.1",), (1,)), (("linear.0", "linear.1"), (0, 1))],
    ids=["none", "one tower", "both"],
)
def test_only_what_leads_to_frozen_parameters_is_in_eval(frozen, in_eval):
    model = freeze(TwoTowers(), "nothing", *frozen)
    x = torch.randn(8, 4)
    by_hand = copy.deepcopy(model)
    for tower in in_eval:
        by_hand.drop[tower].eval()
        by_hand.norm[tower].eval()
    assert differing(step(model, trim(model), x, steps=2), step(by_hand, by_hand, x, steps=2)) == []


# --- following the flags -----------------------------------------------------------------------


def inputs(batch=4):
    return torch.randn(batch, 3, 8, 8)


def count_traces(monkeypatch):
    """A list that grows by one with each trace."""
    from fastfreeze.graph import graphs

    traces = []
    original = graphs.trace
    monkeypatch.setattr(graphs, "trace", lambda *a: traces.append(a) or original(*a))
    return traces


STAGES = [(), ("a",), ("a", "b"), ("a", "b", "c"), ("",), ("a",), (), ("b",), ("a", "c"), ("a",)]


def test_freezing_and_thawing_equals_fresh_trims(monkeypatch):
    """Optimizer steps in between; the model is traced once."""
    model = Net(reused, **dropout())
    trimmed = trim(model)
    traces = count_traces(monkeypatch)
    for stage in STAGES:
        freeze(model, "nothing", *stage)
        x = inputs()
        expected = step(model, lambda *v: call_by_hand(model, *v), x)
        assert differing(step(model, trimmed, x), expected) == []
        assert trim(copy.deepcopy(model)).cut == trimmed.cut
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.manual_seed(2)
        loss = trimmed(x).sum()
        if trained:
            for parameter, gradient in zip(
                trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True
            ):
                parameter.data -= 0.1 * gradient
    assert len(traces) == 1 + len(STAGES)  # the fresh ones for ``cut``


@every_device
def test_frozen_parts_keep_every_bit(device):
    model = Net(chain).to(device)
    trimmed = trim(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(4):
        (trimmed if epoch % 2 else model).train()
        if epoch == 1:
            for parameter in model.a.parameters():
                parameter.requires_grad_(False)
            frozen = copy.deepcopy(model.a.state_dict())
        for _ in range(2):
            trimmed(inputs().to(device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        (trimmed if epoch % 2 else model).eval()
        assert torch.equal(trimmed(x := inputs().to(device)), model(x))
    after = model.a.state_dict()
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)
    assert int(model.b[1].num_batches_tracked) == 8


@pytest.mark.parametrize(
    ("frozen", "training"),
    [((), True), (("b",), True), (("a",), False), (("",), False)],
    ids=["nothing frozen", "frozen middle", "eval mode", "eval mode, all frozen"],
)
def test_the_model_itself_runs(frozen, training):
    model = freeze(Net(chain), "nothing", *frozen).train(training)
    trimmed = trim(model)
    trimmed(inputs())  # compares the graph, where there is one
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.c.register_forward_hook(lambda *_: calls.append(2))
    if not frozen or not training:
        trimmed(inputs())
        assert calls == [2, 1]
    model.c._forward_hooks.clear()
    model._forward_hooks.clear()
    x = inputs()
    assert differing(step(model, trimmed, x), step(model, model, x)) == []


def test_everything_frozen_needs_no_backward():
    model = freeze(Net(named), "")
    trimmed = trim(model)
    for _ in range(2):
        assert not any(t.requires_grad for t in tensors(trimmed(inputs())))
    assert trimmed.cut.boundary == ("a_1", "head")
    assert trimmed.cut.frozen_parameters == 10


def test_backward_and_saved_tensors_shrink():
    model = Net(chain)
    x = inputs()
    trimmed = trim(model)
    sizes, kept = [], []
    for stage in (), ("a",), ("a", "b"), ("a", "b", "c"), ("",):
        freeze(model, "nothing", *stage)
        trimmed(x)
        sizes.append(graph_size(trimmed(x)))
        kept.append(saved_bytes(lambda: trimmed(x)))
    assert sizes == sorted(set(sizes), reverse=True)
    assert kept == sorted(set(kept), reverse=True)
    assert sizes[-1] == kept[-1] == 0


def test_prefix_runs_under_no_grad_and_hands_on_detached():
    seen = {}

    class Probe(nn.Identity):
        def forward(self, x):
            seen[self.name] = (
                torch.is_grad_enabled(),
                x.grad_fn is None,
                x._is_view(),
                self.training,
            )
            return x

    model = Net(lambda m, x: m.head(m.q(m.a(m.p(x)).flatten(2)).mean(2)), p=Probe(), q=Probe())
    model.p.name, model.q.name = "prefix", "rest"
    model.q.weight = scale()
    trimmed = trim(freeze(model, "a"))
    for _ in range(2):
        trimmed(inputs())
    assert seen == {"prefix": (False, True, False, False), "rest": (True, True, False, True)}
    assert all(m.training for m in model.modules())


def test_input_that_requires_grad():
    model = freeze(Net(chain), "a")
    trimmed = trim(model)
    trimmed(inputs())
    x, y = (inputs().requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    by_hand = copy.deepcopy(model)
    by_hand.a.eval()
    by_hand(x).square().sum().backward()
    for _ in range(2):
        y.grad = None
        trimmed.zero_grad()
        trimmed(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(model.head.weight.grad, by_hand.head.weight.grad)
    assert int(model.a[1].num_batches_tracked) == 0


@pytest.mark.parametrize("mode", ["autocast", "no_grad", "inference_mode"])
def test_inside_other_modes(mode):
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    model = freeze(Net(chain), "a", "b")
    trimmed = trim(model)
    x = inputs()

    def inside(function):
        def call(*args):
            with contexts[mode]():
                return function(*args)

        return call

    for warm in (False, True):
        expected = step(model, inside(lambda *v: call_with_modes(model, {"a", "b"}, *v)), x)
        assert differing(step(model, inside(trimmed), x), expected) == []
        assert torch.is_grad_enabled()
        if not warm:
            trimmed(x)
            model.load_state_dict(model.state_dict())


def call_with_modes(model, in_eval, *args):
    """A plain call with the modules of these names in eval mode."""
    for name in in_eval:
        model.get_submodule(name).eval()
    try:
        return model(*args)
    finally:
        model.train()


class Fails(nn.Module):
    error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
@pytest.mark.parametrize("where", ["prefix", "rest"])
@pytest.mark.parametrize("level", ["graph", "modules"])
def test_exceptions_leave_modes_as_they_were(error, where, level):
    fails = Fails()
    model = Net(
        chain,
        **{
            "a" if where == "prefix" else "c": nn.Sequential(
                conv(4, 3 if where == "prefix" else 4), fails
            )
        },
    )
    freeze(model, "a", "b")
    trimmed = trim(model)
    handle = model.b.register_forward_hook(lambda *_: None) if level == "modules" else None
    if handle:
        with pytest.warns(FastfreezeWarning):
            trimmed(inputs())
    for _ in range(2):
        trimmed(inputs())
    fails.error = error
    with pytest.raises(type(error)):
        trimmed(inputs())
    fails.error = None
    assert torch.is_grad_enabled()
    assert all(m.training for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    assert int(model.b[1].num_batches_tracked) == 0
    trimmed.verify(inputs())


# --- ways of calling ---------------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x, mask=None, *, double=False, scale=1, extra=()):
        x = self.a(x)
        if mask is not None:
            x = x * mask["mask"]
        if double:
            x = x * 2
        for item in extra:
            x = x + item
        return self.b(x) * scale


ROWS = torch.ones(2, 3)
CALLS = {
    "plain": ((), {}),
    "mask": (({"mask": torch.zeros(5, 4)},), {}),
    "mask by keyword": ((), {"mask": {"mask": torch.ones(5, 4)}}),
    "flag": ((), {"double": True}),
    "int": ((), {"scale": 2}),
    "float": ((), {"scale": 2.0}),
    "bool": ((), {"scale": True}),
    "tensor": ((), {"scale": torch.tensor(0.5)}),
    "list": ((), {"extra": [torch.ones(4), 1, torch.zeros(4)]}),
}


def test_each_way_of_calling_has_its_own_graph():
    model = freeze(Optional(), "a")
    trimmed = trim(model)
    x = torch.randn(5, 3)
    for name in [*CALLS, *CALLS]:
        args, kwargs = CALLS[name]
        expected = step(model, lambda v, a=args, k=kwargs: model(v, *a, **k), x)
        assert (
            differing(step(model, lambda v, a=args, k=kwargs: trimmed(v, *a, **k), x), expected)
            == []
        )
        assert trimmed.cut.mode == "fx"
    with pytest.warns(FastfreezeWarning, match="an argument of type set"):
        trimmed(x, extra={1.0})


def test_modes_and_attributes_of_parts_are_followed():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.factor = 2.0

        def forward(self, x):
            x = self.inner(x) * self.factor
            return x * 3 if self.training else x

    model = nn.Sequential(nn.Linear(3, 4), Part(), nn.Linear(4, 2))
    freeze(model, "0")
    trimmed = trim(model)
    x = torch.randn(5, 3)

    def change_head():
        model[2] = nn.Linear(4, 2)

    changes = [
        lambda: None,
        model[1].eval,
        model.train,
        lambda: setattr(model[1], "factor", 5.0),
        change_head,
        lambda: model[1].add_module("unused", nn.Linear(1, 1)),
        lambda: setattr(model[1].inner, "weight", nn.Parameter(torch.eye(4), requires_grad=False)),
        model.double,
        trimmed.float,
        lambda: vars(model[1]).update(forward=lambda v: v + 1),
        lambda: vars(model).update(forward=lambda v: model[2](model[0](v)) * 2),
    ]
    for change in changes:
        change()
        x = x.to(model[0].weight.dtype)
        for _ in range(2):
            assert differing(step(model, trimmed, x), step(model, model, x)) == []
        assert trimmed.cut.mode == "fx"


def test_inputs_changed_in_place_are_changed_once():
    model = freeze(Net(lambda m, x: chain(m, x.mul_(2))), "a")
    trimmed = trim(model)
    for _ in range(2):
        x = torch.ones(4, 3, 8, 8)
        trimmed(x)
        assert x.unique().tolist() == [2.0]


# --- at module level ---------------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def custom_function(m, x):
    return m.head(Reverse.apply(m.c(m.b(m.a(x)))).mean((2, 3)))


def branches_on_values(m, x):
    x = m.a(x)
    return m.head((m.b(x) if x.mean() < 100 else m.c(x)).mean((2, 3)))


def inner_no_grad(m, x):
    with torch.no_grad():
        x = m.b(m.a(x))
    return m.head(m.c(x).mean((2, 3)))


def inner_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        x = m.b(m.a(x))
    return m.head(m.c(x.float()).mean((2, 3)))


def layer_drop(m, x):
    x = m.b(m.a(x))
    return m.head((m.c(x) if random.random() < 2 else x).mean((2, 3)))


def keeps_features(m, x):
    m.features = m.a(x)
    return m.head(m.b(m.features).mean((2, 3)))


def appends(m, x):
    x = m.a(x)
    m.seen.append(x)
    return m.head(m.b(x).mean((2, 3)))


def counts(m, x):
    m.count += 1
    return m.head(m.b(m.a(x) * m.count).mean((2, 3)))


def type_test(m, x):
    """Tracing goes the wrong way here without an error."""
    x = m.a(x)
    return m.head((m.b(x) if isinstance(x, Tensor) else m.c(x)).mean((2, 3)))


def attribute_test(m, x):
    return m.head(m.b(m.a(x.decoded) if hasattr(x, "decoded") else m.a(x)).mean((2, 3)))


OUTSIDE = torch.full((1,), 2.0)


def outside_tensor(m, x):
    return m.head(m.b(m.a(x) * OUTSIDE).mean((2, 3)))


def writes_attribute(m, x):
    x = m.a(x)
    x.note = "kept"
    return m.head(m.b(x).mean((2, 3)))


def writes_plain_tensor(m, x):
    m.plain.mul_(1)
    return m.head((m.b(m.a(x)) * m.plain).mean((2, 3)))


def checkpoints(m, x):
    x = m.a(x)
    x = checkpoint.checkpoint(lambda v: m.c(m.b(v)), x, use_reentrant=False)
    return m.head(x.mean((2, 3)))


UNTRACEABLE = {
    "custom function": (custom_function, "the autograd function Reverse"),
    "control flow": (branches_on_values, "TraceError"),
    "no_grad": (inner_no_grad, "changes grad mode or autocast"),
    "autocast": (inner_autocast, "changes grad mode or autocast"),
    "layer drop": (layer_drop, "draws from Python's random"),
    "keeps features": (keeps_features, "assigns Net.features"),
    "appends": (appends, "changes Net.seen"),
    "counts": (counts, "assigns Net.count"),
    "type test": (type_test, "its graph is not the model: "),
    "outside tensor": (outside_tensor, "a tensor that is not the model's own"),
    "writes attribute": (writes_attribute, "assigns attribute 'note' of a tensor"),
    "writes plain tensor": (writes_plain_tensor, "applies mul_ to a tensor of the model"),
    "checkpoint": (checkpoints, "activation checkpointing"),
    "attribute test": (attribute_test, "its graph is not the model: AttributeError"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_untraceable_models_are_announced_and_trimmed(name):
    body, reason = UNTRACEABLE[name]
    model = freeze(Net(body), "a")
    model.plain, model.features, model.seen, model.count = torch.ones(1), None, [], 0
    x = inputs()
    by_hand = copy.deepcopy(model)
    expected = step(by_hand, lambda v: call_with_modes(by_hand, {"a"}, v), x, steps=2)
    trimmed = trim(model)
    with pytest.warns(FastfreezeWarning, match=reason) as warned:
        assert differing(step(model, trimmed, x, steps=2), expected) == []
    warned = [w for w in warned if w.category is FastfreezeWarning]
    assert len(warned) == 1
    assert Path(warned[0].filename).name == "module.py" or "test_graph" in warned[0].filename
    assert (trimmed.cut.mode, trimmed.cut.modules) == ("module", ("a",))
    assert reason in str(trimmed.cut)
    assert len(model.seen) == (2 if name == "appends" else 0)
    assert model.count == (2 if name == "counts" else 0)
    trimmed.verify(x)


def untraceable(body):
    """``body``, where tracing fails."""
    return lambda m, *x: body(m, *x) if x[0].mean() < 100 else None


@pytest.mark.parametrize(
    ("body", "frozen", "in_eval"),
    [
        (chain, ("a", "b"), {"a", "b"}),
        (chain, ("b",), set()),
        (chain, ("a", "c"), {"a"}),
        (chain, ("a.0", "b"), {"a.0"}),
        (frozen_branch_runs_last, ("a",), {"a"}),
        (reused, ("a", "b"), set()),
    ],
    ids=["prefix", "middle", "prefix and behind", "partial", "branch", "before and behind"],
)
def test_module_level(body, frozen, in_eval):
    """A frozen module behind one that trains keeps its gradient path and its mode."""
    model = freeze(Net(untraceable(body), drop=nn.Identity(), act=nn.ReLU()), *frozen)
    x = inputs()
    trimmed = trim(model)
    with pytest.warns(FastfreezeWarning, match="control flow"):
        trimmed(x)
    model.load_state_dict(Net().state_dict(), strict=True)
    if body is reused:  # by call, as no flag could
        expected = step(model, lambda v: call_by_hand(model, v), x)
    else:
        expected = step(model, lambda v: call_with_modes(model, in_eval, v), x)
    assert differing(step(model, trimmed, x), expected) == []
    trimmed.verify(x)
    assert all(m.training for m in model.modules())


def test_module_level_follows_the_flags():
    model = Net(untraceable(chain))
    trimmed = trim(model)
    trimmed(inputs())
    for number, stage in enumerate(STAGES):
        freeze(model, "nothing", *stage)
        x = inputs()
        expected = step(model, lambda v: call_by_hand(model, v), x)
        announced = pytest.warns(FastfreezeWarning) if number == 1 else nullcontext()
        with announced:
            assert differing(step(model, trimmed, x), expected) == []


def test_module_level_runs_the_model_itself_if_an_input_requires_grad():
    model = freeze(Net(untraceable(chain)), "a")
    x = inputs().requires_grad_()
    expected = step(model, model, x)
    with pytest.warns(FastfreezeWarning):
        assert differing(step(model, trim(model), x), expected) == []


def test_module_level_looks_into_what_is_not_called():
    """A ModuleList has no forward, and a parent's may be passed over."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([conv(3, 3), conv(4, 3)])
            self.body = Net(chain, a=conv())

        def forward(self, x):
            if x.mean() < 100:
                for block in self.blocks:
                    x = block(x)
                x = self.body.a(x)
            return self.body.head(self.body.b(x).mean((2, 3)))

    model = freeze(Parent(), "blocks", "body.a", "body.c")
    x = inputs()
    trimmed = trim(model)
    expected = step(model, lambda v: call_by_hand(model, v), x)
    with pytest.warns(FastfreezeWarning, match="control flow"):
        assert differing(step(model, trimmed, x), expected) == []
    assert trimmed.cut.modules == ("blocks.0", "blocks.1", "body.a", "body.c")


@pytest.mark.parametrize("reentrant", [True, False])
def test_module_level_inside_a_checkpoint(reentrant):
    """The second forward must find the modes of the first: they stay as they are, announced."""

    def body(m, x):
        x = m.stem(x)
        x = checkpoint.checkpoint(lambda v: m.b(m.a(v)), x, use_reentrant=reentrant)
        return m.head(x.mean((2, 3)))

    model = freeze(Net(body, stem=nn.Conv2d(3, 3, 1)), "a" if not reentrant else "b")
    x = inputs()
    if not reentrant:
        freeze(model, "a", "stem")
    expected = step(model, model, x)
    trimmed = trim(model)
    with pytest.warns(FastfreezeWarning) as warned:
        assert differing(step(model, trimmed, x), expected) == []
    assert any("inside an activation checkpoint keeps" in str(w.message) for w in warned)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_the_trimmed_model(reentrant):
    model = freeze(Net(chain), "a", "b")
    trimmed = trim(model)
    x = inputs().requires_grad_(reentrant)
    expected = step(model, lambda v: call_with_modes(model, {"a", "b"}, v), x)
    for _ in range(2):
        found = step(model, lambda v: checkpoint.checkpoint(trimmed, v, use_reentrant=reentrant), x)
        found = {name: value for name, value in found.items() if "buffer c" not in name}
        assert differing(found, {name: expected[name] for name in found}) == []


@pytest.mark.parametrize("traceable", [True, False])
def test_frozen_layers_inside_a_module_that_is_one_node(traceable):
    """``nn.TransformerEncoder`` is called as it is; so are its frozen layers, in eval mode."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(4, 8), encoder, nn.Linear(8, 2))
    freeze(model, "0", "1.layers.0", "1.layers.2")
    if not traceable:
        model.register_forward_hook(lambda *_: None)
    x = torch.randn(3, 5, 4)
    expected = step(model, lambda v: call_with_modes(model, {"0", "1.layers.0"}, v), x)
    trimmed = trim(model)
    with nullcontext() if traceable else pytest.warns(FastfreezeWarning, match="hooks"):
        assert differing(step(model, trimmed, x, steps=1), expected) == []
    assert differing(step(model, trimmed, x), expected) == []
    assert "1.layers.0" in trimmed.cut.modules
    assert trimmed.cut.mode == ("fx" if traceable else "module")
    trimmed.verify(x)


# --- hooks -------------------------------------------------------------------------------------


def test_hooks_on_nodes_are_called():
    model = freeze(Net(chain), "a", "b")
    trimmed = trim(model)
    for _ in range(2):
        trimmed(inputs())
    seen = []
    model.a[1].register_forward_hook(lambda m, args, out: seen.append(m) or out * 2)
    model.head.register_forward_pre_hook(lambda m, args: seen.append(m))
    x = inputs()
    expected = step(model, lambda v: call_with_modes(model, {"a", "b"}, v), x)
    seen.clear()
    assert differing(step(model, trimmed, x), expected) == []
    assert seen == [model.a[1], model.head]
    assert trimmed.cut.mode == "fx"


def test_hooks_on_opened_modules_go_before_the_graph():
    model = freeze(Net(chain), "a", "b")
    trimmed = trim(model)
    trimmed(inputs())
    seen = []
    handle = model.b.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(FastfreezeWarning, match="Sequential has hooks"):
        trimmed(inputs())
    assert seen == [1]
    assert trimmed.cut.mode == "module"
    handle.remove()
    trimmed(inputs())
    assert trimmed.cut.mode == "fx"
    assert int(model.a[1].num_batches_tracked) == 0


@pytest.mark.parametrize("late", [False, True], ids=["from the start", "later"])
def test_gradients_that_come_in_by_a_hook(late):
    """No flag shows that the hook's parameter acts on the prefix."""
    model = freeze(Net(chain), "a", "b")
    weight = nn.Parameter(torch.tensor(2.0))
    trimmed = trim(model)
    x = inputs()
    for _ in range(2 * late):
        trimmed(x)
    model.a[1].register_forward_hook(lambda m, args, out: out * weight)
    with pytest.warns(FastfreezeWarning, match="requires grad, though no parameter"):
        trimmed(x).square().sum().backward()
    found, weight.grad = weight.grad, None
    call_with_modes(model, {"a", "b"}, x).square().sum().backward()
    assert torch.equal(found, weight.grad)
    weight.grad = None
    trimmed(x).square().sum().backward()  # now as the graph would be with the flag it lacked
    found, weight.grad = weight.grad, None
    call_with_modes(model, {"a"}, x).square().sum().backward()
    assert torch.equal(found, weight.grad)


def writes_unseen(m, x):
    x = m.a(x)
    view = x.flatten(2)
    m.writes(x)
    return m.head(view.mean(2))


def test_writes_that_are_not_declared():
    model = freeze(Net(writes_unseen, writes=WritesUnseen()), "a")
    x = inputs()
    expected = step(model, lambda v: call_with_modes(model, {"a"}, v), x, steps=2)
    assert expected["gradient of writes.weight"]
    trimmed = trim(model)
    with pytest.warns(FastfreezeWarning, match="writes writes to its input"):
        assert differing(step(model, trimmed, x, steps=2), expected) == []


# --- verify, copies, arguments -----------------------------------------------------------------


def everything_about(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    state |= {"random numbers": torch.get_rng_state()}
    return state, [m.training for m in model.modules()], random.getstate()


@pytest.mark.parametrize("name", ["chain", "draws", "shared modules", "frozen middle"])
@pytest.mark.parametrize("training", [True, False])
def test_verify_leaves_everything_as_it_was(name, training):
    model, values = small(name)
    model(*values)[0].sum().backward()
    model.b.train(training)
    model.train(training)
    model.c.eval()
    before = everything_about(model)
    trim(model).verify(*values)
    after = everything_about(model)
    assert differing(before[0], after[0]) == []
    assert before[1:] == after[1:]


def test_verify_names_the_worst_parameter(monkeypatch):
    model = freeze(Net(residual), "a")
    trimmed = trim(model)
    x = inputs()
    trimmed.verify(x)
    from fastfreeze.graph import graphs

    def too_far(trace, model):
        cut = original(trace, model)
        late = tuple(n.name for n in trace.graph.nodes if n.name in ("b_0", "b_1", "add"))
        return dataclasses.replace(cut, frozen=cut.frozen + late, boundary=("add",))

    original = graphs.find_cut
    monkeypatch.setattr(graphs, "find_cut", too_far)
    with pytest.raises(RuntimeError, match=r"trimmed Net: gradient 'b\.[01]\.\w+' differs"):
        trim(model).verify(x)


def test_verify_at_module_level_finds_differences(monkeypatch):
    model = freeze(Net(untraceable(chain), drop=nn.Dropout()), "a")
    monkeypatch.setattr("fastfreeze.graph.modules.call_in_eval", lambda call, m, *a, **k: call(*a))
    with pytest.raises(RuntimeError, match=r"trimmed Net: .* differs, relative error"):
        trim(model).verify(inputs())


def test_names_are_the_models():
    model = freeze(Net(chain, scale=scale()), "a")
    model.register_buffer("kept", torch.ones(1))
    model.register_buffer("not_kept", torch.ones(1), persistent=False)
    trimmed = trim(model)
    assert list(trimmed.state_dict()) == list(model.state_dict())
    for kind in ("named_parameters", "named_buffers", "named_children"):
        assert dict(getattr(trimmed, kind)()) == dict(getattr(model, kind)())
    trimmed.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert model.kept == 2
    parent, plain = nn.Sequential(trimmed), nn.Sequential(copy.deepcopy(model))
    assert list(parent.state_dict()) == list(plain.state_dict())
    parent.load_state_dict({k: v + 1 for k, v in plain.state_dict().items()})
    assert model.kept == 3
    trimmed.head = nn.Linear(4, 3)
    assert model.head is trimmed.head
    assert trimmed(inputs()).shape == (4, 3)
    assert parent.double()[0].head.weight.dtype == model.kept.dtype == torch.float64
    assert not parent.eval()[0].model.training


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("warm", [False, True])
def test_copies(how, warm):
    model = freeze(nn.Sequential(conv(4, 3), nn.Dropout(), conv()), "0")
    trimmed = trim(model)
    if warm:
        trimmed(inputs())
        trimmed(inputs())
    twin = copy.deepcopy(trimmed) if how == "deepcopy" else pickle.loads(pickle.dumps(trimmed))
    x = inputs()
    assert differing(step(twin, twin, x), step(model, trimmed, x)) == []
    with torch.no_grad():
        twin.model[0][0].weight.zero_()
    assert twin(x).abs().sum() != trimmed(x).abs().sum()
    assert dict(twin.named_parameters())["0.0.weight"] is twin.model[0][0].weight


def test_functional_call_and_func_grad():
    model = freeze(Net(chain), "a")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    trimmed = trim(model)
    x = inputs()
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    expected, found = (
        torch.func.grad(lambda v, m=m: torch.func.functional_call(m, v, (x,)).square().sum())(
            values
        )
        for m in (model, trimmed)
    )
    assert differing(found, expected) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1,), TypeError, "model must be an untrimmed"),
        ((trim(nn.Linear(1, 1)),), TypeError, "got TrimmedModel"),
        ((nn.LazyLinear(1),), ValueError, "lazy"),
        ((nn.Linear(1, 1), [torch.ones(1)]), TypeError, "example_inputs must be .* got list"),
    ],
    ids=["no module", "trimmed", "lazy", "example"],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        trim(*arguments)


@pytest.mark.parametrize(
    "example", [torch.ones(2, 3), (torch.ones(2, 3),), {"x": torch.ones(2, 3)}]
)
def test_example_inputs(example, monkeypatch):
    traces = count_traces(monkeypatch)
    model = freeze(Optional(), "a")
    trimmed = trim(model, example)
    assert len(traces) == 1
    trimmed(**example) if isinstance(example, dict) else trimmed(torch.ones(5, 3))
    assert len(traces) == 1
    with pytest.warns(FastfreezeWarning, match="TraceError") as warned:
        trim(Net(untraceable(chain)), inputs())
    assert "test_graph" in warned[0].filename


def test_too_many_graphs():
    model = freeze(Optional(), "a")
    trimmed = trim(model)
    x = torch.randn(2, 3)
    for number in range(40):
        announced = pytest.warns(FastfreezeWarning, match="more than 32 ways of calling it")
        with announced if number == 32 else nullcontext():
            assert torch.equal(trimmed(x, scale=number), model(x, scale=number))


def test_a_model_that_is_one_module():
    for model, x in ((nn.Linear(3, 2), torch.ones(2, 3)), (conv(4, 3), inputs())):
        freeze(model, "0", "weight")
        trimmed = trim(model)
        expected = step(model, lambda v, m=model: call_by_hand(m, v), x)
        assert differing(step(model, trimmed, x), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [("lraspp_mobilenet_v3_large", "fx"), ("ssdlite320_mobilenet_v3_large", "module")],
)
def test_other_torchvision_models(name, mode):
    model = get_model(name, weights=None, weights_backbone=None, num_classes=3).train()
    freeze(model, "backbone")
    x = [torch.randn(2, 3, 64, 64)]
    if mode == "module":
        boxes = {"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.tensor([1])}
        x = [[torch.rand(3, 64, 64) for _ in range(2)], [boxes, boxes]]
    expected = step(model, lambda *v: call_with_modes(model, {"backbone"}, *v), *x)
    trimmed = trim(model)
    with pytest.warns(FastfreezeWarning) if mode == "module" else nullcontext():
        assert differing(step(model, trimmed, *x), expected) == []
    assert trimmed.cut.mode == mode
    assert differing(step(model, trimmed, *x), expected) == []
    if mode == "fx":
        check_folded(model, *x)


def test_the_training_flag_is_the_models():
    """Lightning puts flags back one by one, without a call of ``train``."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    network = trim(model)
    holder = nn.ModuleList([network])
    holder.eval()
    assert not network.training
    assert not model.training
    for module in holder.modules():
        module.training = True
    assert network.training
    assert model.training
    assert model[1].training
    model.eval()
    assert not network.training


@pytest.mark.parametrize("averaged", [False, True])
def test_update_bn_of_torch_estimates_what_it_has_reset(averaged):
    torch.manual_seed(0)
    parts = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)]
    model = nn.Sequential(*parts)
    model[:2].requires_grad_(False)
    batches = [torch.randn(8, 4) + 1 for _ in range(3)]
    expected = copy.deepcopy(model)
    update_bn(batches, expected)
    network = graph.trim(model)
    network(batches[0])
    network = AveragedModel(network) if averaged else network
    with pytest.warns(FastfreezeWarning, match=r"update_bn .*reestimate_norms") as caught:
        update_bn(batches, network)
    assert len(caught) == 1
    found = network.module.model if averaged else model
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=0)
    trimmed = network.module if averaged else network
    before = copy.deepcopy(found[1].state_dict())
    trimmed.train()(batches[0])  # as ever again: what is frozen stays
    assert all(torch.equal(found[1].state_dict()[name], before[name]) for name in before)


def test_what_the_model_has_is_asked_of_the_model():
    network = graph.trim(nn.Linear(2, 2))
    with pytest.raises(
        AttributeError,
        match=r"no attribute 'in_features'; the wrapped model, .* is the attribute \.model",
    ):
        _ = network.in_features
    assert not hasattr(network, "in_features")
    assert network.weight is network.model.weight
