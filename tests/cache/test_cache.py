"""The feature cache: the same bits as without it, whatever happens on the way."""

from __future__ import annotations

import copy
import itertools
import random
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfreeze import trim
from fastfreeze.cache import kept
from tests.cache.cases import both, check, epochs, frozen, images, network, on, own_network
from tests.conftest import every_device
from tests.nets import Blocks, Does, conv_block, tiny_bert

pytestmark = pytest.mark.usefixtures("one_thread", "small_counts")


def test_what_is_there_is_not_computed(runs):
    cache, x = on(network("a", "b")), images()
    epochs(cache, x, 1)
    runs.clear()
    for rows in torch.randperm(24).split(6):
        check(cache, x[rows], rows)
    assert runs == ["inputs"] * 2  # the first two that are there are compared
    runs.clear()
    epochs(cache, x, 1)
    assert runs == []
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.advanced, stats.rows) == (48, 24, 0, 24)
    assert cache.active
    assert cache.reason == ""


def test_samples_may_repeat_in_a_batch():
    cache, x = on(network("a")), images()
    for rows in ([0, 1, 1, 2, 0], [3, 2, 2, 3, 4], [4, 4, 4, 4, 4], [5, 5, 5, 0, 1]):
        check(cache, x[rows], torch.tensor(rows))
    assert cache.stats().rows == 6
    frozen(cache.network.model, "b")
    for rows in ([5, 0, 1, 1, 5], [3, 3, 2, 2, 4]):
        check(cache, x[rows], torch.tensor(rows))


def test_views_are_kept_apart():
    cache, x = on(network("a")), images()
    for _ in range(2):
        for view in range(3):
            rows = torch.tensor([[i, view] for i in range(6)])
            check(cache, x[6 * view : 6 * view + 6], rows)
    assert cache.stats().rows == 18
    check(cache, x[:6], torch.arange(6))  # the first view
    assert cache.stats().rows == 18


def by_batch(m, x):
    """Values that depend on the number of rows."""
    return m.head(m.c(m.b(m.a(x) / (1 + x.shape[0] / 10))).mean((2, 3)))


def test_other_numbers_of_rows():
    x = images()
    for net, num_rows in ((own_network(by_batch, "a"), 18), (network("a"), 12)):
        cache = on(net)
        for _ in range(2):
            for n in (8, 6, 12):
                check(cache, x[:n], torch.arange(n))
                assert cache.active
        assert cache.stats().rows >= num_rows


def sized(m, x):
    """Sizes of frozen values are read by the part that trains."""
    x = m.a(x)
    n, _, h, _ = x.shape
    y = m.b(x)
    return m.head(m.c(y).mean((2, 3)).view(n, h * 0 + 8)) * (n + y.shape[2])


def halves(m, x):
    """Two halves of a value go different ways, as in ShuffleNet."""
    first, second = m.a(x).chunk(2, 1)
    return m.head(m.c(torch.cat([first, m.b(second)], 1)).mean((2, 3)))


def autocast_in_front(m, x):
    """What is computed under autocast is read outside of it."""
    with torch.autocast("cpu", torch.bfloat16):
        y = m.a(x)
    return m.head(m.c(m.b(y.float())).mean((2, 3)))


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (sized, {}),
        (halves, {"b": conv_block(4, 4), "c": conv_block(8, 8)}),
        (autocast_in_front, {}),
    ],
    ids=["sized", "halves", "autocast"],
)
def test_other_values_that_cross(body, parts):
    cache, x = on(own_network(body, "a", **copy.deepcopy(parts))), images()
    for names in ("a", "b"):
        frozen(cache.network.model, names)
        for _ in range(2):
            for n in (8, 5, 8, 4):
                rows = torch.randperm(24)[:n]
                check(cache, x[rows], rows)
                assert cache.active or "gives other bits" in cache.reason
    assert cache.stats().hits > 20
    assert cache.stats().advanced > 4


