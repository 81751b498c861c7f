"""Frozen modules in their fastest form, compared with themselves as they are, in double."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from fastfreeze import trim
from fastfreeze.optim import SGD
from fastfreeze.recipes.models import build_model
from fastfreeze.trimming import compare, operations
from fastfreeze.trimming import fold as folding
from fastfreeze.trimming import folds as folds_module
from tests.conftest import every_device, needs_gpu, rows_by_device
from tests.nets import Does

pytestmark = pytest.mark.usefixtures("small_counts")


class Net(nn.Module):
    """``body`` on parts under the names given, ``parts``; then a head that trains."""

    def __init__(self, body, channels=4, **parts):
        super().__init__()
        self.parts = Does(body, **parts)
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, x):
        return self.head(self.parts(x))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("parts"), name)


def conv(c=4, k=4, size=3, **options):
    options.setdefault("padding", "same")
    if options["padding"] == "same" and isinstance(size, int):
        options["padding"] = size // 2
    return nn.Conv2d(c, k, size, **options)


def frozen(model):
    """``model`` with statistics of a trained net, all but its head frozen."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    return model.train()


def images(*shape):
    return torch.randn(*(shape or (3, 4, 9, 8)))


def folds(trimmed):
    """How many convolutions and norms are folded; nothing is refused."""
    assert trimmed._folds.refusals() == []
    return len(trimmed._folds)


def in_double(model, x):
    """What the trimmed model computes, by hand, in double precision."""
    model = copy.deepcopy(model).double()
    model.eval()
    return model(x.double())


def relative_error(found, expected):
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def residual(m, x):
    return F.relu(m.norm(m.a(x)) + x)


def residual_in_place(m, x):
    y = x.cos()
    y += m.norm(m.a(x))
    return y.relu_()


def residual_in_place_twice(m, x):
    y = m.a(m.b(x))
    y += m.norm(m.b(x))
    return m.relu(y)


def added_twice(m, x):
    other = x.sin()  # has all that waits computed
    return F.relu(m.norm(m.a(x)) + x + other)


def added_to_what_was_read(m, x):
    y = m.norm(m.a(x))
    view = y[:, :, :1]
    y += m.b(m.a(x))
    return y + view


def two_convolutions(m, x):
    return F.relu(m.norm(m.a(x)) + m.other(m.b(x)))


def preactivation(m, x):
    x = F.relu(m.norm(x))
    return m.a(x) + m.b(x)


def norm_read_twice(m, x):
    y = m.a(x)
    return m.norm(y) + y


def dense(m, x):
    x = torch.cat([x, m.a(F.relu(m.norm(x)))], 1)
    x = torch.cat((x, m.c(F.relu(m.norm8(x)))), dim=1)
    return m.d(F.relu(m.norm12(x)))


def dense_kept(m, x):
    x = torch.cat([x, m.a(x)], 1)
    y = torch.cat([m.c(x), x.narrow(1, 0, 4), m.c(x)], 1)
    return m.d(m.norm12(y).relu())


def relu_in_place(m, x):
    return m.b(m.relu(m.norm(m.a(x))))


def layout_for_a_view(m, x):
    y = m.norm(m.a(x))
    y = y.view(y.shape[0], 4, -1)
    return y.sort(-1)[0].view(y.shape[0], 4, 9, 8) + m.b(x)


def parts(**more):
    return {
        "a": conv(),
        "b": conv(size=1),
        "c": conv(8),
        "d": conv(12, 4, 1),
        "norm": nn.BatchNorm2d(4),
        "other": nn.BatchNorm2d(4, eps=0.1),
        "norm8": nn.BatchNorm2d(8),
        "norm12": nn.BatchNorm2d(12),
        "relu": nn.ReLU(inplace=True),
    } | more


def chain(m, x):
    return F.relu(m.norm(m.a(x)))


