"""Layers of models: their order and membership, and the traces left behind."""

import contextlib
import random
import re
from collections import UserDict

import numpy as np
import pytest
import torch
import torchvision.models as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.layers.split import split
from fastfreeze.schedule import Cosine, FreezeOut
from tests.layers.models import (
    Block,
    X,
    attention,
    auxiliary,
    fixed,
    functional,
    mlp,
    recurrent,
    reversed_net,
    sequence,
    siamese,
    stack,
    tied,
    weight_normed,
    wrapped,
)
from tests.nets import Branching, Does, Keywords

pytestmark = pytest.mark.usefixtures("one_thread")


def names(plan):
    return [layer.name for layer in plan.layers]


def contents(plan):
    """What must not depend on how the order was found."""
    return [(x.name, [n for n, _ in x.parameters], x.fixed, x.held_by) for x in plan.layers]


def membership(plan):
    return {name: layer.index for layer in plan.layers for name, _ in layer.parameters}


def check_partition(plan):
    """Every parameter in one layer, every trainable one in one group."""
    placed = [name for layer in plan.layers for name, _ in layer.parameters]
    assert sorted(placed) == sorted(name for name, _ in plan.model.named_parameters())
    grouped = [id(p) for group in plan.param_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in plan.model.parameters() if p.requires_grad)
    assert [layer.index for layer in plan.layers] == list(range(len(plan.layers)))
    assert all(layer.parameters for layer in plan.layers)


