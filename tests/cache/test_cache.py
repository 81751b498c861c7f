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

import fastfreeze
from fastfreeze import FeatureCache, trim
from fastfreeze.cache import cache as cache_module
from fastfreeze.cache import calls, kept
from fastfreeze.cache.rows import CannotKeepError
from tests.conftest import every_device
from tests.nets import Blocks, Does, conv_block, tiny_bert

on = partial(FeatureCache, enabled=True)


pytestmark = pytest.mark.usefixtures("one_thread", "small_counts")


def frozen(model, *names):
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def network(*names, seed=0, device="cpu", **options):
    """A trimmed net in training mode with frozen parts, its statistics not those of a new one."""
    torch.manual_seed(seed)
    model = Blocks()
    with torch.no_grad():
        model(torch.randn(50, 3, 8, 8) * 2 + 1)
    return trim(frozen(model, *names).to(device), **options)


def own_network(body, *names, **parts):
    """A trimmed net of the parts of Blocks, and others, with a forward of its own."""
    usual = {"a": conv_block(3, 8), "b": conv_block(8, 12, 2), "c": conv_block(12, 8)}
    return trim(frozen(Does(body, **usual | {"head": nn.Linear(8, 5)} | parts), *names))


def images(n=24, seed=0, device="cpu"):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)


def both(cache, x, samples, *args):
    """The cache's output, and that of the network alone, with the same random numbers."""
    with torch.random.fork_rng():
        found = cache(x, *args, samples=samples)
    return found, cache.network(x, *args)


def check(cache, x, samples, *args):
    found, expected = both(cache, x, samples, *args)
    assert found.equal(expected)


