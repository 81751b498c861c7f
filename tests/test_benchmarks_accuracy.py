"""benchmarks.accuracy: what it takes for as good, a toy run, and going on with one."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest
import torch

accuracy = pytest.importorskip("benchmarks.accuracy", reason="tests run outside the source tree")
from benchmarks.accuracy import COMPOSER, mark, reached  # noqa: E402
from benchmarks.training_rivals import BEST_TORCH  # noqa: E402
from fastfreeze.recipes import data as recipes_data  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
OURS = "fastfreeze, t_0=0.5"


def runs(rival, epochs, errors, seconds):
    return [
        {"rival": rival, "epochs": epochs, "seed": seed, "error": error, "seconds": seconds + seed}
        for seed, error in enumerate(errors)
    ]


TORCH = runs(BEST_TORCH, 4, [0.05, 0.07], 4.0) + runs(BEST_TORCH, 8, [0.02, 0.04], 8.0)


def test_the_mark_is_torchs_mean_at_its_largest_budget_and_a_standard_error():
    assert mark(TORCH) == pytest.approx(0.03 + 0.01)
    assert mark(TORCH[2:3]) == 0.02


def test_the_cheapest_budget_that_reaches_the_mark_counts():
    own = runs("a", 4, [0.05, 0.05], 1.0) + runs("a", 8, [0.04, 0.04], 2.0)
    own += runs("a", 12, [0.01, 0.01], 3.0) + runs("b", 12, [0.04, 0.05], 1.0)
    found = reached(TORCH + own)
    assert (found["a"].epochs, found["a"].error, found["a"].seconds) == (8, 0.04, [2.0, 3.0])
    assert found["b"] is None
    assert found[BEST_TORCH].epochs == 8


def test_the_table_compares_with_torch_seed_by_seed():
    own = runs("a", 8, [0.03, 0.03], 4.0) + runs("b", 8, [0.1, 0.1], 4.0)
    text = "\n".join(accuracy.table(TORCH + own))
    assert "to 4.00% test error" in text
    assert "| a | 8 | 3.00 | 4.5 (4.0-5.0) | 0.53x |" in text  # 4/8 and 5/9
    assert "| b | - | not reached | - | - |" in text


@pytest.fixture(scope="module")
def whole():
    return recipes_data.load_data("mnist5k")


@pytest.fixture
def few_digits(whole, monkeypatch):
    """The real digits, but 24 for training and 10 for test."""
    train, test = (
        recipes_data.MemoryImages(*images[list(range(0, 1000, step))])
        for images, step in ((whole.train, 42), (whole.test, 100))
    )
    few = replace(whole, train=train, test=test)
    monkeypatch.setattr(accuracy, "load_data", lambda name: few)
    return few


def test_digits_are_normalised_and_in_an_order_of_the_seeds(few_digits):
    task = accuracy.digits(few_digits, "resnet8-w4", seed=1, epochs=2, batch_size=7, lr=0.1)
    assert (task.total_steps, task.steps_per_epoch, task.lr) == (6, 3, 0.1)
    mean, std = few_digits.mean, few_digits.std
    expected = (few_digits.train.pixels / 255 - mean) / std
    torch.testing.assert_close(task.images, expected)
    for epoch in task.order.view(2, 21):
        assert len(set(epoch.tolist())) == 21
    other = accuracy.digits(few_digits, "resnet8-w4", seed=2, epochs=2, batch_size=7, lr=0.1)
    assert not torch.equal(task.order, other.order)
    assert not torch.equal(task.build().stem.layers[0].weight, other.build().stem.layers[0].weight)


def test_a_toy_run_and_going_on_with_it(few_digits, tmp_path, capsys, monkeypatch):
    out = tmp_path / "results.json"
    options = ["--model=resnet8-w4", "--batch-size=8", "--epochs", "2", "--threads=1"]
    assert accuracy.main([*options, "--seeds=1", f"--out={out}"]) == 0
    first = json.loads(out.read_text())["accuracy"]
    everyone = accuracy.rivals()[0]
    assert [run["rival"] for run in first["runs"]] == list(everyone)
    assert all(run["epochs"] == 2 and run["seconds"] > 0 for run in first["runs"])
    assert all(0 <= run["error"] <= 1 for run in first["runs"])
    assert f"| {BEST_TORCH} | 2 |" in capsys.readouterr().out

    assert accuracy.main([*options, "--seeds=2", f"--out={out}"]) == 0
    both = json.loads(out.read_text())["accuracy"]["runs"]
    assert both[: len(everyone)] == first["runs"]
    assert [run["seed"] for run in both[len(everyone) :]] == [1] * len(everyone)
    with pytest.raises(SystemExit, match="holds runs of"):
        accuracy.main([*options, "--lr=0.2", f"--out={out}"])
    assert json.loads(out.read_text())["accuracy"]["runs"] == both


def test_composer_freezes_after_each_epoch_or_is_left_out_by_name(few_digits, monkeypatch):
    task = accuracy.digits(few_digits, "resnet8-w4", seed=0, epochs=2, batch_size=8, lr=0.1)
    calls = []
    module = types.ModuleType("composer.algorithms.layer_freezing")
    module.freeze_layers = lambda model, optimizer, at: calls.append(at)
    names = ["composer", "composer.algorithms"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["composer.algorithms"].layer_freezing = module
    makes, left_out = accuracy.rivals()
    assert left_out == {}
    training = makes[COMPOSER](task)
    for step in range(task.total_steps):
        training.step(*task.batch(step))
    assert calls == [0.5, 1.0]

    for name in [*names, module.__name__]:
        monkeypatch.setitem(sys.modules, name, None)
    makes, left_out = accuracy.rivals()
    assert COMPOSER not in makes
    assert "ModuleNotFoundError" in left_out[COMPOSER]
