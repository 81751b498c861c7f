"""The frozen forward on a GPU, and beside a default device: nothing of it counts on the CPU."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from fastfreeze import FeatureCache, trim
from fastfreeze.ensemble import SnapshotEnsemble
from tests.conftest import ON_A_GPU, needs_gpu
from tests.nets import Blocks

pytestmark = pytest.mark.usefixtures("one_thread")
on = partial(FeatureCache, enabled=True)


def frozen_net():
    """Its first block is frozen."""
    model = Blocks(dropout=0, width=8, stride=1)
    model.a.requires_grad_(False)
    return model


def data(count=4, rows=6, device="cpu"):
    """Batches: images, and which samples they are."""
    make = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 3, 8, 8, generator=make).to(device), torch.arange(rows) + i * rows)
        for i in range(count)
    ]


def train(model, call, batches, optimizer=None):
    """The loss of each step; ``call`` gives the network's output for a batch."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = call(*batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def by_sample(cache):
    return lambda x, samples: cache(x, samples=samples)


def trimmed(model, batches, path):
    network = trim(model)
    losses = train(model, lambda x, _: network(x), batches)
    model.b.requires_grad_(False)
    losses += train(model, lambda x, _: network(x), batches)
    network.verify(batches[0][0])
    return losses


def cached(model, batches, path):
    """Found, in part found, computed, carried on to a later cut, and computed anew."""
    with on(trim(model), directory=path) as cache:
        call = by_sample(cache)
        losses = train(model, call, [*batches[:2], *batches, *batches])
        mixed = [torch.cat(pair)[3:9] for pair in zip(*batches[:2], strict=True)]
        losses += train(model, call, [mixed, batches[0]])
        model.b.requires_grad_(False)
        losses += train(model, call, [*batches[:2], *batches, *batches])
        assert cache.stats().advanced == 18
        model.load_state_dict({name: t * 0.9 for name, t in model.state_dict().items()})
        losses += train(model, call, [*batches, *batches])
        assert cache.active
        assert cache.stats().rows == 24
        assert cache.stats().hits > 48
    return losses


def kept_narrow(model, batches, path):
    cache = on(trim(model), dtype=torch.bfloat16)
    return train(model, by_sample(cache), batches * 3)


def members(model, batches, path):
    other = copy.deepcopy(model)
    nn.init.constant_(other.head.weight, 0.1)
    states = [model.state_dict(), other.state_dict()]
    found = []
    for how in ("loop", "shared"):
        ensemble = SnapshotEnsemble(model, states, how=how)
        found += [ensemble(x).detach() for x, _ in batches]
    return found


PARTS = [trimmed, cached, kept_narrow, members]


