"""Where the feature cache does without, says why, and what it does not take."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastfreeze
from fastfreeze import FeatureCache
from fastfreeze.cache import cache as cache_module
from fastfreeze.cache import kept
from fastfreeze.cache.rows import CannotKeepError
from fastfreeze.trimming import trim
from tests.cache.cases import check, epochs, frozen, images, network, on, own_network
from tests.conftest import every_device
from tests.nets import Blocks, Does, conv_block

pytestmark = pytest.mark.usefixtures("one_thread", "small_counts")


def test_weights_that_change_again_and_again():
    cache, x = on(network("a")), images()
    for i in range(12):
        check(cache, x[:6], torch.arange(6))
        assert cache.active == (i < 9)
        cache.network.model.a.norm.running_mean.add_(1.0)
    assert cache.reason == "what is frozen changes again and again"
    assert cache.stats().bytes == 0


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


def with_noise(m, x):
    return m.head(m.c(m.b(m.a(x) + torch.rand(()))).mean((2, 3)))


def test_random_numbers_beside_the_inputs_are_not_the_data_sets():
    cache, x = on(own_network(with_noise, "a", "b")), images()
    epochs(cache, x)
    assert "something random, or that trains, lies in front" in cache.reason
    assert not cache._off


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


def test_inputs_without_a_row_for_each_sample_go_to_the_network_alone():
    parts = {"stem": nn.Linear(3, 4).requires_grad_(False), "head": nn.Linear(4, 2)}
    net = trim(Does(lambda m, rows: [m.head(m.stem(row)) for row in rows], **parts))
    rows = [torch.randn(5, 3), torch.randn(7, 3)]  # as images of detection models come
    cache = on(net)
    found = cache(rows, samples=torch.arange(2))
    torch.testing.assert_close(found, net(rows), rtol=0, atol=0)
    assert cache.reason == "no input has a row for each sample"


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


def test_narrow_storage_of_values_that_do_not_fit():
    net = network("a")
    net.model.a.norm.weight.data.mul_(1e6)
    cache, x = on(net, dtype=torch.float16), images(6)
    check(cache, x, torch.arange(6))
    assert cache.reason == "values do not fit into torch.float16"