# Of fp32; cuDNN may take algorithms that lose more.
ROUNDING = {"cpu": 2e-6, "cuda": 1e-5}
# What runs, and how many norms, sums and cats are left over as such.
BODIES = {
    "chain": (chain, {}),
    "residual": (residual, {}),
    "residual the other way": (
        lambda m, x: torch.relu(x.sin() + m.norm(m.b(F.relu(m.a(x))))),
        {},
    ),
    "residual in place": (residual_in_place, {}),
    "residual in place, twice": (residual_in_place_twice, {}),
    "two convolutions": (two_convolutions, {}),
    "add with alpha": (lambda m, x: torch.add(m.norm(m.a(x)), x, alpha=2), {}),
    "broadcast add": (lambda m, x: m.norm(m.a(x)) + m.b(x).mean((2, 3), keepdim=True), {}),
    "broadcast the other way": (
        lambda m, x: m.norm(m.b(F.adaptive_avg_pool2d(x, 1))) + x,
        {},
    ),
    "added twice": (added_twice, {}),
    "added to what was read": (added_to_what_was_read, {}),
    "norm behind a sum": (lambda m, x: m.other(m.a(x) + x), {}),
    "norm in a sum": (lambda m, x: F.relu(m.norm(x) + x), {}),
    "preactivation": (preactivation, {}),
    "preactivation of one": (
        lambda m, x: m.b(F.relu(m.other(m.a(F.relu(m.norm(x)))))),
        {},
    ),
    "norm read twice": (norm_read_twice, {}),
    "norm without relu": (lambda m, x: m.norm(x).sigmoid() * m.a(x), {}),
    "convolution twice": (lambda m, x: m.other(m.a(m.norm(m.a(x)))), {}),
    "dense": (dense, {}),
    "dense, kept": (dense_kept, {}),
    "cat along rows": (lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], -2)).relu(), {}),
    "relu in place": (relu_in_place, {}),
    "norm between": (lambda m, x: m.norm(m.norm(m.a(x))), {}),
    "layout for a view": (layout_for_a_view, {}),
    "no bias": (chain, {"a": conv(bias=False)}),
    "stride, dilation, groups": (chain, {"a": conv(stride=2, dilation=2, groups=2)}),
    "depthwise": (chain, {"a": conv(groups=4, size=5)}),
    "padding by name": (chain, {"a": nn.Conv2d(4, 4, 3, padding="same")}),
    "padding by reflection": (two_convolutions, {"a": conv(padding_mode="reflect")}),
    "uneven": (residual, {"a": conv(size=(3, 1), padding=(1, 0))}),
    "no statistics": (residual, {"norm": nn.BatchNorm2d(4, track_running_stats=False)}),
    "parametrized": (two_convolutions, {"a": parametrizations.weight_norm(conv())}),
    "a module named relu": (relu_in_place, {"relu": nn.LeakyReLU()}),
    "a module named cat": (lambda m, x: m.cat(m.norm(m.a(x))), {"cat": nn.Tanh()}),
}


SOME = ["residual", "preactivation of one", "dense", "depthwise", "layout for a view"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "device"), rows_by_device(BODIES, SOME))
def test_folded_is_as_close_to_the_truth_as_unfolded(name, device, dtype):
    body, own = BODIES[name]
    model = frozen(Net(body, **copy.deepcopy(parts(**own)))).to(device, dtype)
    x = images().to(device, dtype)
    trimmed, plain = trim(model), trim(model, fold=False)
    found, expected = trimmed(x), plain(x)
    assert folds(trimmed) > 0 or name == "no statistics"
    assert "nothing is folded" in plain.prefix
    bound = 1e-13 if dtype == torch.float64 else ROUNDING[device]
    if name != "no statistics":
        assert relative_error(found, in_double(model, x)) < bound
    assert relative_error(found, expected) < 2 * bound
    for _ in range(2):
        again = trimmed(x)
        assert relative_error(again, expected) < 2 * bound
    assert torch.equal(trimmed(x), again)
    assert found.requires_grad
    assert type(found) is Tensor
    trimmed.verify(x)


