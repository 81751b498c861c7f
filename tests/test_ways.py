"""Ways of running an ensemble: each gives the same, and the fastest is chosen by measuring."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastfreeze.ensemble import SnapshotEnsemble, ways
from tests.conftest import needs_gpu
from tests.test_merge import Branching, Many, Net, Noisy, assert_right, chain

pytestmark = pytest.mark.usefixtures("one_thread")
ON_CUDA = ("streams", "cuda_graph")
ON_CPU = tuple(way for way in ways.WAYS if way not in ON_CUDA)


@pytest.fixture(autouse=True)
def _eager_compiler(monkeypatch):
    """Inductor's minutes are not spent on what is not its test."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="aot_eager"))


@pytest.mark.parametrize("how", [None, *ON_CPU])
@pytest.mark.parametrize("batch", [1, 3, 33])
def test_every_way_gives_the_same(how, batch):
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem", "blocks.0"), 3), how=how)
    x = torch.randn(batch, 3, 6, 6)
    assert_right(ensemble, x)
    with torch.no_grad():
        for p in ensemble.members[1].head.parameters():
            p.add_(torch.randn_like(p))
    assert_right(ensemble, x)
    ensemble.load_state_dict(SnapshotEnsemble(Net(), chain(Net, (), 3)).state_dict())
    assert_right(ensemble, x)


@pytest.mark.parametrize("how", ON_CPU)
def test_keywords_and_gradients(how):
    ensemble = SnapshotEnsemble(Many(), chain(Many, ("a",), 3), how=how).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 4, dtype=torch.float64)
    truth = torch.stack([m(x, y, scale=2.0).softmax(-1) for m in ensemble.members]).mean(0)
    found = ensemble(x, y, scale=2.0)
    torch.testing.assert_close(found, truth)
    expected = torch.autograd.grad(truth[:, 1].sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(found[:, 1].sum(), x)[0], expected)


def test_an_explicit_way_never_falls_back():
    ensemble = SnapshotEnsemble(Branching(), chain(Branching, (), 2))
    x = torch.randn(4, 3)
    assert_right(ensemble, x)
    for how, match in [
        ("graph", "how='graph' cannot run: 2 members, one by one: .*control flow"),
        ("compiled", "2 members, one by one: .*control flow"),
        ("vmap", "data-dependent control flow"),
    ]:
        ensemble.how = how
        with pytest.raises((ValueError, RuntimeError), match=match):
            ensemble(x)
    ensemble.how = "loop"
    assert_right(ensemble, x)


@pytest.mark.parametrize("how", ON_CUDA)
def test_ways_of_a_gpu_are_refused_on_a_cpu(how):
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 2), how=how)
    x = torch.randn(2, 3, 6, 6)
    message = f"how='{how}' cannot run: it needs tensors on one CUDA device, got cpu"
    with pytest.raises(ValueError, match=message):
        ensemble(x)
    measured = ensemble.choose(x, ways=["loop", *ON_CUDA], seconds=0.01)
    assert measured.how == "loop"
    assert set(measured.unavailable) == set(ON_CUDA)
    assert_right(ensemble, x)


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ON_CUDA)
def test_ways_of_a_gpu(how, autocast):
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem", "blocks.0"), 3), how=how).cuda()

    def check(batch):
        x = torch.randn(batch, 3, 6, 6, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            truth = torch.stack([m(x).softmax(-1) for m in ensemble.members]).mean(0)
            before = x.clone()
            found = ensemble(x)
        torch.testing.assert_close(found, truth.to(found.dtype))
        assert torch.equal(x, before)
        return found

    first = check(3)
    kept = first.clone()
    for batch in (3, 1, 33):
        check(batch)
    assert torch.equal(first, kept)  # not the memory that the next call writes to
    with torch.no_grad():
        for p in ensemble.members[1].head.parameters():
            p.add_(torch.randn_like(p))
    check(3)


@needs_gpu
def test_a_cuda_graph_gives_no_gradients():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 2), how="cuda_graph").cuda()
    with pytest.raises(ValueError, match="it gives an input no gradient"):
        ensemble(torch.randn(2, 3, 6, 6, device="cuda", requires_grad=True))


@needs_gpu
def test_all_that_a_gpu_has_is_tried():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 2)).cuda()
    measured = ensemble.choose(torch.randn(2, 3, 6, 6, device="cuda"), seconds=0.05)
    assert {*measured.seconds, *measured.unavailable} == {"loop", "graph", "vmap", *ON_CUDA}