def test_kept_values_are_carried_on(runs):
    cache, x = on(network("a")), images()
    epochs(cache, x)
    frozen(cache.network.model, "b")
    check(cache, x[:6], torch.arange(6))
    runs.clear()
    for rows in torch.arange(6, 24).split(6):
        check(cache, x[rows], rows)
    assert runs == ["carried on", "inputs", "carried on", "carried on"]  # the first is compared
    stats = cache.stats()
    assert (stats.advanced, stats.rows) == (18, 24)
    assert len(cache._kept) == 1
    epochs(cache, x)
    assert cache.stats().misses == 24 + 6


def test_carrying_on_that_gives_other_bits_is_not_used(monkeypatch):
    real = kept.Kept.carried_on
    monkeypatch.setattr(kept.Kept, "carried_on", lambda *a: real(*a) + 1e-6)
    cache, x = on(network("a")), images()
    epochs(cache, x, 1)
    frozen(cache.network.model, "b")
    epochs(cache, x)
    stats = cache.stats()
    assert (stats.advanced, stats.rows, stats.misses) == (0, 24, 48)


def with_bias(m, x):
    """A frozen value without rows is read beside one with rows."""
    bias = m.bias(torch.arange(3))
    return m.head(m.c(m.b(m.a(x))).mean((2, 3)) + bias.sum(0))


def test_values_without_rows_are_not_kept():
    cache, x = on(own_network(with_bias, "a", "bias", bias=nn.Embedding(3, 8))), images()
    epochs(cache, x, 3)
    assert cache.active
    assert cache.stats().hits == 48


def test_text():
    """Masks count, and rows of another padded length are kept apart."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tiny_bert().train()
    frozen(model, "bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1")
    cache = on(trim(model))
    ids, mask = torch.randint(1, 50, (8, 9)), torch.ones(8, 9, dtype=torch.long)
    mask[2, 5:] = 0
    for _ in range(4):
        for width in (9, 7):
            inputs = {"input_ids": ids[:, :width], "attention_mask": mask[:, :width]}
            with torch.random.fork_rng():
                found = cache(**inputs, samples=torch.arange(8)).logits
            assert found.equal(cache.network(**inputs).logits)
    assert cache.active
    assert cache.stats().hits == 48
    mask[2, 4] = 0
    with torch.random.fork_rng():
        found = cache(input_ids=ids, attention_mask=mask, samples=torch.arange(8)).logits
    assert found.equal(cache.network(input_ids=ids, attention_mask=mask).logits)
    assert "sample 2, view 0, came with other inputs than before" in cache.reason


class Skip(Blocks):
    """An input is read, or read again, behind the first block."""

    def __init__(self):
        super().__init__()
        self.skip = nn.Conv2d(3, 8, 1)

    def forward(self, x, y=None):
        x = self.b(self.a(x) + self.skip(x if y is None else y))
        return {"logits": self.head(self.c(x).mean((2, 3)))}


@pytest.mark.parametrize("two", [False, True])
def test_inputs_that_are_read_behind_an_earlier_cut(two):
    cache = on(trim(frozen(Skip(), "a")))
    x, y = images(), images(seed=1)

    def check(rows):
        found, expected = both(cache, x[rows], rows, *([y[rows]] if two else []))
        assert found["logits"].equal(expected["logits"])
        assert cache.active

    for rows in torch.arange(24).split(6):
        check(rows)
    frozen(cache.network.model, "b", "skip")
    check(torch.tensor([0, 1, 2, 3, 4, 5]))
    check(torch.tensor([0, 1, 2, 6, 7, 8]))
    for rows in torch.randperm(24).split(6):
        check(rows)
    assert cache.stats().rows == 24
    if two:
        y[3] += 1
        cache(x[:6], y[:6], samples=torch.arange(6))
        assert "came with other inputs" in cache.reason


@every_device
def test_thaw_and_freeze(device):
    cache, x = on(network("a", "b", device=device)), images(device=device)
    epochs(cache, x)
    model = cache.network.model
    model.b.requires_grad_(True)
    epochs(cache, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check(cache, x[:6], torch.arange(6))
    cache(x[:6], samples=torch.arange(6)).sum().backward()
    optimizer.step()
    frozen(model, "b")
    epochs(cache, x)
    model.requires_grad_(True)
    check(cache, x[:6], torch.arange(6))
    assert cache.reason == "nothing is frozen"
    cache(x[:6], samples=torch.arange(6)).sum().backward()
    optimizer.step()
    frozen(model, "a", "b")
    epochs(cache, x)
    assert cache.active
    assert cache.stats().rows == 24


def load_others(model):
    model.load_state_dict(network("a", seed=5).state_dict())


def replace_weight(model):
    new = torch.randn_like(model.a.conv.weight)
    model.a.conv.weight = nn.Parameter(new, requires_grad=False)


def write_statistics(model):
    model.a.norm.running_mean.add_(1.0)


def write_data(model):
    model.a.conv.weight.data = torch.randn_like(model.a.conv.weight)


def replace_unit(model):
    model.a = frozen(network(seed=7).model, "a").to(model.head.weight.device).a


def replace_module(model):
    model.a.conv = copy.deepcopy(model.a.conv)
    nn.init.normal_(model.a.conv.weight)


def test_writes_that_torch_does_not_count():
    cache, x = on(network("a")), images()
    epochs(cache, x)
    weight = cache.network.model.a.conv.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.1, fused=True).step()
    weight.grad = None
    check(cache, x[:6], torch.arange(6))
    weight.numpy()[:] += 1
    for _ in range(8):
        found, expected = both(cache, x[:6], torch.arange(6))
    assert found.equal(expected)


CHANGES = [load_others, replace_weight, write_statistics, write_data, replace_module, replace_unit]


@every_device
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_what_changes_is_never_missed(change, device):
    cache, x = on(network("a", device=device)), images(device=device)
    epochs(cache, x)
    change(cache.network.model)
    epochs(cache, x, 3)
    assert cache.active
    assert cache.stats().misses > 40
    assert cache.stats().rows == 24


def in_patches(m, x):
    """Frozen modules between which samples are taken apart into four rows each."""
    x = m.a(x).unflatten(2, (2, -1)).unflatten(4, (2, -1)).movedim((2, 4), (1, 2))
    x = m.b(x.reshape(-1, *x.shape[3:]))
    return m.head(m.c(x).mean((2, 3)).unflatten(0, (-1, 4)).mean(1))


def test_several_rows_for_each_sample(runs):
    cache, x = on(own_network(in_patches, "a", "b")), images()
    epochs(cache, x)
    runs.clear()
    epochs(cache, x, 2)
    assert runs == []
    assert cache.active


def with_functions(m, x):
    """torch's functions between frozen modules, which it tells of what is done in place."""
    return m.head(F.silu(m.b(F.relu(m.a(x)))).mean((2, 3)))