class Doubling(nn.Parameter):
    """A weight that convolutions take twice."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        return 2 * found if function is F.conv2d else found


def doubling():
    made = conv().requires_grad_(False)
    made.weight = Doubling(made.weight.detach(), requires_grad=False)
    return made


def made_in_inference_mode():
    with torch.inference_mode():
        return conv().requires_grad_(False)


UNFIT = {  # for folding: what runs, parts, and the images
    "of another dtype": (chain, {}, lambda: images().double()),
    "integers": (chain, {}, lambda: images().long()),
    "no images": (chain, {}, lambda: images(0, 4, 9, 8)),
    "without a batch": (lambda m, x: m.a(x).relu(), {}, lambda: images(4, 9, 8)),
    "a norm of other channels": (lambda m, x: m.norm8(m.a(x)), {}, images),
    "a cat of unlike parts": (lambda m, x: torch.cat([m.a(x), m.b(x)[:1]], 1), {}, images),
    "a weight of a class of its own": (chain, {"a": doubling}, images),
    "weights of inference mode": (chain, {"a": made_in_inference_mode}, images),
}


@pytest.mark.parametrize(("body", "own", "make"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_runs_or_fails_as_ever(body, own, make):
    model, x = frozen(Net(body, **parts())), make()
    for name, part in own.items():
        setattr(model.parts, name, part())
    found, expected = (outcome(trim(model, fold=fold), x) for fold in (True, False))
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert found == expected


def outcome(network, x):
    """Of the second call: the output, or the error."""
    for _ in range(2):
        try:
            found = network(x)
        except (RuntimeError, ValueError) as error:
            found = type(error), str(error).partition("\n")[0]
    return found


def thaws_on_the_way(m, x):
    y = m.a(x)
    m.norm.weight.requires_grad_(True)
    return m.norm(y).relu()


def test_what_thaws_within_a_call_gets_its_gradient():
    gradients = []
    for fold in (False, True):
        torch.manual_seed(0)
        model = frozen(Net(thaws_on_the_way, **parts()))
        trim(model, fold=fold)(images()).sum().backward()
        gradients.append(model.norm.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", [chain, residual, two_convolutions, dense, preactivation])
def test_norms_and_cats_are_gone(body):
    trimmed, x = trim(frozen(Net(body, **parts()))), images()
    for _ in range(2):
        trimmed(x)
    plain = folding.FusedNode._plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding.Norm, "plain", lambda *_: pytest.fail("a norm of its own"))
        patch.setattr(
            folding.FusedNode,
            "_plain",
            lambda n: plain(n) if n.convolving else pytest.fail("a cat"),
        )
        trimmed(x)


FAMILIES = ("resnet20", "wrn16-2", "densenet-bc-40", "vgg16")


class Tf32(TorchDispatchMode):
    """Convolutions with inputs and weights of 10 bits, as a GPU's are by default."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() == "aten::convolution":
            bits = [t.contiguous().view(torch.int32) for t in args[:2]]
            args = (*((b + 2**12 & -(2**13)).view(torch.float32) for b in bits), *args[2:])
        return function(*args, **(kwargs or {}))


@every_device
@pytest.mark.parametrize("name", FAMILIES)
def test_the_papers_models_in_tf32(name, device, monkeypatch):
    monkeypatch.setattr(operations, "winograd_pays", lambda *_: False)
    monkeypatch.setattr(folding, "_may_wait_here", lambda *_: True)
    if device == "cpu":
        monkeypatch.setattr(compare, "fp32_precision", lambda _: ("tf32", "none", "none"))
    else:
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
    model = frozen(build_model(name)).to(device)
    for parameter in list(model.parameters())[-3:]:
        parameter.requires_grad_(True)
    trimmed = trim(model)
    with Tf32() if device == "cpu" else nullcontext():
        trimmed(images(2, 3, 32, 32).to(device))
    assert folds(trimmed) > 10


@pytest.mark.parametrize(("name", "share"), list(zip(FAMILIES, (0.3, 0.7) * 2, strict=True)))
def test_the_papers_models(name, share):
    model = build_model(name)
    frozen(model)
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i >= share * len(parameters))
    model.double()
    x = images(2, 3, 16, 16).double()
    trimmed, plain = trim(model), trim(model, fold=False)(x)
    for _ in range(2):
        assert relative_error(trimmed(x), plain) < 1e-9
    assert folds(trimmed) > 3


def minds(what):
    """Convolutions, and then what depends on how their output lies in memory."""

    def body(m, x):
        return m.line(what(m, m.b(m.norm(m.a(x)).relu())))

    parts = {"a": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 4, 3)}
    return Does(body, line=nn.Linear(4 * 144, 5), like=torch.empty(4, 576), **parts)


