"""Ways of running an ensemble: each gives the same, and an explicit one never falls back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastfreeze.ensemble import SnapshotEnsemble
from tests.conftest import needs_gpu
from tests.ensemble.members import assert_right, chain
from tests.nets import Branching, Does, Many, Residual
from tests.snapshots.stores import assert_same_state

pytestmark = pytest.mark.usefixtures("one_thread")
every_way = pytest.mark.parametrize("how", [None, "loop", "shared"])


@every_way
def test_loading_gives_each_member_its_own_again(how):
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("",), 3), how=how)
    x = torch.randn(2, 3, 6, 6)
    ensemble(x)
    states = chain(Residual, ("blocks.2",), 3)
    other = SnapshotEnsemble(copy.deepcopy(ensemble.members[0]), states)
    holder = nn.ModuleDict({"ensemble": ensemble})
    holder.load_state_dict({f"ensemble.{k}": v for k, v in other.state_dict().items()})
    for member, state in zip(ensemble.members, states, strict=True):
        assert_same_state(member.state_dict(), state)
    assert_right(ensemble, x)


@every_way
def test_keywords_and_gradients(how):
    ensemble = SnapshotEnsemble(Many(), chain(Many, ("a",), 3), how=how).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 4, dtype=torch.float64)
    truth = torch.stack([m(x, y, scale=2.0).softmax(-1) for m in ensemble.members]).mean(0)
    found = ensemble(x, y, scale=2.0)
    torch.testing.assert_close(found, truth)
    expected = torch.autograd.grad(truth[:, 1].sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(found[:, 1].sum(), x)[0], expected)


@every_way
def test_tied_weights(how):
    def make():
        model = Does(lambda m, x: m.out(m.words(x)), words=nn.Embedding(7, 5))
        model.out = nn.Linear(5, 7, bias=False)
        model.out.weight = model.words.weight
        return model

    ensemble = SnapshotEnsemble(make(), [make().state_dict() for _ in range(3)], how=how)
    assert ensemble.members[0].out.weight is ensemble.members[0].words.weight
    assert_right(ensemble, torch.randint(7, (4, 2)))


def test_an_explicit_way_never_falls_back():
    ensemble, x = SnapshotEnsemble(Branching(), chain(Branching, (), 2)), torch.randn(4, 3)
    assert_right(ensemble, x)
    ensemble.how = "shared"
    with pytest.raises(ValueError, match=r"'shared' cannot run: 2 members, one by one: .*flow"):
        ensemble(x)
    with pytest.raises(ValueError, match=r"the ensemble cannot be one graph: .*control flow"):
        ensemble.as_module(x)
    ensemble.how = "loop"
    assert_right(ensemble, x)
    ensemble.how = "shared"
    compiled = torch.compile(ensemble, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="how='shared' cannot run: compile what as_module gives"):
        compiled(x)


def test_a_bad_way():
    match = "how must be None, 'loop' or 'shared', got 'quick'"
    states = [nn.Linear(2, 2).state_dict()]
    with pytest.raises(ValueError, match=match):
        SnapshotEnsemble(nn.Linear(2, 2), states, how="quick")
    ensemble = SnapshotEnsemble(nn.Linear(2, 2), states)
    ensemble.how = "quick"
    with pytest.raises(ValueError, match=match):
        ensemble(torch.randn(1, 2))


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_cuda_graph_by_torch(autocast):
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem", "blocks.0"), 3)).cuda()
    x = torch.randn(3, 3, 6, 6, device="cuda")
    # Of a cache of casts, the graph would keep addresses that are given back.
    with (
        torch.no_grad(),
        torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False),
    ):
        graphed = torch.cuda.make_graphed_callables(ensemble.as_module(x), (x.clone(),))
        for _ in range(3):
            x = torch.randn_like(x)
            truth = torch.stack([m(x).softmax(-1) for m in ensemble.members]).mean(0)
            found = graphed(x)
            torch.testing.assert_close(found, truth.to(found.dtype))
