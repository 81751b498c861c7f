"""The feature cache follows all that frozen modules hold, views, and what it cannot see."""

from __future__ import annotations

import copy
import random
import shutil
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfreeze import FeatureCache, trim
from tests.nets import Does

pytestmark = pytest.mark.usefixtures("one_thread", "small_counts")
SCALE = 1.0


class Frozen(nn.Module):
    """A convolution, and what is done with something that the module holds."""

    shared = SimpleNamespace(scale=1.0)

    def __init__(self, held=None, use=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.held, self.use = held, use

    def scaled(self, y):
        return y * SCALE * self.shared.scale

    def forward(self, x):
        y = self.scaled(self.conv(x))
        return y if self.use is None else self.use(self.held, y)


class Net(nn.Module):
    def __init__(self, frozen, read=None):
        super().__init__()
        self.frozen, self.head, self.read = frozen.requires_grad_(False), nn.Linear(4, 3), read

    def forward(self, x):
        y = self.frozen(x)
        return self.head(y.mean((2, 3)) if self.read is None else self.read(y))


def cached(model, **options):
    torch.manual_seed(0)
    return FeatureCache(trim(model.train(), fold=False), enabled=True, **options)


def agree(cache, calls=6):
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(calls):
        assert same(cache(x, samples=torch.arange(6)), cache.network(x))
    assert same(cache.network(x), cache.network.model(x))


def same(found, expected):
    if isinstance(found, tuple):
        return all(map(torch.equal, found, expected))
    return found.equal(expected)


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


def times(k):
    return lambda y: y * k


def product(held, y):
    return y * float(held)


KINDS = {
    "array": (np.ones(1), lambda m: m.held.fill(3), lambda v, y: y * float(v[0])),
    "scalar of NumPy": (np.float32(1), np.float32(3), product),
    "sign of zero": (0.0, -0.0, lambda v, y: y + torch.ones(()).copysign(torch.tensor(v))),
    "partial": (partial(F.elu, alpha=0.1), partial(F.elu, alpha=0.9), lambda v, y: v(y)),
    "closure": (times(1.0), times(3.0), lambda v, y: v(y)),
    "slice": (slice(0, 2), slice(2, 4), lambda v, y: y[:, v].repeat(1, 2, 1, 1)),
    "range": (range(2), range(2, 4), lambda v, y: y[:, list(v)].repeat(1, 2, 1, 1)),
    "slots": (Slotted(1.0), lambda m: setattr(m.held, "scale", 3.0), lambda v, y: y * v.scale),
    "deque": (deque([1.0]), lambda m: m.held.append(3.0), lambda v, y: y * v[-1]),
    "nested": ({"a": [1.0]}, lambda m: m.held["a"].append(3.0), lambda v, y: y * v["a"][-1]),
    "shape": (1, 2, lambda v, y: F.avg_pool2d(y, v)),
    "tensor": (torch.ones(1), lambda m: m.held.add_(1), lambda v, y: y * v),
    "tensor's shape": (
        torch.arange(4.0).view(2, 2), torch.arange(4.0).view(4, 1), lambda v, y: y * v.sum(0).max()
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_modules_hold_is_followed(kind):
    held, new, use = KINDS[kind]
    cache = cached(Net(Frozen(held, use)))
    agree(cache)
    assert cache.active
    model = cache.network.model.frozen
    new(model) if callable(new) and not isinstance(new, partial) and kind != "closure" else setattr(
        model, "held", new
    )
    agree(cache)
    assert cache.active


class Tripled(Frozen):
    def forward(self, x):
        return self.conv(x) * 3


def add_global_hook(patch, model):
    hooks = nn.modules.module
    return hooks.register_module_forward_hook(lambda m, a, o: o * 2 if m is model.conv else None)


CODE = {
    "method": lambda patch, m: patch.setattr(Frozen, "scaled", lambda self, y: y * 3),
    "forward": lambda patch, m: patch.setattr(Frozen, "forward", Tripled.forward),
    "class": lambda patch, m: patch.setattr(m, "__class__", Tripled),
    "global": lambda patch, m: patch.setattr(sys.modules[__name__], "SCALE", 3.0),
    "object of the class": lambda patch, m: patch.setattr(Frozen.shared, "scale", 3.0),
    "global hook": add_global_hook,
}


@pytest.mark.parametrize("change", CODE.values(), ids=CODE)
def test_code_is_followed(change, monkeypatch):
    cache = cached(Net(Frozen()))
    agree(cache)
    assert cache.active
    handle = change(monkeypatch, cache.network.model.frozen)
    try:
        agree(cache)
    finally:
        if handle is not None:
            handle.remove()


def test_constants_in_code_are_followed(monkeypatch):
    cache = cached(Net(Frozen()))
    for scaled in (lambda self, y: y * 2.0, lambda self, y: y * 3.0):
        monkeypatch.setattr(Frozen, "scaled", scaled)
        agree(cache)
        assert cache.active


DRAWS = {
    "torch": lambda held, y: y * torch.rand(()),
    "random": lambda held, y: y * random.random(),
    "NumPy": lambda held, y: y * float(np.random.rand()),
}


@pytest.mark.parametrize("use", DRAWS.values(), ids=DRAWS)
def test_random_numbers_are_drawn_as_without_a_cache(use):
    cache = cached(Net(Frozen(use=use)))
    x = torch.randn(6, 3, 8, 8)

    def seeded(call):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        found = call()
        return found, (torch.get_rng_state().tolist(), random.random(), np.random.rand())

    for _ in range(4):
        found, after = seeded(lambda: cache(x, samples=torch.arange(6)))
        expected, wanted = seeded(lambda: cache.network(x))
        assert found.equal(expected)
        assert after == wanted


TOUCHES = {
    "writes to its input": lambda m, x: x.mul_(2).sigmoid(),
    "gives a view of its input": lambda m, x: x[:, :],
}


@pytest.mark.parametrize("body", TOUCHES.values(), ids=TOUCHES)
def test_modules_that_touch_their_inputs_are_not_put_off(body):
    def forward(m, x):
        z = x.clone()
        y = m.frozen(z)
        y.add_(1)
        return m.head(y.mean((2, 3)) + z.mean((2, 3)))

    frozen = Does(body, own=nn.Conv2d(3, 3, 1)).requires_grad_(False)
    cache = cached(Does(forward, frozen=frozen, head=nn.Linear(3, 3)))
    agree(cache)
    assert cache._num_late == 0


def outside():
    net = Net(Frozen())
    net.frozen.held, net.frozen.use, net.scale = [net], lambda v, y: y * v[0].scale, 1.0
    return net


def draws(coin, y):
    return y * (2.0 if coin.random() < 0.5 else 1.0)


REFUSED = {
    "a module outside of it": outside,
    "held is a Random": lambda: Net(Frozen(random.Random(3), draws)),
    "held is a Generator": lambda: Net(Frozen(np.random.default_rng(3), draws)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_modules_whose_content_is_not_seen_run_in_each_call(reason):
    cache = cached(REFUSED[reason]())
    x = torch.randn(6, 3, 5, 5)
    outputs = [cache(x, samples=torch.arange(6)) for _ in range(8)]
    assert reason in cache._known.reasons["frozen"]
    if reason == "a module outside of it":
        cache.network.model.scale = 3.0
        assert not cache(x, samples=torch.arange(6)).equal(outputs[-1])
    else:
        assert len({tuple(o.flatten().tolist()) for o in outputs}) == 2
    assert cache.active  # the convolution is still put off


def number(held, y):
    return y, y.max().item()


def chosen(held, y):
    return y, y.mean((1, 2, 3)).gt(y.mean()).nonzero()


def by_value(held, y):
    return (y * 2 if y.sum() > 0 else y), None


def masked(held, y):
    return y, y[y.mean((1, 2, 3)) > 0]


def read_both(given):
    y, other = given
    factor = other if isinstance(other, float) else 1 if other is None else len(other)
    return y.mean((2, 3)) * factor


DEPENDS = {
    **{use.__name__: (use, read_both) for use in (number, chosen, by_value, masked)},
    "masked outside": (None, lambda y: read_both(masked(None, y))),
}


@pytest.mark.parametrize(("use", "read"), DEPENDS.values(), ids=DEPENDS)
def test_what_depends_on_values_is_not_put_off(use, read):
    cache = cached(Net(Frozen(None, use), read))
    for seed in range(8):
        x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        assert cache(x, samples=torch.arange(6 * seed, 6 * seed + 6)).equal(cache.network(x))


def flattened(y):
    y.flatten(1).add_(1)
    return y.mean((2, 3))


def chunks(y):
    first, second = y.chunk(2, 1)
    first.add_(1)
    second.relu_()
    return y.mean((2, 3)) + first.sum((1, 2, 3))[:, None]


def contiguous(y):
    z = y.contiguous()
    z.add_(1)
    return y.mean((2, 3)) + z.sum((1, 2, 3))[:, None]


def written_before_it_is_viewed(y):
    v = y.flatten(1)
    y.add_(1)
    return y.mean((2, 3)) + v.sum(1, keepdim=True)


def written_after_more_was_made_of_it(y):
    z = torch.sigmoid(y)
    y.add_(1)
    return y.mean((2, 3)) + z.mean((2, 3))


WRITES = [flattened, chunks, contiguous, written_before_it_is_viewed]


@pytest.mark.parametrize("read", [*WRITES, written_after_more_was_made_of_it])
def test_writes_through_views(read):
    cache = cached(Net(Frozen(), read))
    agree(cache, 10)
    assert cache.active


def test_a_call_that_is_late_is_undone():
    """With buffers and random numbers as before, it is made again."""

    def forward(m, x):
        z, copied = m.norm(x).mean() * torch.rand(()), x.clone()
        y = m.frozen(copied)
        copied.mul_(2)
        return m.head(y.mean((2, 3))) * z

    parts = {"frozen": Frozen().requires_grad_(False), "head": nn.Linear(4, 3)}
    model, x = Does(forward, **parts, norm=nn.BatchNorm2d(3)), torch.randn(6, 3, 5, 5)
    cache = cached(model)
    for step in range(1, 5):
        state = torch.get_rng_state()
        found = cache(x, samples=torch.arange(6))
        assert model.norm.num_batches_tracked == step
        torch.set_rng_state(state)
        assert found.equal(trim(copy.deepcopy(model), fold=False)(x))
    assert cache._num_late > 0


def test_a_view_that_alone_is_read_is_kept_alone():
    cache = cached(Net(Frozen(), lambda y: y[:, :, 0, 0]))
    agree(cache)
    assert cache.active
    assert cache.stats().bytes == 6 * (24 + 4 * 4)


class TwoScales(Frozen):
    def forward(self, x):
        y = self.conv(x)
        return y, F.avg_pool2d(y, 2)


def test_what_a_module_gives_at_once_is_kept_apart_and_made_once():
    cache = cached(Net(TwoScales(), lambda both: sum(y.square().mean((2, 3)) for y in both)))
    x, calls, real = torch.randn(18, 3, 5, 5), [], F.conv2d
    agree(cache)
    expected = [cache.network(part) for part in x.split(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", lambda *a: calls.append(1) or real(*a))
        for _ in range(2):
            for i, part in enumerate(x.split(6)):
                found = cache(part, samples=torch.arange(6) + 6 * i + 6)
                assert found.equal(expected[i])
    assert len(calls) == 3
    assert cache.stats().rows == 48


class TwoStages(nn.Module):
    """Reads a value, and one that is computed of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Frozen().requires_grad_(False), nn.Conv2d(4, 4, 3).requires_grad_(False)
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.a(x)
        z = self.b(y)
        return y * self.one, z * self.one


def test_what_was_rounded_is_not_computed_with():
    cache, x = cached(TwoStages(), dtype=torch.bfloat16), torch.randn(6, 3, 5, 5)
    expected = [t.bfloat16().float() for t in cache.network(x)]
    for _ in range(6):
        found = cache(x, samples=torch.arange(6))
    assert same(found, tuple(expected))
    assert cache.stats().rows == 12


def test_values_on_the_way_to_one_another_are_computed_once():
    cache, x = cached(TwoStages()), torch.randn(12, 3, 5, 5)
    agree(cache)
    for rows in torch.arange(6, 18).split(6):
        assert same(cache(x[rows - 6], samples=rows), cache.network(x[rows - 6]))
    stats = cache.stats()
    assert (stats.misses, stats.advanced, stats.rows) == (36, 0, 36)


def test_rows_that_require_grad_are_not_kept():
    def forward(m, x):
        y = m.frozen(x) * m.gate[:, None, None]
        return torch.cat([y.flatten(1).chunk(2, 1)[0], y.relu().flatten(1)], 1)

    gate = nn.Parameter(torch.ones(4))
    cache = cached(Does(forward, frozen=Frozen().requires_grad_(False), gate=gate))
    agree(cache)
    cache(torch.randn(6, 3, 5, 5), samples=torch.arange(6, 12)).sum().backward()
    assert cache.network.model.gate.grad.abs().min() > 0


def test_threads_in_frozen_modules():
    with ThreadPoolExecutor(2) as pool:
        use = lambda v, y: sum(f.result() for f in [pool.submit(torch.mul, y, k) for k in (1, 2)])  # noqa: E731
        cache = cached(Net(Frozen(None, use)))
        agree(cache)


def test_numbers_that_change_in_each_call_do_not_pile_up():
    class Timed(Net):
        def forward(self, x, t):
            return self.head(self.frozen(x, t).mean((2, 3)))

    frozen = Frozen()
    frozen.forward = lambda x, t: frozen.conv(x) * t
    cache = cached(Timed(frozen))
    for i in range(150):
        cache(torch.ones(2, 3, 5, 5), i / 150, samples=torch.arange(2))
    assert len(cache._known.outcomes) < 140


def replace(directory):
    shutil.rmtree(directory)
    directory.write_text("")


@pytest.mark.parametrize("damage", [shutil.rmtree, replace])
def test_a_directory_that_is_lost_ends_the_cache_alone(tmp_path, damage):
    cache = cached(Net(Frozen()), directory=tmp_path / "rows")
    agree(cache)
    assert cache.active
    damage(tmp_path / "rows")
    agree(cache)
    assert cache.reason.startswith("its files cannot be used: ")
    cache.close()


RESTARTED = """
import sys, torch, torch.nn.functional as F
from torch import nn
import fastfreeze

class Frozen(nn.Linear):
    acts = {"relu": F.relu, "own": lambda x: x + len({"a", "b"})}
    def forward(self, x):
        return self.acts["own"](super().forward(x))

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(Frozen(3, 4).requires_grad_(False), nn.Linear(4, 2))
cache = fastfreeze.FeatureCache(fastfreeze.trim(model), enabled=True, directory=sys.argv[1])
for _ in range(5):
    cache(torch.ones(4, 3), samples=torch.arange(4))
hits = cache.stats().hits
cache.close()
print(hits)
"""


def test_functions_are_the_same_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path)])
    names = {"__name__": "__main__"}
    exec(compile(RESTARTED, "<string>", "exec"), names)
    command = [sys.executable, "-c", RESTARTED, str(tmp_path)]  # hashes texts otherwise
    found = subprocess.run(command, check=True, capture_output=True).stdout
    assert (names["hits"], int(found)) == (16, 16)
    assert len(list(tmp_path.glob("*.rows"))) == 1
