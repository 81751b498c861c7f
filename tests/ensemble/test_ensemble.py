"""The ensemble averages its members' probabilities."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, weight_norm

from fastfreeze.ensemble import SnapshotEnsemble, select_members
from fastfreeze.ensemble._checks import logits_of
from fastfreeze.errors import FastfreezeWarning, SnapshotError
from fastfreeze.snapshots import MemorySnapshots, SnapshotStore
from tests.ensemble.members import assert_mean
from tests.nets import Does, small_model
from tests.snapshots.stores import assert_same_state, states


def models_and_ensemble(count=3):
    models = [small_model() for _ in range(count)]
    for model in models:  # statistics of its own for each
        model.train()(torch.randn(20, 4) + 1)
    return models, SnapshotEnsemble(small_model(), [copy.deepcopy(m.state_dict()) for m in models])


def stored(models, store=None):
    store = MemorySnapshots() if store is None else store
    for i, model in enumerate(models):
        store.save(model, step=i, cycle=i)
    return store


def test_the_ensemble_averages_probabilities_in_eval_mode():
    models, ensemble = models_and_ensemble()
    before = copy.deepcopy(ensemble.state_dict())
    x = torch.randn(5, 4)
    for training in (True, False):
        ensemble.train(training)
        assert ensemble.training == training
        assert not any(m.training for m in ensemble.members.modules())
        assert ensemble(x).dtype == torch.float32
        assert_mean(ensemble(x), models, x)
    for found, model in zip(ensemble.member_probabilities(x), models, strict=True):
        assert_mean(found, [model], x)
    assert_same_state(ensemble.state_dict(), before)


def test_gradients_reach_the_inputs_but_no_weight():
    models, ensemble = models_and_ensemble()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ensemble.double()
    assert torch.autograd.gradcheck(ensemble, x)
    assert not any(p.requires_grad for p in ensemble.parameters())
    assert all(p.requires_grad for m in models for p in m.parameters())


def test_moves_and_saves_like_any_module():
    (_, ensemble), (_, other) = models_and_ensemble(), models_and_ensemble()
    x = torch.randn(5, 4)
    assert not torch.equal(other(x), ensemble(x))
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other(x), ensemble(x))
    for dtype in (torch.float64, torch.bfloat16):
        assert copy.deepcopy(ensemble).to(dtype)(x.to(dtype)).dtype == dtype
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


def ran(module):
    """With what a training leaves in its attributes."""
    model = nn.Sequential(module, nn.ReLU(), nn.Linear(6, 3))
    model(torch.randn(5, 4)).sum().backward()
    return model


class Observed(nn.Module):
    """A hook that is a method, a generator, and a result kept from the latest call."""

    def __init__(self):
        super().__init__()
        self.linear, self.generator = nn.Linear(4, 3), torch.Generator()
        self.linear.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.latest = output

    def forward(self, x):
        self.linear(x)
        return self.latest


HARD_TO_COPY = {
    "weight norm": lambda: ran(weight_norm(nn.Linear(4, 6))),
    "spectral norm": lambda: ran(nn.utils.spectral_norm(nn.Linear(4, 6))),
    "pruned": lambda: ran(prune.l1_unstructured(nn.Linear(4, 6), "weight", 0.5)),
    "parametrized": lambda: ran(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))),
    "observed": lambda: ran(nn.Sequential(Observed(), nn.Linear(3, 6))),
}


@pytest.mark.parametrize("make", HARD_TO_COPY.values(), ids=HARD_TO_COPY)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_models_that_ran_in_training(make):
    models, x = [make() for _ in range(3)], torch.randn(5, 4)
    store = stored(models)
    for model in (models[0], make):
        ensemble = SnapshotEnsemble.from_store(model, store)
        for _ in range(2):
            assert_mean(ensemble(x), models, x)


def locked():
    model = nn.Linear(4, 3)
    model.lock = threading.Lock()
    return model


def with_a_closure():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda module, args, output: model[1](output))
    return model


@pytest.mark.parametrize("make", [locked, with_a_closure])
def test_members_made_by_a_function(make):
    models, x = [make() for _ in range(3)], torch.randn(5, 4)
    ensemble = SnapshotEnsemble(make, [m.state_dict() for m in models])
    assert_mean(ensemble(x), models, x)
    if make is locked:
        torch.testing.assert_close(ensemble.as_module(x)(x), ensemble(x))


@pytest.mark.parametrize("last", [None, 1, 3])
def test_members_of_a_store(tmp_path, last):
    models, _ = models_and_ensemble(4)
    x, labels, there = torch.randn(5, 4), torch.randint(3, (5,)), models[-(last or 4) :]
    for store in (SnapshotStore(tmp_path), MemorySnapshots()):
        every = SnapshotEnsemble.from_store(small_model(), stored(models, store), last)
        assert_mean(every(x), there, x)
    found = select_members(list(every.member_probabilities(x)), labels)
    for members in (found, (len(there) - 1, 0, 0)):
        ensemble = SnapshotEnsemble.from_store(small_model(), store, last, members=members)
        assert_mean(ensemble(x), [there[m] for m in members], x)
    for members, error, match in [
        ([0, 4], ValueError, r"members\[1\] must be in 0\.\.[023], got 4"),
        ([-1], ValueError, r"members\[0\] must be in 0\.\.[023], got -1"),
        ([0.5], TypeError, r"members\[0\] must be an int in 0\.\.[023], got 0.5"),
        ([], ValueError, "must hold at least one state dict"),
    ]:
        with pytest.raises(error, match=match):
            SnapshotEnsemble.from_store(small_model(), store, last, members=members)


def ensemble_of(change, classes=3, **options):
    """Of what a function makes of a linear layer's result."""

    def make():
        return Does(lambda m, x: change(m.linear(x)), linear=nn.Linear(4, classes))

    return SnapshotEnsemble(make(), [make().state_dict() for _ in range(3)], **options)