def test_members_draw_numbers_of_their_own_under_vmap():
    ensemble = SnapshotEnsemble(Noisy(), chain(Noisy, ("",), 2), how="vmap")
    a, b = ensemble.member_probabilities(torch.randn(4, 3))
    assert not torch.equal(a, b)


def test_the_fastest_is_chosen(monkeypatch):
    now = [0.0]
    cost = {"loop": 5.0, "graph": 2.0, "vmap": 3.0, "compiled": 1.0}

    class Clock:
        def __init__(self, device):
            pass

        def now(self):
            return now[0]

        def seconds(self, start, end):
            return end - start

    class Counted(SnapshotEnsemble):
        def forward(self, *args):
            now[0] += cost[self.how]
            return super().forward(*args)

    monkeypatch.setattr(ways, "Clock", Clock)
    x = torch.randn(2, 3, 6, 6)
    ensemble = Counted(Net(), chain(Net, ("stem",), 2))
    measured = ensemble.choose(x, seconds=0.01)
    assert (measured.how, ensemble.how) == ("graph", "graph")
    assert measured.seconds == {"loop": 5.0, "graph": 2.0, "vmap": 3.0}
    assert ensemble.choose(x, ways=ON_CPU, seconds=0.01).how == "compiled"
    assert ensemble.choose(x, ways=["vmap", "loop"], seconds=0.01).how == "vmap"


def test_what_was_only_tried_is_not_held():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3))
    x = torch.randn(2, 3, 6, 6)
    for ways_tried, held in ((["vmap", "graph"], False), (["vmap"], True)):
        ensemble.choose(x, ways=ways_tried, seconds=0.01)
        assert (ensemble._stacked is not None) == (held or ensemble.how == "vmap")


def test_what_cannot_run_is_not_chosen():
    ensemble = SnapshotEnsemble(Branching(), chain(Branching, (), 2))
    x = torch.randn(4, 3)
    measured = ensemble.choose(x, seconds=0.01)
    assert measured.how == ensemble.how == "loop"
    assert set(measured.unavailable) == {"graph", "vmap"}
    assert "control flow" in str(measured)
    ensemble.how = None
    with pytest.raises(ValueError, match="no way can run"):
        ensemble.choose(x, ways=["graph"], seconds=0.01)
    assert ensemble.how is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"ways": ["fast"]},
            "how must be None or one of loop, graph, .*, streams, cuda_graph, got 'fast'",
        ),
        ({"ways": []}, "ways must be some of"),
        ({"seconds": 0}, "seconds must be > 0, got 0"),
        ({"seconds": float("nan")}, "seconds must be > 0, got nan"),
    ],
)
def test_bad_arguments(arguments, match):
    ensemble = SnapshotEnsemble(Many(), chain(Many, (), 2))
    with pytest.raises(ValueError, match=match):
        ensemble.choose(torch.randn(2, 3), torch.randn(2, 4), **arguments)
    assert ensemble.how is None


def test_a_bad_way():
    with pytest.raises(ValueError, match="how must be None or one of"):
        SnapshotEnsemble(nn.Linear(2, 2), [nn.Linear(2, 2).state_dict()], how="quick")
    ensemble = SnapshotEnsemble(nn.Linear(2, 2), [nn.Linear(2, 2).state_dict()])
    ensemble.how = "quick"
    with pytest.raises(ValueError, match="how must be None or one of"):
        ensemble(torch.randn(1, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(self.embedding(x))


@pytest.mark.parametrize("how", ON_CPU)
def test_tied_weights(how):
    ensemble = SnapshotEnsemble(Tied(), [Tied().state_dict() for _ in range(3)], how=how)
    assert_right(ensemble, torch.randint(7, (4, 2)))


def test_vmap_by_threads_at_once():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3), how="vmap")
    inputs = [torch.randn(1 + i % 3, 3, 5, 5) for i in range(60)]
    expected = [ensemble(x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        for found, truth in zip(threads.map(ensemble, inputs), expected, strict=True):
            torch.testing.assert_close(found, truth)


def test_vmap_sees_no_hooks():
    ensemble = SnapshotEnsemble(Net(), chain(Net, ("stem",), 3), how="vmap")
    x = torch.randn(1, 3, 5, 5)
    ensemble(x)
    ensemble.members[1].head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="how='vmap' cannot run: Linear has hooks"):
        ensemble(x)
