"""The ensemble averages its members' probabilities."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastfreeze.ensemble import (
    MemorySnapshots,
    SnapshotEnsemble,
    SnapshotStore,
)
from fastfreeze.errors import SnapshotError
from tests.test_snapshots import assert_same_state, filled_store, small_model, states, tied_model


def mean_of(models, x):
    with torch.no_grad():
        return sum(m.eval()(x).double().softmax(-1) for m in models) / len(models)


def models_and_ensemble(count=3, **kwargs):
    models = [small_model() for _ in range(count)]
    for model in models:  # statistics of its own for each
        model.train()(torch.randn(20, 4) + 1)
    snapshots = [copy.deepcopy(m.state_dict()) for m in models]
    return models, SnapshotEnsemble(small_model(), snapshots, **kwargs)


def test_the_ensemble_averages_probabilities():
    models, ensemble = models_and_ensemble()
    x = torch.randn(5, 4)
    for training in (True, False):
        ensemble.train(training)
        mean = ensemble(x)
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), mean_of(models, x), rtol=1e-5, atol=1e-7)
    each = list(ensemble.member_probabilities(x))
    assert len(each) == 3
    for found, model in zip(each, models, strict=True):
        torch.testing.assert_close(found.double(), mean_of([model], x), rtol=1e-5, atol=1e-7)


def test_norms_and_dropout_stay_in_eval_mode():
    _, ensemble = models_and_ensemble()
    before = copy.deepcopy(ensemble.state_dict())
    ensemble.train()
    assert ensemble.training
    assert not any(m.training for m in ensemble.members.modules())
    x = torch.randn(5, 4)
    assert torch.equal(ensemble(x), ensemble(x))
    assert_same_state(ensemble.state_dict(), before)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_last_members(tmp_path, last):
    models, ensemble = models_and_ensemble(last=last)
    x = torch.randn(5, 4)
    expected = mean_of(models[-last:], x)
    torch.testing.assert_close(ensemble(x).double(), expected, rtol=1e-5, atol=1e-7)
    store = SnapshotStore(tmp_path)
    for i, model in enumerate(models):
        store.save(model, step=i, cycle=i)
    stored = SnapshotEnsemble.from_store(small_model(), store, last)
    assert torch.equal(stored(x), ensemble(x))


def test_all_members_of_a_store(tmp_path):
    store, saved = filled_store(tmp_path)
    x = torch.randn(5, 4)
    found = SnapshotEnsemble.from_store(small_model(), store)(x)
    assert torch.equal(found, SnapshotEnsemble(small_model(), saved)(x))


def test_snapshots_in_memory():
    models, ensemble = models_and_ensemble()
    store, x = MemorySnapshots(), torch.randn(5, 4)
    for i, model in enumerate(models):
        store.save(model, step=i, cycle=i)
    assert torch.equal(SnapshotEnsemble.from_store(small_model(), store)(x), ensemble(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(mode):
    models, ensemble = models_and_ensemble()
    x = torch.randn(5, 4)
    with mode():
        mean = ensemble(x)
        assert not mean.requires_grad
        assert mean.is_inference() == (mode is torch.inference_mode)
        torch.testing.assert_close(mean.double(), mean_of(models, x), rtol=1e-5, atol=1e-7)


def test_gradients_reach_the_inputs_but_no_weight():
    models, ensemble = models_and_ensemble()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ensemble.double()
    assert torch.autograd.gradcheck(ensemble, x)
    assert not any(p.requires_grad for p in ensemble.parameters())
    assert all(p.requires_grad for m in models for p in m.parameters())


def test_moves_and_saves_like_any_module():
    _, ensemble = models_and_ensemble()
    x = torch.randn(5, 4)
    expected = ensemble(x)
    _, other = models_and_ensemble()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other(x), expected)
    assert copy.deepcopy(ensemble).to(torch.float64)(x.double()).dtype == torch.float64
    assert copy.deepcopy(ensemble).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert ensemble.to("meta")(x.to("meta")).shape == (5, 3)


def test_the_ensemble_shares_nothing_with_what_it_was_made_of():
    model, (state,) = small_model(), states(1)
    before = copy.deepcopy(model.state_dict())
    ensemble = SnapshotEnsemble(model, [state])
    assert_same_state(model.state_dict(), before)
    assert model.training
    with torch.no_grad():
        for tensor in [*state.values(), *model.state_dict().values()]:
            tensor.zero_()
    assert all((p != 0).any() for p in ensemble.members[0][0].parameters())


def test_tied_weights_stay_tied():
    ensemble = SnapshotEnsemble(tied_model(), [tied_model().state_dict()])
    assert ensemble.members[0][0].weight is ensemble.members[0][1].weight


def test_the_ensemble_compiles_in_one_graph():
    models, ensemble = models_and_ensemble()
    x = torch.randn(5, 4)
    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).double(), mean_of(models, x), rtol=1e-5, atol=1e-7)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x), x


REFUSED_ENSEMBLES = {
    "none": (lambda: SnapshotEnsemble(Pair(), []), ValueError, "at least one state dict"),
    "last": (
        lambda: SnapshotEnsemble(Pair(), [Pair().state_dict()], last=2),
        ValueError,
        "last must be at most 1, the snapshots there are, got 2",
    ),
    "last 0": (lambda: SnapshotEnsemble(Pair(), [], last=0), ValueError, "last must be >= 1"),
    "a state dict alone": (
        lambda: SnapshotEnsemble(Pair(), Pair().state_dict()),
        TypeError,
        r"snapshots\[0\] must be a state dict, got str",
    ),
    "a second of another model": (
        lambda: SnapshotEnsemble(Pair(), [Pair().state_dict(), {}]),
        SnapshotError,
        r"snapshots\[1\] is of another model: missing: 'linear.weight', 'linear.bias'",
    ),
    "not logits": (
        lambda: SnapshotEnsemble(Pair(), [Pair().state_dict()])(torch.ones(1, 2)),
        TypeError,
        "logits must be a tensor, got tuple",
    ),
}


@pytest.mark.parametrize(
    ("act", "error", "match"), REFUSED_ENSEMBLES.values(), ids=REFUSED_ENSEMBLES
)
def test_refused_ensembles(act, error, match):
    with pytest.raises(error, match=match):
        act()