def epochs(cache, x, num_epochs=2, batch=6, seed=0):
    """Check the batches of shuffled epochs."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(x), generator=g).split(batch):
            check(cache, x[rows], rows)


@pytest.fixture
def runs(monkeypatch):
    """How chains are computed, as they come: from the inputs, or from kept values."""
    seen = []
    real = calls.Chain.compute

    def compute(self, *args, **options):
        seen.append("carried on" if options.get("given") else "inputs")
        return real(self, *args, **options)

    monkeypatch.setattr(calls.Chain, "compute", compute)
    return seen


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


@pytest.mark.parametrize(
    ("body", "parts"),
    [(sized, {}), (halves, {"b": conv_block(4, 4), "c": conv_block(8, 8)})],
    ids=["sized", "halves"],
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


def test_weights_that_change_again_and_again():
    cache, x = on(network("a")), images()
    for i in range(12):
        check(cache, x[:6], torch.arange(6))
        assert cache.active == (i < 9)
        write_statistics(cache.network.model)
    assert cache.reason == "what is frozen changes again and again"
    assert cache.stats().bytes == 0


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


def test_data_that_do_not_repeat():
    cache, x = on(network("a")), images()
    epochs(cache, x)
    x[7] += 1e-3
    rows = torch.tensor([[5, 0], [6, 0], [7, 0], [8, 0]])
    check(cache, x[5:9], rows)
    assert cache.reason == (
        "sample 7, view 0, came with other inputs than before: the data set is not deterministic "
        "(see fastfreeze.RepeatableViews)"
    )
    assert not cache.active
    assert cache.stats().bytes == 0
    epochs(cache, x)
    assert not cache.active


@every_device
def test_data_that_do_not_repeat_after_the_cut_has_moved(device):
    cache, x = on(network("a", device=device)), images(device=device)
    epochs(cache, x)
    frozen(cache.network.model, "b")
    check(cache, x[:6], torch.arange(6))
    x[7] += 1e-3
    check(cache, x[6:12], torch.arange(6, 12))
    assert "sample 7, view 0" in cache.reason


def centred(m, x):
    y = m.a(x)
    return m.head((y - y.mean(0)).mean((2, 3)))


def without_rows(m, x):
    return m.head((m.c(x) + m.a(x[:1]).sum(0)).mean((2, 3)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (centred, "what a sample gives depends on the others in its batch"),
        (without_rows, "no tensor with a row for each of 4 samples goes in"),
    ],
)
def test_models_that_mix_samples(body, reason, runs):
    cache, x = on(own_network(body, "a", c=conv_block(3, 8))), images(4)
    check(cache, x, torch.arange(4))
    assert cache.reason == reason
    runs.clear()
    cache(x, samples=torch.arange(4))
    assert cache.reason == reason
    assert runs == ["inputs"]  # nothing is tried again
    assert cache.stats() == fastfreeze.CacheStats()


def test_modules_that_do_not_repeat(monkeypatch):
    cache, x = on(network("a")), images()
    epochs(cache, x, 1)
    real, noise = kept.Kept.compute, itertools.count()
    monkeypatch.setattr(kept.Kept, "compute", lambda *a: real(*a) + 1e-3 * next(noise) + 1)
    cache(x[:6], samples=torch.arange(6))
    assert cache.reason == "the frozen modules do not always give the same bits"
    assert cache.stats().rows == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net, x: net.eval(), "the model is in eval mode"),
        (lambda net, x: net.model.requires_grad_(True), "nothing is frozen"),
        (lambda net, x: x.requires_grad_(), "an input requires grad"),
    ],
)
def test_calls_without_a_prefix(change, reason):
    cache, x = on(network("a")), images(6)
    check(cache, x, torch.arange(6))
    assert cache.active
    change(cache.network, x)
    check(cache, x, torch.arange(6))
    assert not cache.active
    assert cache.reason == reason


def test_single_samples_and_empty_batches():
    cache, x = on(network("a")), images()
    check(cache, x[:1], torch.arange(1))
    assert "a batch of one sample" in cache.reason
    check(cache, x[:6], torch.arange(6))
    assert cache.active
    check(cache, x[:1], torch.arange(1))
    check(cache, x[:0], torch.arange(0))


def test_switched_off_and_closed(tmp_path):
    x = images(6)
    cache = FeatureCache(network("a"), enabled=False)
    check(cache, x, torch.arange(6))
    assert cache.reason == "switched off by enabled=False"
    with on(network("a"), directory=tmp_path) as cache:
        assert cache.reason == "it has not been called yet"
        check(cache, x, torch.arange(6))
        with pytest.raises(RuntimeError, match=r"in use by another cache of this process"):
            on(network("a"), directory=tmp_path)
        check(cache, x, torch.arange(6))
        assert cache.active
    check(cache, x, torch.arange(6))
    assert cache.reason == "it is closed"
    cache.close()
    on(network("a"), directory=tmp_path).close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"network": Blocks()}, TypeError, "network must be a TrimmedModel, got Blocks"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be >= 1, got 0"),
        ({"max_bytes": 1e9}, TypeError, "max_bytes must be an int >= 1, got 1000000000.0"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating-point dtype or None, got"),
        ({"dtype": "half"}, TypeError, "dtype must be a floating-point dtype or None, got half"),
        ({"enabled": "yes"}, TypeError, "enabled must be True, False or None, got 'yes'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        FeatureCache(**{"network": network("a"), **arguments})


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([0, 1, 2, 3], TypeError, "samples must be an int64 tensor, got list"),
        (torch.arange(4.0), TypeError, "samples must be an int64 tensor, got torch.float32"),
        (torch.zeros(4, 3).long(), ValueError, r"samples must be \[B\] or \[B, 2\], got \[4, 3\]"),
        (torch.arange(5), ValueError, "samples must have a row for each of 4 inputs, got 5"),
        (torch.arange(-1, 3), ValueError, "got -1, 0"),
        (torch.tensor([[0, 0], [1, 2**20], [2, 0], [3, 0]]), ValueError, r"got 1, 1048576"),
        (torch.tensor([0, 1, 2, 2**43]), ValueError, "indices in 0..2"),
    ],
)
def test_bad_samples(samples, error, message):
    cache, x = on(network("a")), images(4)
    with pytest.raises(error, match=message):
        cache(x, samples=samples)
    check(cache, x, torch.tensor([2**43 - 1, 0, 1, 5]))
    check(cache, x, torch.tensor([[2**43 - 1, 0], [0, 2**20 - 1], [1, 0], [5, 7]]))
    assert cache.stats().rows == 6


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


@pytest.mark.parametrize(
    ("seconds", "fills", "idle", "problem"),
    [
        ((1.0, 0.5, 0.3), True, 0, ""),
        ((1.0, 1.2, 0.3), True, 0, "storing and looking up take 1200.00 ms a batch, the frozen"),
        ((1.0, 1.2, 0.3), False, 0, ""),
        ((1.0, 1.2, 1.1), False, 0, "looking up takes 1100.00 ms a batch, the frozen modules 1000"),
        ((1.0, 0.5, 0.3), True, 51, "max_bytes is reached, and no batch is there as a whole"),
    ],
)
def test_an_account_decides(seconds, fills, idle, problem):
    account, (computing, storing, finding) = kept.Account(idle=idle), seconds
    for _ in range(5):
        with pytest.raises(CannotKeepError) if idle > 50 else nullcontext():
            account.check(fills)
        account.stored(storing, computing)
        account.found(finding)
    with pytest.raises(CannotKeepError, match=problem) if problem else nullcontext():
        account.check(fills)


def test_what_does_not_pay_is_tried_again_after_a_while(monkeypatch):
    def refuse(*_, **__):
        if problem:
            raise CannotKeepError(problem)

    problem = "it does not pay"
    monkeypatch.setattr(kept.Account, "check", refuse)
    monkeypatch.setattr(cache_module, "_WAIT", 4)
    cache, x = FeatureCache(network("a")), images(48)

    def calls(n):
        for rows in torch.arange(6 * n).split(6):
            check(cache, x[rows], rows)
            yield cache.active

    assert list(calls(6)) == [True, True, False, False, False, True]
    assert list(calls(2)) == [True, False]
    assert cache.reason == problem
    assert cache.stats().bytes == 0
    problem = ""
    assert list(calls(8)) == [False] * 6 + [True] * 2
    assert list(calls(8)) == [True] * 8
    problem = "it does not pay"
    frozen(cache.network.model, "b")  # another cut is measured anew
    assert list(calls(1)) == [True]


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


def test_narrow_storage_of_values_that_do_not_fit():
    net = network("a")
    net.model.a.norm.weight.data.mul_(1e6)
    cache, x = on(net, dtype=torch.float16), images(6)
    check(cache, x, torch.arange(6))
    assert cache.reason == "values do not fit into torch.float16"


@contextmanager
def fp32(kind, precision):
    """Set as torch now wants it: for each kind of operation."""
    kind.fp32_precision = precision
    try:
        yield
    finally:
        kind.fp32_precision = "none"


def test_precisions_and_sizes_have_entries_of_their_own():
    cache, x = on(network("a")), images(6)
    kinds = itertools.product(
        (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul), ("bf16", "ieee")
    )
    contexts = [partial(fp32, *kind) for kind in kinds]
    contexts += [nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)]
    for _ in range(2):
        for context in contexts:
            with context():
                check(cache, x, torch.arange(6))
            assert cache.active
    check(cache, F.pad(x, (1, 1, 2, 2)), torch.arange(6))
    assert cache.stats().rows == 6 * 7


def fill(tmp_path, names=("a", "b"), seed=0, device="cpu"):
    with on(network(*names, seed=seed, device=device), directory=tmp_path) as cache:
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
def test_restart_with_other_weights(tmp_path, device):
    fill(tmp_path, device=device)
    stats = fill(tmp_path, seed=1, device=device)
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
