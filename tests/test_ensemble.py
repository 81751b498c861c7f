"""Snapshots survive kills and notice damage; the ensemble averages them; statistics are right."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import multiprocessing
import random
import time

import pytest
import safetensors.torch
import torch
from torch import nn

from fastfreeze.ensemble import (
    Snapshot,
    SnapshotEnsemble,
    SnapshotStore,
    error_rate,
    expected_calibration_error,
    nll,
)
from fastfreeze.errors import SnapshotError
from fastfreeze.schedule import SnapshotCycles


def small_model():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def states(count):
    return [small_model().state_dict() for _ in range(count)]


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def filled_store(directory, count=3):
    store, saved = SnapshotStore(directory), states(count)
    for i, state in enumerate(saved):
        store.save(state, step=10 * (i + 1), cycle=i, metrics={"error": 0.1 * i})
    return store, saved


def only_snapshot_file(directory):
    (path,) = directory.glob("*.safetensors")
    return path


def test_what_was_saved_is_what_is_loaded(tmp_path):
    model = small_model()
    schedule = SnapshotCycles(total_steps=9, num_cycles=3)
    store = SnapshotStore(tmp_path / "new" / "directory")
    expected = []
    for cycle, step in enumerate(schedule.cycle_ends):
        with torch.no_grad():
            model[0].weight.normal_()
        expected.append(copy.deepcopy(model.state_dict()))
        snapshot = store.save(model, step=step, cycle=cycle, metrics={"error": 0.5, "loss": 2})
        assert snapshot == list(store)[-1]
    reopened = SnapshotStore(store.directory)
    assert len(reopened) == 3
    assert [(s.step, s.cycle) for s in reopened] == [(3, 0), (6, 1), (9, 2)]
    assert [s.metrics for s in reopened] == [{"error": 0.5, "loss": 2.0}] * 3
    for snapshot, state in zip(reopened, expected, strict=True):
        assert_same_state(reopened.load(snapshot), state)
    other = small_model()
    reopened.load_into(other, reopened.last(2)[0])
    assert_same_state(other.state_dict(), expected[1])


def test_the_last_snapshots(tmp_path):
    store, _ = filled_store(tmp_path)
    assert [s.step for s in store.last(2)] == [20, 30]
    assert store.last(3) == tuple(store)
    for m, message in ((4, "m must be at most 3"), (0, "m must be >= 1")):
        with pytest.raises(ValueError, match=message):
            store.last(m)


def test_an_empty_store(tmp_path):
    store = SnapshotStore(tmp_path / "absent")
    assert len(store) == 0
    assert list(store) == []
    assert not store.directory.exists()


def test_saving_a_step_again_replaces_it(tmp_path):
    store, (first, second, third) = filled_store(tmp_path)
    (again,) = states(1)
    store.save(again, step=20, cycle=1)
    assert [s.step for s in store] == [10, 20, 30]
    for snapshot, state in zip(store, (first, again, third), strict=True):
        assert_same_state(store.load(snapshot), state)
    store.save(third, step=30, cycle=2, metrics={"error": 1})  # the same bytes once more
    assert_same_state(store.load(store.last(1)[0]), third)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    store.save(second, step=15, cycle=1)
    assert [s.step for s in store] == [10, 15, 20, 30]


def tied_model():
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def test_tied_weights(tmp_path):
    store, model, other = SnapshotStore(tmp_path), tied_model(), tied_model()
    snapshot = store.save(model, step=1, cycle=0)
    store.load_into(other, snapshot)
    assert other[0].weight is other[1].weight
    assert torch.equal(other[0].weight, model[0].weight)


def test_odd_tensors(tmp_path):
    base = torch.randn(4, 6)
    state = {
        "transposed": base.t(),
        "overlapping": base[1:],
        "every other": base[:, ::2],
        "expanded": torch.randn(1, 3).expand(2, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "also empty": torch.empty(0),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.randn(3, dtype=torch.bfloat16),
        "needs grad": torch.randn(3, requires_grad=True),
    }
    store = SnapshotStore(tmp_path)
    assert_same_state(store.load(store.save(state, step=0, cycle=0)), state)


def test_equal_weights_give_equal_files(tmp_path):
    (state,) = states(1)
    hashes = {SnapshotStore(tmp_path / d).save(state, step=1, cycle=0).sha256 for d in "abc"}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"step": -1}, ValueError, "step must be >= 0"),
        ({"step": 1.0}, TypeError, "step must be an int"),
        ({"cycle": True}, TypeError, "cycle must be an int"),
        ({"metrics": {"loss": "low"}}, TypeError, r"metrics\['loss'\] must be a number, got 'low'"),
        ({"model": {"a": [1.0]}}, TypeError, r"model\['a'\] must be a tensor, got list"),
        ({"model": 3}, TypeError, "model must be a state dict, got int"),
    ],
    ids=["negative step", "float step", "bool cycle", "metric", "entry", "model"],
)
def test_refused_saves(tmp_path, arguments, error, match):
    store, _ = filled_store(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (state,) = states(1)
    with pytest.raises(error, match=match):
        store.save(**{"model": state, "step": 99, "cycle": 9, **arguments})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


OTHER_MODELS = {
    "wider": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 3)),
        r"unlike: '0.weight': float32 \[6, 4\], expected float32 \[7, 4\], '0.bias': .* and 4 more",
    ),
    "deeper": (lambda: nn.Sequential(*small_model(), nn.Linear(3, 3)), r"missing: '4.weight', '4"),
    "shallower": (lambda: small_model()[:2], r"unexpected: '3.weight', '3.bias'"),
    "double": (
        lambda: small_model().double(),
        r"unlike: '0.weight': float32 \[6, 4\], expected float64 \[6, 4\]",
    ),
}


@pytest.mark.parametrize(("make", "match"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_another_model_is_left_untouched(tmp_path, make, match):
    store, saved = filled_store(tmp_path)
    other = make()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(SnapshotError, match=match):
        store.load_into(other, store.last(1)[0])
    with pytest.raises(SnapshotError, match=r"snapshots\[0\] is of another model"):
        SnapshotEnsemble(other, saved)
    with pytest.raises(SnapshotError, match=r"the model to be saved in .* is of another model"):
        store.save(other, step=99, cycle=9)
    assert_same_state(other.state_dict(), before)
    assert [s.step for s in store] == [10, 20, 30]


def test_a_damaged_snapshot_is_never_loaded(tmp_path):
    store, (expected,) = filled_store(tmp_path, 1)
    (snapshot,) = store
    path = only_snapshot_file(tmp_path)
    good = path.read_bytes()
    random_ = random.Random(0)
    for _ in range(200):
        damaged = bytearray(good)
        damaged[random_.randrange(len(good))] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError, match=rf"{path.name} is truncated or altered"):
            store.load(snapshot)
    for size in (0, 7, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(SnapshotError, match=rf"{path.name} is truncated or altered"):
            store.load(snapshot)
    path.unlink()
    with pytest.raises(SnapshotError, match=rf"{path.name} cannot be read"):
        store.load(snapshot)
    path.write_bytes(good)
    assert_same_state(store.load(snapshot), expected)


def test_a_damaged_manifest_never_gives_wrong_weights(tmp_path):
    store, saved = filled_store(tmp_path)
    by_step = dict(zip((10, 20, 30), saved, strict=True))
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    random_ = random.Random(0)
    noticed = 0
    for _ in range(400):
        damaged = bytearray(good)
        damaged[random_.randrange(len(good))] = random_.randrange(256)
        path.write_bytes(damaged)
        try:
            for snapshot in SnapshotStore(tmp_path):
                assert_same_state(store.load(snapshot), by_step[snapshot.step])
        except SnapshotError:
            noticed += 1
    assert noticed > 200


def edited(entry=None, **top):
    def edit(content):
        content.update(top)
        content["snapshots"][0].update(entry or {})
        return content

    return edit


BAD_MANIFESTS = {
    "a list": lambda content: [content],
    "null": lambda content: None,
    "future version": edited(format_version=2),
    "no version": lambda content: {k: v for k, v in content.items() if k != "format_version"},
    "no tensors": edited(tensors=None),
    "no snapshots": lambda content: {**content, "snapshots": 3},
    "escaping path": edited({"file": "../../etc/passwd"}),
    "absolute path": edited({"file": "/etc/passwd"}),
    "escaping hash": edited(
        {"sha256": "/../../../../../a", "file": "step-00000010-/../../../../../a.safetensors"}
    ),
    "another step's file": edited({"step": 11}),
    "negative step": edited({"step": -1}),
    "step as text": edited({"step": "10"}),
    "hash as number": edited({"sha256": 5}),
    "metrics as list": edited({"metrics": [1]}),
    "unknown entry": edited({"pickle": "x"}),
    "twice the same step": lambda c: {**c, "snapshots": c["snapshots"][:1] * 2},
}


@pytest.mark.parametrize("edit", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(tmp_path, edit):
    filled_store(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(SnapshotError, match=r"manifest\.json is not a manifest of snapshots"):
        SnapshotStore(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "\xff\xfe"], ids=["", "{", "[[[", "bytes"]
)
def test_a_manifest_that_is_not_json_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SnapshotError, match=r"manifest\.json is not a manifest of snapshots"):
        SnapshotStore(tmp_path)


def test_a_snapshot_made_up_by_hand_cannot_leave_the_directory(tmp_path):
    store, _ = filled_store(tmp_path / "store")
    (tmp_path / "a.safetensors").write_bytes(b"secret")
    with pytest.raises(SnapshotError, match="names no file that a store writes"):
        store.load(Snapshot(1, 0, {}, "", "/../../a"))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"not a safetensors file", "is not a safetensors file"),
        (safetensors.torch.save({"other": torch.ones(2)}), "missing: '0.weight'"),
    ],
    ids=["garbage", "other tensors"],
)
def test_a_forged_snapshot_is_refused(tmp_path, data, match):
    """Its hash is right, its content is not."""
    store, _ = filled_store(tmp_path, 1)
    (snapshot,) = store
    forged = dataclasses.replace(snapshot, sha256=hashlib.sha256(data).hexdigest())
    (tmp_path / forged.file).write_bytes(data)
    with pytest.raises(SnapshotError, match=match):
        store.load(forged)


def test_leftovers_are_ignored_and_removed_on_the_next_save(tmp_path):
    store, saved = filled_store(tmp_path, 1)
    leftovers = [
        tmp_path / f"step-00000020-{'0' * 16}.safetensors",
        tmp_path / f".step-00000020-{'0' * 16}.safetensors.tmp",
        tmp_path / ".manifest.json.tmp",
    ]
    foreign = [tmp_path / "model.safetensors", tmp_path / "notes.tmp"]
    for path in leftovers + foreign:
        path.write_bytes(b"x")
    assert len(SnapshotStore(tmp_path)) == 1
    store.save(saved[0], step=20, cycle=1)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in foreign)
    assert len(store) == 2


def test_a_lost_manifest_is_not_an_empty_store(tmp_path):
    store, saved = filled_store(tmp_path, 2)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(
        SnapshotError, match=r"manifest\.json is missing, though there are snapshots"
    ):
        SnapshotStore(tmp_path)
    with pytest.raises(SnapshotError, match=r"manifest\.json is missing"):
        store.save(saved[0], step=99, cycle=9)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_failed_write_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store, saved = filled_store(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastfreeze.ensemble.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(saved[0], step=20, cycle=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def save_for_ever(directory, told):
    """Every other save replaces a step."""
    store = SnapshotStore(directory)
    count = 2 * len(store)
    while True:
        weight = torch.full((10_000,), float(count))
        store.save({"weight": weight, "tied": weight}, step=count // 2, cycle=0)
        told.send(count)
        count += 1


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
def test_killed_at_any_moment_all_completed_snapshots_are_intact(tmp_path):
    context = multiprocessing.get_context("fork")
    random_ = random.Random(0)
    for _ in range(12):
        receiver, sender = context.Pipe(duplex=False)
        writer = context.Process(target=save_for_ever, args=(tmp_path, sender), daemon=True)
        writer.start()
        sender.close()
        told = [receiver.recv()]
        kill_at = time.monotonic() + random_.random() * 0.03
        while time.monotonic() < kill_at:
            SnapshotStore(tmp_path)  # a reader never meets half a manifest
        writer.kill()
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                told.append(receiver.recv())
        store = SnapshotStore(tmp_path)
        snapshots = tuple(store)
        assert [s.step for s in snapshots] == list(range(len(snapshots)))
        assert len(snapshots) > told[-1] // 2
        for snapshot in snapshots:
            state = store.load(snapshot)
            (count,) = state["weight"].unique().tolist()
            assert count // 2 == snapshot.step
            assert torch.equal(state["weight"], state["tied"])


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


STATISTICS = [error_rate, nll, expected_calibration_error]
every_statistic = pytest.mark.parametrize("statistic", STATISTICS, ids=lambda f: f.__name__)


def test_error_rate():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]])
    assert error_rate(probabilities, torch.tensor([0, 2, 0])) == 0
    assert error_rate(probabilities, torch.tensor([0, 1, 0])) == pytest.approx(1 / 3)
    assert error_rate(probabilities, torch.tensor([1, 1, 1])) == 1


def test_nll():
    probabilities = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    labels = torch.tensor([0, 0], dtype=torch.int32)
    assert nll(probabilities, labels) == pytest.approx((math.log(2) + math.log(4)) / 2)
    logits = torch.randn(50, 7)
    labels = torch.randint(7, (50,))
    expected = nn.functional.cross_entropy(logits.double(), labels).item()
    assert nll(logits.softmax(-1), labels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float64, 708.4), (torch.float32, 87.3), (torch.bfloat16, 87.3), (torch.float16, 9.7)],
    ids=str,
)
def test_nll_of_an_impossible_label_is_finite(dtype, most):
    certain = torch.tensor([[0.0, 1.0]], dtype=dtype)
    assert nll(certain, torch.tensor([0])) == pytest.approx(most, abs=0.05)
    assert nll(certain, torch.tensor([1])) == 0


def plain_calibration_error(probabilities, labels, num_bins):
    """Equation 3, bin by bin."""
    total = 0.0
    for i in range(num_bins):
        rows = [
            (row.max().item(), row.argmax().item() == label)
            for row, label in zip(probabilities, labels.tolist(), strict=True)
            if i / num_bins < row.max() <= (i + 1) / num_bins
        ]
        if rows:
            confidence = sum(c for c, _ in rows) / len(rows)
            accuracy = sum(right for _, right in rows) / len(rows)
            total += len(rows) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("num_bins", [1, 2, 15, 100])
def test_expected_calibration_error(num_bins):
    probabilities = torch.randn(300, 5, dtype=torch.float64).mul(2).softmax(-1)
    labels = torch.randint(5, (300,))
    found = expected_calibration_error(probabilities, labels, num_bins)
    assert found == pytest.approx(plain_calibration_error(probabilities, labels, num_bins))


def test_expected_calibration_error_by_hand():
    probabilities = torch.tensor([[0.5, 0.5], [0.55, 0.45], [0.9, 0.1], [0.95, 0.05], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 1, 1])
    # of 10 bins: (0.4, 0.5] right; (0.5, 0.6] wrong; (0.8, 0.9] right; (0.9, 1] half right at 0.975
    expected = (0.5 + 0.55 + 0.1 + 2 * 0.475) / 5
    found = expected_calibration_error(probabilities, labels, num_bins=10)
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected_calibration_error(torch.eye(3), torch.arange(3)) == 0


@every_statistic
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_probabilities_of_any_precision_are_accepted(statistic, dtype):
    probabilities = torch.randn(20, 1000).softmax(-1)
    labels = torch.randint(1000, (20,))
    found = statistic(probabilities.to(dtype), labels)
    assert found == pytest.approx(statistic(probabilities, labels), abs=0.06)


GOOD = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
Y = torch.tensor([0, 1])
REFUSED_PREDICTIONS = {
    "logits": (torch.tensor([[0.5, 0.5], [2.0, 3.0]]), Y, ValueError, r"s\[1\] must sum to 1 .*5"),
    "negative": (torch.tensor([[1.5, -0.5], [1, 0]]), Y, ValueError, r"s\[0\] must be >= 0.*-0.5"),
    "nan": (torch.tensor([[0.5, 0.5], [math.nan, 1]]), Y, ValueError, r"s\[1\] must be >= 0.*nan"),
    "infinite": (torch.tensor([[math.inf, 0], [0, 1]]), Y, ValueError, r"s\[0\] must sum to 1"),
    "integers": (torch.tensor([[1, 0], [0, 1]]), Y, TypeError, "floating-point .*int64"),
    "a list": ([[0.5, 0.5]], Y, TypeError, "probabilities must be a .* tensor, got list"),
    "one dimension": (torch.tensor([1.0]), Y, ValueError, r"shape \[B, C\].*\(1,\)"),
    "no rows": (torch.ones(0, 2), Y[:0], ValueError, r"B and C >= 1, got \(0, 2\)"),
    "float labels": (GOOD, Y.float(), TypeError, "labels must be .*integers, got torch.float32"),
    "bool labels": (GOOD, Y.bool(), TypeError, "labels must be .*integers, got torch.bool"),
    "list of labels": (GOOD, [0, 1], TypeError, "labels must be .*integers, got list"),
    "too few labels": (GOOD, Y[:1], ValueError, r"labels must have shape \[2\].*got \[1\]"),
    "one-hot labels": (GOOD, torch.eye(2).long(), ValueError, r"labels must have shape \[2\]"),
    "label too high": (GOOD, Y + 1, ValueError, r"labels\[1\] must be in 0\.\.1, got 2"),
    "label too low": (GOOD, Y - 1, ValueError, r"labels\[0\] must be in 0\.\.1, got -1"),
}


@every_statistic
@pytest.mark.parametrize(
    ("probabilities", "labels", "error", "match"),
    REFUSED_PREDICTIONS.values(),
    ids=REFUSED_PREDICTIONS,
)
def test_refused_predictions(statistic, probabilities, labels, error, match):
    with pytest.raises(error, match=match):
        statistic(probabilities, labels)


@pytest.mark.parametrize("num_bins", [0, -1, 1.5], ids=str)
def test_refused_bins(num_bins):
    with pytest.raises((TypeError, ValueError), match="num_bins must be"):
        expected_calibration_error(GOOD, Y, num_bins)