MINDS = {
    "view": lambda m, z: z.view(4, -1),
    "view_as": lambda m, z: z.view_as(m.like),
    "as_strided": lambda m, z: torch.as_strided(z, (4, 576), (576, 1)),
    "as_strided of a tensor": lambda m, z: z.as_strided((4, 576), (576, 1)),
}


@pytest.mark.parametrize("num_frozen", [0, 1, 3])
@pytest.mark.parametrize("what", MINDS.values(), ids=MINDS)
def test_what_depends_on_the_layout_gives_what_it_gave(what, num_frozen):
    model = minds(what)
    for part in (model.a, model.norm, model.b)[:num_frozen]:
        part.requires_grad_(False)
    x = images(4, 3, 16, 16)
    found = trim(model)(x)
    torch.testing.assert_close(found, trim(model, fold=False)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_frozen", [0, 1, 3])
def test_the_output_can_be_viewed(num_frozen):
    """A backbone is trimmed, and what is behind it takes a view."""
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for part in backbone[:num_frozen]:
        part.requires_grad_(False)
    x = images(4, 3, 8, 8)
    z = trim(backbone)(x)
    assert z.stride() == backbone(x).stride()
    assert z.view(4, -1).shape == (4, 64)


def test_images_that_the_model_writes_to_stay_the_callers():
    x = images(2, 3, 6, 6)
    before = x.clone()
    trim(Does(lambda m, x: m.conv(x.mul_(2)), conv=nn.Conv2d(3, 4, 3)))(x)
    assert torch.equal(x, 2 * before)


def rewrite(model, other, change):
    """Gives a model the weights or statistics of another, or others of its own."""
    if change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif change == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head"))
    elif change == "in place":
        with torch.no_grad():
            model.a.weight.mul_(3)
    elif change == "statistics":
        model.norm.running_var.mul_(3)
    else:
        model.a.weight.data = other.a.weight.data.clone()


@every_device
@pytest.mark.parametrize("change", ["load_state_dict", "assign", "in place", "statistics", "data"])
def test_never_stale(change, device):
    model, other = (frozen(Net(residual, **parts())).to(device) for _ in range(2))
    trimmed, x = trim(model), images().to(device)
    trimmed(x)
    rewrite(model, other, change)
    assert relative_error(trimmed(x), in_double(model, x)) < ROUNDING[device]


def moved_by_a_fused_optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0, fused=True).step()
    weight.grad = None


def written_by_numpy(weight):
    weight.numpy()[:] = 3.0


@pytest.mark.parametrize(
    ("write", "calls"),
    [(moved_by_a_fused_optimizer, 1), (written_by_numpy, 5)],  # in turn: one thing in each call
)
def test_never_stale_after_writes_that_torch_does_not_count(write, calls):
    model = frozen(Net(residual, **parts()))
    trimmed, x = trim(model), images()
    for _ in range(2):
        trimmed(x)
    assert folds(trimmed) > 0
    write(model.a.weight)
    for _ in range(calls):
        found = trimmed(x)
    assert relative_error(found, in_double(model, x)) < ROUNDING["cpu"]


@needs_gpu
def test_never_stale_on_a_gpu_after_the_cpu():
    """Where its convolutions may be of a kind that a GPU does not have."""
    model = frozen(Net(chain, channels=32, a=conv(32, 32), norm=nn.BatchNorm2d(32)))
    trimmed, x = trim(model), images(3, 32, 16, 16)
    for device in ("cpu", "cuda", "cpu"):
        trimmed.to(device)
        for _ in range(2):
            found = trimmed(x.to(device))
            assert relative_error(found, in_double(model, x.to(device))) < 1e-5
        assert "folded" in trimmed.prefix


@pytest.mark.parametrize("how", ["data", "swap", "parameter"])
def test_never_stale_where_memory_is_used_again(how):
    model = frozen(Net(residual, **parts()))
    trimmed, x = trim(model), images()
    trimmed(x)
    for _ in range(20):
        for _ in range(2):
            weight = model.a.weight.detach() * 1.05
            if how == "data":
                model.a.weight.data = weight
            elif how == "swap":
                new = nn.Parameter(weight, requires_grad=False)
                torch.utils.swap_tensors(model.a.weight, new)
                del new
            else:
                model.a.weight = nn.Parameter(weight, requires_grad=False)
            del weight
        assert relative_error(trimmed(x), trim(model, fold=False)(x)) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [1, 3])