def test_functions_between_frozen_modules_wait(runs):
    cache, x = on(own_network(with_functions, "a", "b", head=nn.Linear(12, 5))), images()
    epochs(cache, x)
    runs.clear()
    epochs(cache, x)
    assert runs == []
    assert cache.stats().rows == 24  # of what is read alone


def test_inside_other_modes():
    cache, x = on(network("a")), images(12)
    for _ in range(3):
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            for rows in torch.randperm(12).split(4):
                with context():
                    check(cache, x[rows], rows)
    frozen(cache.network.model, "b")
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            check(cache, x[:4], torch.arange(4))
    cache(x[:4], samples=torch.arange(4)).sum().backward()
    assert cache.network.model.c.conv.weight.grad is not None


def test_inside_transforms_of_torch_func():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh(), nn.Linear(4, 2))
    cache, x = on(trim(frozen(model, "1"))), images(4)
    cached = Does(lambda m, x: cache(x, samples=torch.arange(4)), network=cache.network)
    weights = {n: p.detach() for n, p in cached.named_parameters() if p.requires_grad}

    def loss(weights):
        return torch.func.functional_call(cached, weights, (x,)).square().sum()

    for _ in range(2):
        found = torch.func.grad(loss)(weights)
        assert cache.reason == "in a transform of torch.func"
        check(cache, x, torch.arange(4))
        cache(x, samples=torch.arange(4)).square().sum().backward()
        assert cache.active
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, cached.get_parameter(name).grad)
        cache.network.zero_grad()