@pytest.mark.parametrize("default", ["meta", ON_A_GPU])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_default_device_changes_nothing(part, default, tmp_path):
    model, batches = frozen_net(), data()
    expected = part(copy.deepcopy(model), batches, tmp_path / "a")
    with torch.device(default):
        found = part(model, batches, tmp_path / "b")
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@contextmanager
def without_waits():
    """The host must not wait for the device; but for events, of which it says so itself."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def waits(monkeypatch):
    """Waits for events, one by one."""
    seen, real = [], torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda e: seen.append(e) or real(e))
    return seen


def on_gpu():
    model, batches = frozen_net().cuda(), data(device="cuda")
    return model, batches, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


@needs_gpu
@pytest.mark.parametrize(
    "options", [{}, {"fold": False}, {"autocast": True}], ids=["folded", "unfolded", "autocast"]
)
def test_a_trimmed_step_on_a_gpu_waits_for_nothing(options, waits):
    options = dict(options)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=options.pop("autocast", False))
    model, batches, optimizer = on_gpu()
    network = trim(model, **options)

    def run(batches):
        with autocast:
            return train(model, lambda x, _: network(x), batches, optimizer)

    run(batches)
    waits.clear()
    with without_waits():
        losses = run(batches)
    assert not waits
    assert torch.stack(losses).isfinite().all()


@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("files", [False, True])
def test_kept_rows_on_a_gpu_wait_for_digests_alone(files, dtype, waits, tmp_path):
    model, batches, optimizer = on_gpu()
    with on(trim(model), directory=tmp_path if files else None, dtype=dtype) as cache:
        call = by_sample(cache)
        train(model, call, batches * 3, optimizer)  # the first that are found are compared
        waits.clear()
        with without_waits():
            train(model, call, batches * 2, optimizer)
        assert len(waits) == 2 * len(batches)
        assert cache.active
        assert cache.stats().hits >= 2 * 24


@needs_gpu
def test_pinned_memory_of_kept_rows_on_a_gpu_is_used_again():
    model, batches, optimizer = on_gpu()
    cache = on(trim(model))

    def run():
        for batch in batches:
            train(model, by_sample(cache), [batch], optimizer)
            torch.cuda.synchronize()

    for _ in range(3):
        run()
    allocated = torch.cuda.host_memory_stats()["num_host_alloc"]
    on_device = torch.cuda.memory_allocated()
    for _ in range(3):
        run()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == allocated
    assert torch.cuda.memory_allocated() <= on_device
    assert cache.stats().hits >= 4 * 24


@needs_gpu
@pytest.mark.parametrize("beside", [False, True])
def test_kept_rows_on_a_gpu_come_in_the_streams_order(beside):
    """Large ones, behind work that takes long, in a stream of the user's."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 4, 3)).cuda()
    model[0].requires_grad_(False)
    model.train()
    x, rows = torch.randn(64, 3, 64, 64, device="cuda"), torch.arange(64)
    network = trim(model)
    cache = on(network)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream) if beside else nullcontext():
        for _ in range(6):
            for chosen in rows.flip(0).split(16):
                torch.cuda._sleep(10**7)
                found = cache(x[chosen], samples=chosen)
                assert torch.equal(found, network(x[chosen]))
    assert cache.active
    assert cache.stats().hits >= 3 * 64


@needs_gpu
def test_a_sample_on_a_gpu_that_has_changed_is_never_taken_from_the_cache():
    model, batches, _ = on_gpu()
    network = trim(model)
    cache = on(network)
    for _ in range(3):
        for x, samples in batches:
            cache(x, samples=samples)
    x, samples = batches[0]
    x[2, 1, 3, 3] += 1e-3
    assert torch.equal(cache(x, samples=samples), network(x))
    assert "sample 2, view 0, came with other inputs than before" in cache.reason


@needs_gpu
def test_a_network_on_a_gpu_and_on_the_cpu_finds_rows_of_both():
    network, batches = trim(frozen_net()), data()
    cache = on(network)
    for device in ("cpu", "cuda", "cpu", "cuda"):
        network.to(device)
        for x, samples in batches * 2:
            assert torch.equal(cache(x.to(device), samples=samples), network(x.to(device)))
    assert cache.active
    assert cache.stats().rows == 48


class Scaled(Blocks):
    def forward(self, x, scale):
        return super().forward(x * scale.to(x.device))


@needs_gpu
def test_inputs_on_the_cpu_beside_images_on_a_gpu():
    model = Scaled(dropout=0).cuda()
    model.a.requires_grad_(False)
    network, number = trim(model), torch.tensor(0.5)
    cache, x = on(network), data(device="cuda")[0][0]
    for scale in (number, torch.rand(6, 1, 1, 1), torch.rand(6, 1, 1, 1).cuda()):
        for _ in range(4):
            found = cache(x, scale, samples=torch.arange(6))
            assert torch.equal(found, network(x, scale))


@needs_gpu
def test_a_frozen_prefix_on_a_gpu_keeps_no_memory_for_a_backward():
    model, x = frozen_net().cuda(), torch.randn(64, 3, 32, 32, device="cuda")
    network = trim(model)
    kept = []
    for frozen in ((), ("b",), ("b", "c")):
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        network(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output = network(x)
        kept.append(torch.cuda.memory_allocated() - before)
        del output
    a_value = 64 * 8 * 32 * 32 * 4
    assert kept[0] - kept[1] > a_value
    assert kept[1] - kept[2] > a_value
    assert kept[2] < a_value