def test_what_is_not_finite_stays_so(size, bad):
    """Also by ReLU, unlike oneDNN's; and a first batch that is not finite decides nothing."""
    model = frozen(Net(chain, channels=16, a=conv(16, 16, size), norm=nn.BatchNorm2d(16)))
    x = images(3, 16, 9, 8)
    broken = x.clone()
    broken[0, :, 2:4] = bad
    for first in (x, broken):
        trimmed = trim(model)
        trimmed(first)
        rows = trimmed(broken).isfinite().flatten(1).all(1)
        assert rows.tolist() == [False, True, True]
        trimmed(x)
        assert folds(trimmed) == 1
        assert relative_error(trimmed(x), in_double(model, x)) < 2e-6


def test_layers_frozen_by_hand_are_folded_once(monkeypatch):
    model = frozen(Net(residual, **parts()))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    network, made = trim(model), []
    fold = folding.Convolving.folded
    monkeypatch.setattr(folding.Convolving, "folded", lambda *args: made.append(1) or fold(*args))
    for _ in range(4):
        optimizer.zero_grad()
        network(images()).square().mean().backward()
        optimizer.step()
    assert made == [1]


def test_thawed_is_exact_again():
    model = frozen(Net(residual, **parts()))
    trimmed = trim(model)
    x = images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        trimmed(x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    reference = copy.deepcopy(model)
    assert torch.equal(trimmed(x), reference(x))
    assert folds(trimmed) == 0


def test_a_first_call_gives_the_bits_of_any_other():
    model = frozen(Net(residual, **parts()))
    x, trimmed = images(), trim(model)
    outputs = [trimmed(x) for _ in range(3)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(trim(copy.deepcopy(model))(x), outputs[0])


def test_what_cannot_be_folded_runs_as_it_is(monkeypatch):
    model = frozen(Net(residual, **parts()))
    x = images()
    expected = trim(model, fold=False)(x)
    right = folding.Norm.affine
    monkeypatch.setattr(
        folding.Norm, "affine", lambda norm: (right(norm)[0], right(norm)[1] + 0.01)
    )
    trimmed = trim(model)
    for _ in range(2):
        assert relative_error(trimmed(x), expected) < 2e-6
    assert "times what rounding may" in trimmed.prefix


def test_autocast_and_functional_calls_run_it_as_it_is():
    model, x = frozen(Net(residual, **parts())), images()
    trimmed, plain = trim(model), trim(model, fold=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(trimmed(x), plain(x))
    state = {name: value + 0.1 for name, value in model.state_dict().items() if "num" not in name}
    weights = {"head.weight": model.head.weight.detach()}

    def loss(network):
        return lambda values: torch.func.functional_call(network, values, (x,)).square().sum()

    for call in (lambda f: f(state), lambda f: torch.func.grad(f)(weights)["head.weight"]):
        found, expected = (call(loss(network)) for network in (trimmed, plain))
        assert relative_error(found, expected) < 4e-6


def writes_to_a_weight(m, x):
    y = m.norm(m.a(x))
    with torch.no_grad():
        m.a.weight.mul_(1.01)
        m.norm.running_mean.add_(0.1)
    return y + m.b(x)


def test_a_weight_that_a_call_writes_to():
    model, x = frozen(Net(writes_to_a_weight, **parts())), images()
    network, plain = trim(model), trim(copy.deepcopy(model), fold=False)
    for _ in range(3):
        torch.testing.assert_close(network(x), plain(x), rtol=1e-5, atol=1e-5)


def test_weights_that_change_in_each_call(monkeypatch):
    monkeypatch.setattr(folds_module, "_MAX_CHANGES", 3)
    model = frozen(Net(residual, **parts()))
    trimmed, x = trim(model), images()
    for _ in range(5):
        with torch.no_grad():
            model.a.weight.add_(0.1)
        assert relative_error(trimmed(x), in_double(model, x)) < 2e-6
    assert "its weights change again and again" in trimmed.prefix