def channels_first(z):
    return z.movedim(-1, 1)


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor


@pytest.mark.parametrize("how", [None, "loop", "shared"])
@pytest.mark.parametrize("kind", ["dict", "object", "images"])
def test_kinds_of_outputs(how, kind):
    change, dim, x = {
        "dict": (lambda z: {"loss": None, "logits": z}, None, torch.randn(5, 4)),
        "object": (Answer, None, torch.randn(5, 4)),
        "images": (channels_first, 1, torch.randn(2, 5, 6, 4)),
    }[kind]
    ensemble = ensemble_of(change, how=how, dim=dim)
    expected = [logits_of(change(m.linear(x))).softmax(1) for m in ensemble.members]
    expected = torch.stack(expected)
    torch.testing.assert_close(ensemble(x), expected.mean(0))
    torch.testing.assert_close(torch.stack(list(ensemble.member_probabilities(x))), expected)
    if how == "shared":
        torch.testing.assert_close(ensemble.as_module(x)(x), expected.mean(0))


@pytest.mark.parametrize("how", ["loop", "shared"])
def test_no_silent_softmax(how):
    """Of one logit, or over the width of images."""
    x = torch.randn(2, 5, 6, 4)
    for change, classes, given, match in [
        (None, 1, x[0, 0], "logits must have C >= 2 .*softmax of one logit is 1, whatever it is"),
        (channels_first, 3, x, r"dim must say where the classes are .* \(2, 3, 5, 6\)"),
    ]:
        ensemble = ensemble_of(change or torch.clone, classes, how=how)
        for name in ("forward", "as_module", "member_probabilities"):
            with pytest.raises(ValueError, match=match):
                list(getattr(ensemble, name)(given))


@pytest.mark.parametrize("first", ["forward", "as_module"])
def test_probabilities_are_announced_once(first):
    x = torch.randn(5, 4)
    ensemble = ensemble_of(lambda z: z.softmax(-1))
    with pytest.warns(FastfreezeWarning, match="model returns probabilities, not logits") as seen:
        getattr(ensemble, first)(x)
    assert len(seen) == 1
    ensemble.as_module(x)
    list(ensemble.member_probabilities(x))


NO_PROBABILITIES = {
    "logits": lambda z: z,
    "positive": lambda z: z.abs(),
    "logarithms": lambda z: z.log_softmax(-1),
    "zeros": lambda z: z * 0,
    "one-hot": lambda z: F.one_hot(z.argmax(-1), 3).float(),
    "all rows but one": lambda z: torch.cat([z.softmax(-1)[:-1], z[-1:]]),
}


@pytest.mark.parametrize("change", NO_PROBABILITIES.values(), ids=NO_PROBABILITIES)
def test_no_false_alarm(change):
    ensemble_of(change)(torch.randn(5, 4))


def of_none(last):
    return SnapshotEnsemble.from_store(small_model(), MemorySnapshots(), last=last)


MADE, MODEL = SnapshotEnsemble, small_model()
STATE, X = MODEL.state_dict(), torch.ones(2, 4)
LOCK, CLOSURE = "copied .*lock.*: give a function that makes", "the function in 0._forward_hooks"
REFUSED = {  # what is called, with which arguments
    "lock": (MADE, (locked(), [{}]), TypeError, LOCK),
    "closure": (MADE, (with_a_closure(), [{}]), TypeError, CLOSURE),
    "no model": (MADE, (None, [STATE]), TypeError, "model must be an nn.Module, or .* NoneType"),
    "no models": (MADE, (lambda: 3, [STATE]), TypeError, "model must be an nn.Module, or .* int"),
    "one model": (MADE, (lambda: MODEL, [STATE] * 2), ValueError, "new tensors .* '0.weight' aga"),
    "no snapshots": (MADE, (MODEL, []), ValueError, "at least one state dict"),
    "no list": (MADE, (MODEL, STATE), TypeError, r"snapshots\[0\] must be a state dict, got str"),
    "another's": (MADE, (MODEL, [STATE, {}]), SnapshotError, r"snapshots\[1\] .* missing: '0.wei"),
    "last": (of_none, (2,), ValueError, "last must be at most 0, the .*, got 2"),
    "last 0": (of_none, (0,), ValueError, "last must be >= 1"),
    "array": (ensemble_of(torch.clone), (X.numpy(),), TypeError, "inputs .* got a NumPy array"),
    "no logits": (ensemble_of(lambda z: (z, z)), (X,), TypeError, "must return one, .* got tuple"),
}


@pytest.mark.parametrize(("act", "arguments", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused(act, arguments, error, match):
    with pytest.raises(error, match=match):
        act(*arguments)
