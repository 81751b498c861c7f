"""Trimmed models against the same models whose frozen modules are in eval mode, bit for bit."""

from __future__ import annotations

import copy
import pickle
import random
import threading
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import fastfreeze
from fastfreeze import FastfreezeWarning, trim
from fastfreeze.trimming.standins import frozen_modules
from fastfreeze.trimming.state import tensors_in
from tests.nets import Does

pytestmark = pytest.mark.usefixtures("one_thread", "small_counts")


@contextmanager
def by_hand(model):
    """With what is frozen in eval mode."""
    training = [m for m in frozen_modules(model) if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def observed(model, call):
    """Output, gradients and buffers of a step; the model is left as it was."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(3)
    output = [t for t in tensors_in(call()) if t.is_floating_point()]
    model.zero_grad()
    sum(t.double().sin().sum() for t in output if t.requires_grad).backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(output)}
    found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found |= {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    return found


def freeze_half(model):
    parameters = list(model.parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(False)
    return model.train()


def images(*shape):
    return torch.randn(*(shape or (4, 3, 8, 8)))


def torchvision_model(name, **options):
    def make():
        models = pytest.importorskip("torchvision.models")
        model = models.get_model(name, weights=None, num_classes=5, **options)
        return model, images(2, 3, 64, 64)

    return make


def timm_model(name, **options):
    def make():
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=5, **options), images(2, 3, 64, 64)

    return make


def text():
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(5, 90, (4, 12)), "attention_mask": mask}


def hugging_face(kind, config, inputs, **fields):
    def make():
        transformers = pytest.importorskip("transformers")
        model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
        return model, inputs()

    return make


BERT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
VIT = {k: v for k, v in BERT.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}


IMAGES, LARGER = (lambda: images(4, 3, 32, 32)), (lambda: images(2, 3, 64, 64))
OF_TORCHVISION = (
    *("squeezenet1_1", "resnet18", "densenet121", "mobilenet_v3_small", "convnext_tiny"),
    *("efficientnet_b0", "shufflenet_v2_x0_5", "regnet_y_400mf", "swin_t"),
)
OF_TIMM = (
    *("ghostnet_100", "repvgg_a0", "cs3darknet_s", "poolformer_s12", "mobilevit_xxs"),
    *("regnety_002", "fastvit_t8"),
)
MODELS = {
    **{f"torchvision {name}": torchvision_model(name) for name in OF_TORCHVISION},
    "torchvision googlenet": torchvision_model("googlenet", init_weights=False),
    "torchvision lraspp": torchvision_model("lraspp_mobilenet_v3_large", weights_backbone=None),
    **{f"timm {name}": timm_model(name) for name in OF_TIMM},
    "timm deit_tiny_patch16_224": timm_model("deit_tiny_patch16_224", img_size=64),
    "BERT": hugging_face(
        "BertForSequenceClassification", "BertConfig", text, output_hidden_states=True, **BERT
    ),
    "DINOv2": hugging_face("Dinov2ForImageClassification", "Dinov2Config", IMAGES, **VIT),
    "T5 encoder": hugging_face(
        *("T5EncoderModel", "T5Config", text),
        **{"vocab_size": 100, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4},
        **{"num_heads": 2},
    ),
    "GPT-2": hugging_face(
        *("GPT2LMHeadModel", "GPT2Config", text),
        **{"vocab_size": 100, "n_embd": 32, "n_layer": 4, "n_head": 2},
    ),
    "Wav2Vec2": hugging_face(
        *("Wav2Vec2ForCTC", "Wav2Vec2Config", lambda: torch.randn(2, 2000)),
        **BERT | {"num_hidden_layers": 3, "num_feat_extract_layers": 3, "mask_time_prob": 0.0},
        **{"conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)},
        **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    ),
    "SegFormer": hugging_face(
        *("SegformerForSemanticSegmentation", "SegformerConfig", LARGER),
        **{"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 32},
        **{"num_attention_heads": [1, 2, 2, 2]},
    ),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models(make):
    """Unfolded to the bit; folded, when values wait as ever but are computed as by the modules."""
    torch.manual_seed(0)
    model, x = make()
    freeze_half(model)
    args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
    with by_hand(model):
        expected = observed(model, lambda: model(*args, **kwargs))
    frozen = {id(t) for m in frozen_modules(model) for t in m.buffers()}
    before = {n: b.clone() for n, b in model.named_buffers() if id(b) in frozen}
    assert all(expected[name].equal(b) for name, b in before.items())
    plain = trim(model, fold=False)
    for _ in range(2):
        found = observed(model, lambda: plain(*args, **kwargs))
        assert found.keys() == expected.keys()
        assert [n for n, t in found.items() if not _same(t, expected[n])] == []
    folded = trim(model)
    folded(*args, **kwargs)
    folded.verify(*args, **kwargs)
    output = [t for t in tensors_in(folded(*args, **kwargs)) if t.is_floating_point()]
    assert all(type(t) is Tensor for t in output)
    assert folded._folds.refusals() == []
    assert not any("forward" in vars(m) for m in model.modules())


def _same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


class Net(nn.Module):
    """A frozen part, one that trains, and whatever a test puts between."""

    scale = 1.0

    def __init__(self, body):
        super().__init__()
        self.a, self.norm, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.b, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 2)
        self.body = body
        self.config = types.SimpleNamespace(alpha=1.0)
        self.table, self.losses = {"k": [1.0]}, []
        self.rng, self.random = np.random.default_rng(1), random.Random(1)

    def features(self, x):
        return self.relu(self.norm(self.a(x)))

    def forward(self, x):
        return self.body(self, x)


def net(body):
    torch.manual_seed(1)
    model = Net(body).train()
    for part in (model.a, model.norm):
        part.requires_grad_(False)
    return model


def reads_what_may_change(m, x):
    y = m.b(m.features(x)).mean((2, 3)) * m.config.alpha * m.table["k"][0] * m.scale
    return m.head(y)


def drops_by_a_coin_of_its_own(m, x):
    y = m.features(x)
    if m.rng.random() + m.random.random() < 1:
        y = y + m.b(y)
    return m.head(y.mean((2, 3)))


def keeps_a_loss(m, x):
    y = m.features(x)
    m.losses.append(y.square().mean())
    return m.head(m.b(y).mean((2, 3)))


def returns_early(m, x):
    y = m.features(x)
    return y.mean((2, 3)) * m.head.weight.sum() if x[0, 0, 0, 0] > 0 else m.head(y.mean((2, 3)))


def drops(m, x):
    return m.head(F.dropout(m.b(F.dropout2d(m.features(x)))).mean((2, 3)))


def takes_views(m, x):
    y = m.features(x)
    return m.head(m.b(y).flatten(2).transpose(1, 2).mean(1) + y[:, :, 0, 0])


def catches(m, x):
    y = m.a(x)
    try:
        m.b(y[:, :2])
    except RuntimeError:
        y = m.norm(y)
    return m.head(m.b(y).mean((2, 3)))


def change(m, step):
    m.config.alpha, m.table["k"][0] = 1.0 + step, 2.0 - step
    type(m).scale = 1.0 + step
    if step == 2:
        m.norm.requires_grad_(True)
        m.a.stride = (2, 2)


BODIES = [
    *(reads_what_may_change, drops_by_a_coin_of_its_own, keeps_a_loss, returns_early, drops),
    *(takes_views, catches),
]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_nothing_is_baked_in(body, fold):
    model, twin = net(body), net(body)
    network, inputs = trim(model, fold=fold), [images() for _ in range(4)]
    for step, x in enumerate(inputs):
        change(model, step)
        change(twin, step)
        torch.manual_seed(step)
        found = network(x)
        torch.manual_seed(step)
        with by_hand(twin):
            expected = twin(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert fold or torch.equal(found, expected)
        assert len(model.losses) == len(twin.losses)
        assert all(type(t) is Tensor for t in model.losses)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    Net.scale = 1.0


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


class Other(Own):
    def forward(self, x):
        return 3 * x + self.bias[0]


LATER = {
    "a hook": lambda patch, m: m.norm.register_forward_hook(lambda *args: args[2] * 2),
    "a forward": lambda patch, m: setattr(m.a, "forward", lambda x: 2 * F.conv2d(x, m.a.weight)),
    "a forward of the class": lambda patch, m: patch.setattr(Own, "forward", Other.forward),
    "a class": lambda patch, m: setattr(m.norm, "__class__", Other),
}


@pytest.mark.parametrize("change", LATER.values(), ids=LATER)
def test_what_is_given_later_is_called_as_ever(change, monkeypatch):
    model, seen = net(reads_what_may_change), []
    model.norm = Own(6).requires_grad_(False)
    network, x = trim(model), images()
    network(x)
    change(monkeypatch, model)
    model.a.register_forward_hook(lambda m, args, out: seen.append(out))
    with by_hand(model):
        torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-6)
    assert all(type(t) is Tensor for t in seen)
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("own", ["of its class", "of its own"])
def test_a_sequential_runs_its_own_forward(own):
    torch.manual_seed(1)
    parts = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)
    model = Doubled(*parts) if own == "of its class" else nn.Sequential(*parts)
    if own == "of its own":
        model.forward = lambda x: 2 * nn.Sequential.forward(model, x)
    model[:2].requires_grad_(False)
    network, x = trim(model), images()
    for _ in range(2):
        with by_hand(model):
            torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_call_that_begins_within_another_threads_leaves_nothing():
    inside, begun, done = (threading.Event() for _ in range(3))
    turns = {
        "first": lambda: (inside.set(), begun.wait(10)),
        "second": lambda: (begun.set(), done.wait(10)),
    }

    def body(m, x):
        y = m.features(x)
        turns.get(threading.current_thread().name, tuple)()
        return m.head(m.b(y).mean((2, 3)))

    network, x, found = trim(net(body)), images(), {}
    expected = network(x)

    def call(name):
        found[name] = network(x)
        done.set()  # by the first one: the second waits for it

    threads = [threading.Thread(target=call, args=(name,), name=name) for name in turns]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    for name in turns:
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(m) for m in network.model.modules())


def test_exceptions_threads_and_calls_within_calls():
    model = net(lambda m, x: m.head(m.b(m.features(x)).mean((2, 3))))
    network, x = trim(model), images()
    expected = network(x)
    with pytest.raises(RuntimeError, match="channels"):
        network(images(2, 5, 8, 8))
    found = [None] * 4

    def call(i):
        found[i] = network(x)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in found:
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    inner = trim(net(lambda m, y: m.features(m.b(y) if y.shape[1] == 6 else y)))
    outer = trim(net(lambda m, y: m.head(inner(y).mean((2, 3)) + m.features(y).mean((2, 3)))))
    torch.testing.assert_close(outer(x), outer(x))
    for module in (*model.modules(), *inner.model.modules(), *outer.model.modules()):
        assert module.training
        assert "forward" not in vars(module)


def test_other_modes():
    model = net(reads_what_may_change)
    network, plain, x = trim(model), trim(model, fold=False), images()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(x), plain(x))
    with torch.inference_mode():
        torch.testing.assert_close(network(x), plain(x))
    wanted = x.clone().requires_grad_()
    network(wanted).sum().backward()
    assert wanted.grad is not None
    weights = {"head.weight": model.head.weight.detach()}

    def loss(net):
        return lambda w: torch.func.functional_call(net, w, (x,)).square().sum()

    found, expected = (torch.func.grad(loss(n))(weights) for n in (network, plain))
    torch.testing.assert_close(found, expected)
    network.eval()
    assert torch.equal(network(x), model(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_in_a_checkpoint_modules_keep_their_mode(use_reentrant):
    def part(m, y):
        return m.b(m.norm(y))

    def body(m, x):
        y = checkpoint(part, m, m.a(x).requires_grad_(), use_reentrant=use_reentrant)
        return m.head(y.mean((2, 3)))

    model = net(body)
    with pytest.warns(FastfreezeWarning, match="BatchNorm2d inside an activation checkpoint"):
        trim(model)(images()).sum().backward()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    trim(model)(images()).sum().backward()
    assert torch.equal(model.norm.running_mean, before)


def swaps_weights(m, x):
    y = m.norm(m.a(x))
    m.a.weight.data = m.a.weight.data.flip(0)
    return m.head(m.b(y + m.a(x)).mean((2, 3)))


def has_two_epsilons(m, x):
    y, n = m.a(x), m.norm
    z = F.batch_norm(y + 0, n.running_mean, n.running_var, eps=1.0)
    return m.head(m.b(m.norm(y) + z).mean((2, 3)))


def enters_autocast(m, x):
    y = m.norm(m.a(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.tanh(y)
    assert y.dtype == torch.float32
    return m.head(m.b(y).mean((2, 3)))


def wants_a_gradient(m, x):
    y = m.norm(m.a(x)).requires_grad_()
    z = m.norm(m.a(y[:, :3]))
    return (
        m.head(m.b(z).mean((2, 3))) + torch.autograd.grad(z.sum(), y, retain_graph=True)[0].mean()
    )


def adds_what_trains(m, x):
    y = m.norm(m.a(x))
    y += m.b.bias[:, None, None]
    return m.head(m.b(F.relu(y)).mean((2, 3)))


def is_called_by_keyword(m, x):
    y = torch.relu(input=m.norm(m.a(x)))
    y = F.avg_pool2d(input=y.add(other=torch.mul(y, other=y)), kernel_size=2)
    return m.head(m.b(y).mean((2, 3)))


def writes_to_a_base(m, x):
    y = m.a(x)
    z = torch.relu(y)
    F.silu(y, inplace=True)
    return m.head(m.b(y.mean() + z).mean((2, 3)))


def copies_a_module(m, x):
    twin = copy.deepcopy(m.norm)
    assert "forward" not in vars(copy.deepcopy(m.a))
    pickle.dumps(m.norm)
    return m.head(m.b(F.relu(twin(m.a(x)))).mean((2, 3)))


def draws_and_writes_late(m, x):
    y = m.a(x)
    scale = torch.rand(1, generator=m.table.setdefault("own", torch.Generator().manual_seed(1)))
    x.mul_(2)
    m.losses.append(1)
    return m.head(m.b(m.norm(y) * scale).mean((2, 3)))


def keeps_an_attribute(m, x):
    y = m.norm(m.a(x))
    y.tag = 7
    z = m.head(m.b(y).mean((2, 3)))
    assert type(y) is Tensor
    return z * y.tag


def maps(m, x):
    y = torch.func.vmap(m.a)(torch.stack([x, 2 * x])).sum(0)
    return m.head(m.b(m.norm(y)).mean((2, 3)))


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 2 * g, g.sum((0, 2, 3))


def goes_through_a_function(m, x):
    return m.head(m.b(F.relu(Dirty.apply(m.norm(m.a(x)), m.b.bias))).mean((2, 3)))


def writes_to_what_others_read(m, x):
    y = m.a(x)
    z = m.norm(y)
    y.mul_(2)
    return m.head(m.b(y + z).mean((2, 3)))


def writes_to_its_input(m, x):
    x = x + 0
    y = m.norm(m.a(x))
    x.zero_()
    return m.head(m.b(m.a(x) + y).mean((2, 3)))


def writes_to_a_view(m, x):
    y = m.norm(m.a(x)).relu()
    y[:, 1].zero_()
    return m.head((m.b(y) + y).mean((2, 3)))


STRANGE = [
    *(swaps_weights, has_two_epsilons, enters_autocast, wants_a_gradient, adds_what_trains, maps),
    *(is_called_by_keyword, writes_to_a_base, copies_a_module, draws_and_writes_late),
    *(keeps_an_attribute, goes_through_a_function, writes_to_what_others_read),
    *(writes_to_its_input, writes_to_a_view),
]


UNSEEN = {"weight": lambda m, x: m.norm.weight, "input": lambda m, x: x}


@pytest.mark.parametrize("what", UNSEEN.values(), ids=UNSEEN)
def test_writes_that_torch_does_not_show_are_refused(what):
    def body(m, x):
        y = m.norm(x)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            what(m, x).mul_(2)
        return y

    frozen = Does(body, norm=nn.BatchNorm2d(3)).requires_grad_(False)
    network = trim(nn.Sequential(frozen, nn.Conv2d(3, 2, 1)))
    with pytest.raises(RuntimeError, match="was written to by code that torch does not show"):
        network(images())


def changes_eps_and_stride(m, step):
    if step == 2:
        m.norm.eps, m.a.stride, m.a.padding, m.a.dilation = 1.0, (2, 2), (1, 1), (2, 2)


def changes_weights_unseen(m, step):
    if step == 2:
        m.a.weight.numpy()[:] = m.a.weight.flip(0).numpy()


@pytest.mark.parametrize("change", [changes_eps_and_stride, changes_weights_unseen])
@pytest.mark.parametrize("body", STRANGE, ids=lambda body: body.__name__)
def test_strange_models(body, change):
    """Folded or not, a model computes what it computes; contents are compared in turn."""
    model, twin = net(body), net(body)
    network = trim(model)
    for step in range(7):
        x = images()
        change(model, step)
        change(twin, step)
        with by_hand(twin):
            expected = twin(x.clone())
        found = network(x.clone())
        if change is changes_eps_and_stride or step < 2 or step > 5:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for output in (found, expected):
            output.sum().backward()
        assert len(model.losses) == len(twin.losses)
    torch.testing.assert_close(model.b.bias.grad, twin.b.bias.grad, rtol=1e-2, atol=1e-2)


def test_statistics_estimated_anew():
    model = net(reads_what_may_change)
    network = trim(model)
    with pytest.warns(FastfreezeWarning, match="runs untrimmed while torch's update_bn"):
        update_bn([images(), images()], network)
    assert model.norm.num_batches_tracked == 2


def test_copies():
    model = net(reads_what_may_change)
    network, x = trim(model), images()
    expected = network(x)
    for twin in (copy.deepcopy(network), _pickled(trim(nn.Sequential(nn.Conv2d(3, 2, 1))))):
        assert isinstance(twin, fastfreeze.TrimmedModel)
        twin(x)
    torch.testing.assert_close(copy.deepcopy(network)(x), expected)


def _pickled(network):
    return pickle.loads(pickle.dumps(network))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"an untrimmed torch.nn.Module, got TrimmedModel"):
        trim(trim(nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="lazy parameters: run it once"):
        trim(nn.LazyLinear(1))