def on_meta(name, size=224):
    """A torchvision model and an input, without weights or memory."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        return getattr(tv, name)(**options), torch.empty(2, 3, size, size)


TORCHVISION = {  # layers, the first and the last of them, and where norms, tokens and others join
    "resnet18": (
        *(10, "conv1 layer1.0 layer1.1", "layer4.1 fc"),
        {"bn1.weight": 0, "layer1.0.bn2.bias": 1},
    ),
    "vgg16_bn": (
        *(16, "features.0 features.3", "classifier.3 classifier.6"),
        {"features.1.weight": 0},
    ),
    "densenet121": (
        *(63, "features.conv0 features.denseblock1.denselayer1"),
        *("features.denseblock4.denselayer16 classifier", {"features.norm5.weight": 62}),
    ),
    "vit_b_16": (
        *(14, "conv_proj encoder.layers.encoder_layer_0"),
        "encoder.layers.encoder_layer_11 heads.head",
        {"class_token": 0, "encoder.pos_embedding": 0, "encoder.ln.weight": 13},
    ),
    "convnext_tiny": (
        *(23, "features.0 features.1.0", "features.7.2 classifier.2"),
        {"features.2.0.weight": 4, "features.1.0.layer_scale": 1},
    ),
    "mobilenet_v2": (20, "features.0 features.1", "features.18 classifier.1", {}),
    "swin_t": (17, "features.0.0 features.1.0", "features.7.1 head", {"features.0.2.weight": 0}),
    "googlenet": (15, "conv1 conv2 conv3 inception3a", "inception5b fc", {"aux1.fc1.weight": 6}),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_split_as_by_hand(name):
    count, first, last, members = TORCHVISION[name]
    model, x = on_meta(name)
    plan = split(model)
    check_partition(plan)
    assert len(plan.layers) == count
    found = " ".join(names(plan))
    assert found.startswith(f"{first} ")
    assert found.endswith(f" {last}")
    found = membership(plan)
    assert {name: found[name] for name in members} == members
    assert contents(split(model, x)) == contents(plan)


def test_modules_that_raise_and_are_caught_have_returned():
    model = functional(probe=nn.Linear(7, 2))
    forward = model.body

    def probing(m, x):
        with contextlib.suppress(RuntimeError):
            m.probe(x)
        return forward(m, x)

    model.body = probing
    assert names(split(model, X)) == ["w1", "probe"]  # which feeds nothing, so it is a head


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(tv.list_models(module=tv)) - {"regnet_y_128gf"}))
def test_every_classifier_of_torchvision_is_partitioned(name):
    if name.startswith("regnet"):  # does not build on the meta device
        model = tv.get_model(name)
    else:
        model, _ = on_meta(name)
    plan = split(model)
    check_partition(plan)
    assert len(plan.layers) >= 8
    assert not any(layer.held_by for layer in plan.layers)


BODY = ["body.0", "body.1", "body.2"]
SMALL = {
    "mlp": (mlp, X, ["0", "3", "5"]),
    "linear": (lambda: nn.Linear(3, 2), X, ["Linear"]),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2), X, ["LSTM"]),
    "stack": (stack, X, ["stem", "body.0", "body.1", "body.2", "head"]),
    "wrapped": (lambda: wrapped(wrapped(mlp())), X, [f"inner.inner.{i}" for i in (0, 3, 5)]),
    "data parallel": (lambda: nn.DataParallel(mlp()), X, ["module.0", "module.3", "module.5"]),
    "functional": (functional, X, ["w1", "w2"]),
    "registered backwards": (reversed_net, X, ["stem", "middle", "head"]),
    "attention": (attention, torch.ones(2, 5, 3), ["embed", "attention", "head"]),
    "siamese": (siamese, X, ["a", "b", "head"]),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, nn.LayerNorm(4)
        ),
        torch.ones(2, 3, 4),
        ["layers.0", "layers.1"],
    ),
    "recurrent": (sequence, torch.ones(2, 5, 3), ["rnn", "head"]),
    "weight norm": (weight_normed, X, ["0", "2"]),
    "norm of two dimensions": (
        *(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((2, 4)), nn.Linear(4, 2)), X),
        ["0", "2"],
    ),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), X, ["1"]),
    "norms only": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), X, ["0"]),
    "no norms": (lambda: nn.Sequential(Block(3), Block(3)), X, ["0", "1"]),
    "auxiliary": (auxiliary, X, ["stem", "auxiliary", "head"]),
    "branching": (Branching, X, ["a", "b"]),
    "graph module": (lambda: fx.symbolic_trace(stack()), X, ["stem", *BODY, "head"]),
}
UNTRACEABLE = {"branching", "lstm", "data parallel", "encoder", "recurrent"}
UNTRACEABLE |= {"norm of two dimensions"}


@pytest.mark.parametrize("case", SMALL)
def test_small_models(case):
    make, x, expected = SMALL[case]
    model = make()
    plan = split(model, x)
    check_partition(plan)
    assert names(plan) == expected
    if case not in UNTRACEABLE:
        assert contents(split(model)) == contents(plan)


@given(st.lists(st.sampled_from(["linear", "norm", "relu", "block"]), min_size=1, max_size=12))
@settings(max_examples=40)
def test_any_sequence_keeps_its_order(kinds):
    make = {
        "linear": lambda: nn.Linear(4, 4),
        "norm": lambda: nn.BatchNorm1d(4),
        "relu": nn.ReLU,
        "block": lambda: Block(4),
    }
    model = nn.Sequential(*(make[kind]() for kind in kinds), nn.Linear(4, 4))
    plan = split(model, torch.ones(1, 4))
    check_partition(plan)
    assert [n for x in plan.layers for n, _ in x.parameters] == [
        n for n, _ in model.named_parameters()
    ]
    assert len(plan.layers) == 1 + sum(kind in ("linear", "block") for kind in kinds)


def test_members_of_a_layer():
    modules = [layer.modules for layer in split(mlp(), X).layers]
    assert modules == [("0", "1", "2"), ("3", "4"), ("5",)]
    plan = split(attention(), torch.ones(2, 5, 3))
    assert [layer.modules for layer in plan.layers] == [
        ("embed",),
        ("attention",),
        ("norm", "head"),
    ]
    first = {name for name, _ in plan.layers[0].parameters}
    assert first == {"token", "position", "embed.weight", "embed.bias"}
    for case in ("recurrent", "weight norm", "norm of two dimensions"):
        make, x, _ = SMALL[case]
        norm = "norm.weight" if case == "recurrent" else "1.weight"
        assert membership(split(make(), x))[norm] == 0


def test_param_groups():
    model = fixed(mlp(), "0", "3")
    model[4].bias.requires_grad_(False)
    plan = split(model, X)
    check_partition(plan)
    model.requires_grad_(False)  # as freezing does later
    groups = plan.param_groups()
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == [
        {"layer_index": 1, "layer_name": "3", "num_layers": 3},
        {"layer_index": 2, "layer_name": "5", "num_layers": 3},
    ]
    assert groups[0]["params"] == [model[4].weight]
    assert plan.layers[1].fixed == {"3.weight", "3.bias", "4.bias"}
    assert len(torch.optim.SGD(groups, lr=0.1).param_groups) == 2


def meddle(m, x):
    """Changes about all that a forward can change."""
    m.calls += 1
    m.total += 1
    m.plain.add_(1)
    m.log.append(m.coin.random() + m.draw.random() + random.random() + np.random.rand())
    m.kept["last"] = torch.rand((), generator=m.generator)
    m.stem.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        next(m.norm.parameters()).data.view(2, 4)[0].mul_(3)  # symbolic_trace does that, too
    if isinstance(x, torch.Tensor):
        with torch.no_grad():
            m.stem.weight.clamp_(max=0.1)
            m.head.weight.data.mul_(2)
        m.words(torch.arange(3))
        x.mul_(2)
    if m.fails:
        raise RuntimeError("out of order")
    return m.head(m.norm(m.stem(x)) + torch.rand(()))


def found_in(model, x):
    """All that must stay."""
    generators = random.getstate(), np.random.get_state(), model.coin.getstate()
    states = torch.get_rng_state().tolist(), model.generator.get_state().tolist()
    modes = torch.is_grad_enabled(), torch.backends.mkldnn.enabled, model.draw.bit_generator.state
    return repr((generators, states, modes, x, [vars(m) for m in model.modules()]))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("example", [(1, 3), None], ids=["run", "symbolic"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(fails, example, training):
    parts = {"stem": nn.Linear(3, 8), "norm": nn.BatchNorm1d(8), "head": nn.Linear(8, 2)}
    words = nn.Embedding(3, 8, max_norm=0.1).requires_grad_(False)
    parts |= {"total": 0, "log": [1], "kept": {}, "plain": torch.zeros(2), "words": words}
    parts |= {"coin": random.Random(1), "draw": np.random.default_rng(1), "fails": fails}
    generator, seen = torch.Generator().manual_seed(1), set()
    model = Does(meddle, **parts, generator=generator).train(training)
    model.register_buffer("calls", torch.zeros(()))
    model.norm.eval()
    model.head.weight.grad = torch.ones(2, 8)
    model.stem.register_forward_hook(lambda *_: seen.add(torch.is_grad_enabled()))
    x = None if example is None else torch.ones(example)
    before = found_in(model, x)
    told = pytest.raises(ValueError, match="out of order") if fails else contextlib.nullcontext()
    with told as error:
        split(model, x)
    assert found_in(model, x) == before
    assert not fails or isinstance(error.value.__cause__, RuntimeError)
    assert seen == ({False} if example and not fails else set())


def test_norms_take_a_batch_of_one():
    split(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.ones(1, 3))


def test_compiled_models_are_run_eagerly():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    model = torch.compile(mlp().eval(), backend=backend)
    with torch.no_grad():
        model(X)
    assert len(calls) == 1
    plan = split(model, X)
    assert names(plan) == ["_orig_mod.0", "_orig_mod.3", "_orig_mod.5"]
    assert [layer.forward_flops for layer in plan.layers] == [2 * 2 * 24, 2 * 2 * 64, 2 * 2 * 8]
    assert len(calls) == 1


TOKENS = torch.zeros(2, 3, dtype=torch.long)
TIED = (
    r"layer 2 \('{}'\) holds parameters that are also used before layer 0 \('positions'\): "
    "tokens.weight. Until they freeze, the backward runs down to layer 0"
)
TURNS = "layer 1 .'b'. .* before layer 0 .'a'.: b.weight, b.bias"
HELD = {  # the layers, those that hold each of them, and what is told
    "tied": (lambda: tied(True), ["positions", "middle", "head"], [2, 2], TIED.format("head")),
    "no bias": (lambda: tied(False), ["positions", "middle", "head"], [2, 2], TIED.format("head")),
    "functional": (
        *(lambda: tied(False, True), ["positions", "middle", "tokens"], [2, 2]),
        TIED.format("tokens"),
    ),
    "taking turns": (recurrent, ["a", "b"], [1], TURNS),
    "fixed": (lambda: fixed(recurrent(), "b"), ["a", "b"], [None], None),
}


@pytest.mark.parametrize(("make", "expected", "held_by", "message"), HELD.values(), ids=HELD)
@pytest.mark.parametrize("run", [True, False], ids=["run", "symbolic"])
def test_a_shared_parameter_goes_to_its_last_use_and_holds_what_is_before(
    make, expected, held_by, message, run
):
    model = make()
    x = TOKENS if hasattr(model, "tokens") else X
    told = pytest.warns(FastfreezeWarning, match=message) if message else contextlib.nullcontext()
    with told as caught:
        plan = split(model, x if run else None)
    assert message is None or caught[0].filename == __file__
    check_partition(plan)
    assert names(plan) == expected
    assert [x.held_by for x in plan.layers] == [() if i is None else (i,) for i in held_by] + [()]
    assert not hasattr(model, "tokens") or membership(plan)["tokens.weight"] == 2


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_a_dict_is_of_keyword_arguments_and_a_tuple_of_positional_ones(mapping):
    plan = split(Keywords(), mapping({"images": torch.ones(2, 6), "scale": 2.0}))
    assert names(plan) == ["first", "second"]
    assert plan.layers[0].forward_flops == 2 * 2 * 6 * 6
    with pytest.raises(ValueError, match=r"does not run on example_inputs.* takes 1 positional"):
        split(Keywords(), torch.ones(2, 6))
    assert names(split(nn.Bilinear(2, 3, 4), (torch.ones(1, 2), torch.ones(1, 3)))) == ["Bilinear"]


def test_groups_hold_what_the_model_holds_now():
    with torch.device("meta"):
        model = Keywords()
        plan = split(model, {"images": torch.empty(2, 6)})
    model.to_empty(device="cpu")
    found = [p for group in plan.param_groups() for p in group["params"]]
    assert all(p is q for p, q in zip(found, model.parameters(), strict=True))
    del model.first
    with pytest.raises(ValueError, match=r"must still hold the parameters first\.weight, first\.b"):
        plan.param_groups()


@pytest.mark.parametrize("example", [X, None], ids=["run", "symbolic"])
def test_unused_parameters_go_to_the_head(example):
    model = reversed_net()
    model.spare = nn.Linear(3, 2)
    model.alone = nn.Parameter(torch.zeros(3))
    with pytest.warns(FastfreezeWarning, match="put into the head 'head': alone, spare.weight, sp"):
        plan = split(model, example)
    check_partition(plan)
    assert names(plan) == ["stem", "middle", "head"]
    assert {membership(plan)[n] for n in ("alone", "spare.weight", "spare.bias")} == {2}
    fixed(model, "spare").alone.requires_grad_(False)
    check_partition(split(model, example))


LAYERS = {  # what is listed, and the modules of each layer
    "names": (["stem", "body", ["norm", "head"]], [["stem"], ["body"], ["norm", "head"]]),
    "patterns": (
        ["stem", r"body\.[01]", re.compile(r"(body\.2|norm)"), "head"],
        [["stem"], ["body.0", "body.1"], ["body.2", "norm"], ["head"]],
    ),
    "any order": ([["head", "norm"], "stem", "body"], [["norm", "head"], ["stem"], ["body"]]),
    "parameters": (["stem.weight", "stem.bias", r".*norm\..*", ["head", r"body\.\d\.[ab]"]], None),
    "all": ([""], [[""]]),
    "everything": ([".*"], [[""]]),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("example", [None, X], ids=["plain", "run"])
@pytest.mark.filterwarnings("ignore:layer . .* holds parameters")
def test_layers_by_name(case, example):
    layers, modules = LAYERS[case]
    plan = split(stack(), example, layers=layers)
    check_partition(plan)
    assert len(plan.layers) == len(layers)
    if modules is not None:
        assert [list(layer.modules) for layer in plan.layers] == modules
    if case == "parameters":
        assert [len(layer.parameters) for layer in plan.layers] == [1, 1, 8, 14]
        assert names(plan) == ["stem.weight", "stem.bias", r".*norm\..*", "head"]


def test_an_order_that_the_model_does_not_run_in_is_told():
    layers = ["head", "norm", "body", "stem"]
    with pytest.warns(FastfreezeWarning, match="used before layer 0") as caught:
        plan = split(stack(), X, layers=layers, schedule=FreezeOut(10))
    assert len(caught) == 3
    assert [layer.held_by for layer in plan.layers] == [(1, 2, 3), (2, 3), (3,), ()]
    assert plan.backward_saving == 0


def test_layers_put_a_tied_weight_into_the_later_one():
    layers = ["tokens", "positions", "middle", "head"]
    with pytest.warns(FastfreezeWarning, match="the last of their layers: tokens.weight"):
        plan = split(tied(bias=True), layers=layers)
    assert membership(plan)["tokens.weight"] == 3
    assert plan.layers[0].parameters == ()
    assert [group["layer_index"] for group in plan.param_groups()] == [1, 2, 3]
    with pytest.warns(FastfreezeWarning, match="used before layer 1") as caught:
        split(tied(bias=True), TOKENS, layers=layers)
    assert len(caught) == 1


def test_fixed_parameters_need_no_item():
    plan = split(fixed(stack(), "stem"), layers=["body", "norm", "head"])
    check_partition(plan)
    assert membership(plan)["stem.weight"] == 2


UNREAD = Does(lambda m, x: x, fc=nn.Linear(3, 3))
BAD_LAYERS = [
    ([], TypeError, "non-empty list"),
    ("stem", TypeError, "non-empty list"),
    ([3], TypeError, "expected a name, a pattern or a list of these, got 3"),
    ([[]], TypeError, "expected a name, a pattern"),
    ([[3]], TypeError, r"a list of these, got \[3\]"),
    (["stam"], ValueError, "'stam' matches no module or parameter; try stem"),
    ([re.compile("x+")], ValueError, "try stem, body, body.0 and "),
    ([re.compile("bod")], ValueError, "'bod' matches no module or parameter; try body"),
    (["body.0.normm"], ValueError, "try body.0.norm"),
    (["(stem"], ValueError, "no name and no regular expression"),
    (["stem", "body"], ValueError, "trainable parameters norm.weight, norm.bias, head.weight"),
    (["stem", "body", "norm", "head", "body.1"], ValueError, "'body' and 'body.1'"),
    (["stem", "stem"], ValueError, "parameter 'stem.weight' matches two items"),
    (["activation"], ValueError, "modules without parameters only"),
]
BAD = [
    *(({"layers": layers}, *expected) for layers, *expected in BAD_LAYERS),
    ({"model": mlp}, TypeError, "model must be an nn.Module, got function"),
    ({"model": nn.ReLU()}, ValueError, "no parameters: ReLU"),
    ({"model": nn.LazyLinear(2)}, ValueError, "uninitialised parameters .weight"),
    ({"example_inputs": torch.ones(2, 7)}, ValueError, "does not run on example_inputs"),
    ({"example_inputs": np.ones((2, 3))}, TypeError, "ts must hold .* torch.from_n"),
    ({"example_inputs": {"x": np.ones(3)}}, TypeError, "NumPy array: use torch.from_numpy"),
    ({"example_inputs": [1]}, TypeError, "example_inputs must be a tensor, a tuple of .* list"),
    ({"schedule": 3}, TypeError, "schedule must be a fastfreeze Schedule, got int"),
    ({"lr": "a"}, TypeError, "^lr must be a number >= 0, got 'a'"),
    ({"lr": -1.0}, ValueError, "^lr must be finite and >= 0, got -1.0"),
    ({"lr": 0.1, "schedule": Cosine(5, eta_min=0.2)}, ValueError, "eta_min must not exceed"),
    ({"model": Branching()}, ValueError, "needs example_inputs: .* Branching"),
    ({"model": UNREAD, "example_inputs": X}, ValueError, "Does runs without any of its param"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments, error, message):
    model = stack()
    model.activation = nn.ReLU()
    with pytest.raises(error, match=message):
        split(**{"model": model, **arguments})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_models_are_refused():
    with pytest.raises(TypeError, match=r"torch\.jit"):
        split(nn.Sequential(torch.jit.script(nn.Linear(3, 3))), X)