@every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_storage(dtype, device, runs):
    cache, wide = (on(network("a", device=device), dtype=dtype) for dtype in (dtype, None))
    x = images(device=device)
    cache.network.model.dropout.p = wide.network.model.dropout.p = 0.0
    first = [cache(x[rows], samples=rows) for rows in torch.arange(24).split(6)]
    again = [cache(x[rows], samples=rows) for rows in torch.arange(24).split(6)]
    exact = [wide(x[rows], samples=rows) for rows in torch.arange(24).split(6)]
    # The model has read the first batch's values before it was known that they are kept.
    assert all(a.equal(b) for a, b in zip(first[1:], again[1:], strict=True))
    found, expected = torch.cat(again), torch.cat(exact)
    assert not found.equal(expected)
    error = (found - expected).double().norm() / expected.double().norm()
    assert error < 4 * torch.finfo(dtype).eps
    assert cache.stats().hits == 24
    stored = cache.stats().bytes / wide.stats().bytes
    assert 0.4 < stored < 0.6
    frozen(cache.network.model, "b")
    for rows in torch.cat([torch.arange(12), torch.arange(24)]).split(6):
        cache(x[rows], samples=rows)
    assert "carried on" not in runs
    assert cache.stats().rows == 24


@contextmanager
def fp32(kind, precision):
    """Set as torch now wants it: for each kind of operation."""
    kind.fp32_precision = precision
    try:
        yield
    finally:
        kind.fp32_precision = "none"


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_precisions_threads_and_sizes_have_entries_of_their_own():
    cache, x = on(network("a")), images(6)
    kinds = itertools.product(
        (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul), ("bf16", "ieee")
    )
    contexts = [partial(fp32, *kind) for kind in kinds]
    contexts += [nullcontext, partial(torch.autocast, "cpu", torch.bfloat16), partial(threads, 2)]
    for _ in range(2):
        for context in contexts:
            with context():
                check(cache, x, torch.arange(6))
            assert cache.active
    check(cache, F.pad(x, (1, 1, 2, 2)), torch.arange(6))
    assert cache.stats().rows == 6 * 8


def fill(tmp_path, device="cpu", **options):
    with on(network("a", "b", device=device, **options), directory=tmp_path) as cache:
        epochs(cache, images(device=device))
        return cache.stats()


def test_restart(tmp_path, runs):
    fill(tmp_path)
    with on(network("a", "b"), directory=tmp_path) as cache:
        check(cache, images()[:6], torch.arange(6))
        runs.clear()
        for rows in torch.randperm(24).split(6):
            check(cache, images()[rows], rows)
        assert runs == ["inputs"] * 2
        assert cache.stats().hits == 24
        epochs(cache, images())
        assert cache.stats().misses == 6


@every_device
@pytest.mark.parametrize("other", [{"seed": 1}, {"fold": False}], ids=["weights", "fold"])
def test_restart_with_another_network(other, tmp_path, device):
    fill(tmp_path, device=device)
    stats = fill(tmp_path, device=device, **other)
    assert (stats.misses, stats.rows) == (24, 24)
    assert fill(tmp_path, device=device).misses == 6  # the first are still there


def test_restart_with_other_data(tmp_path):
    fill(tmp_path)
    with on(network("a", "b"), directory=tmp_path) as cache:
        x = images(seed=1)
        epochs(cache, x)
        assert cache.active
        assert cache.stats().misses == 24
        x[3] += 1
        cache(x[:6], samples=torch.arange(6))
        assert "sample 3" in cache.reason
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock"]


def test_moving_on_leaves_no_files(tmp_path):
    with on(network("a"), directory=tmp_path) as cache:
        epochs(cache, images())
        frozen(cache.network.model, "b")
        epochs(cache, images())
        assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files(tmp_path, seed):
    fill(tmp_path)
    rng = random.Random(seed)
    for file in sorted(tmp_path.rglob("*")):
        if file.is_file() and file.name != "lock" and rng.random() < 0.7:
            data = bytearray(file.read_bytes())
            for _ in range(3):
                at = rng.randrange(len(data))
                data[at : at + 20] = rng.randbytes(min(20, len(data) - at))
            file.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.5 else data)
    with on(network("a", "b"), directory=tmp_path) as cache:
        epochs(cache, images())
        assert cache.active
        assert cache.stats().rows == 24
