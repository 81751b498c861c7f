"""benchmarks.worth from scratch: images, rules that look at the training, methods, ensembles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("benchmarks.worth", reason="tests run outside the source tree")
from benchmarks.worth import converging, ensembles, fashion, scratch
from benchmarks.worth.question import Run
from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.images import MemoryImages

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*times:fastfreeze.errors.FastfreezeWarning"),
]
MODEL = "resnet8-w4"


def images(count: int, seed: int) -> MemoryImages:
    """No image is like another one."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return MemoryImages(pixels, torch.arange(count) % 2)


@pytest.fixture
def few(monkeypatch) -> fashion.Fashion:
    """16 images to train on, 4 to choose by and 6 of test, in place of Fashion-MNIST."""
    mean, std = torch.tensor([0.5]), torch.tensor([0.25])
    data = ImageData(images(40, seed=0), images(6, seed=1), mean, std, 2, pad=2, flip=True)
    monkeypatch.setattr(fashion, "load_data", lambda name, folder: data)
    monkeypatch.setattr(fashion, "VALIDATION", 4)
    monkeypatch.setattr(fashion, "BATCH_SIZE", 8)
    for question in (scratch, ensembles):
        monkeypatch.setattr(question, "TRAIN", 16)
    return fashion.read(None, 16)


def test_images_to_train_on_to_choose_by_and_of_the_test_are_others(few):
    parts = few.train, few.validation, few.test
    assert [x.shape for x, _ in parts] == [(n, 1, 8, 8) for n in (16, 4, 6)]
    assert [y.bincount().tolist() for _, y in parts] == [[n // 2] * 2 for n in (16, 4, 6)]
    assert len(torch.cat([x for x, _ in parts]).flatten(1).unique(dim=0)) == 26
    torch.testing.assert_close(few.test[0], (images(6, seed=1).pixels / 255 - 0.5) / 0.25)


def test_each_batch_is_varied_anew_by_seed_and_step(few):
    task = few.task(MODEL, epochs=2, seed=3, lr=0.1)
    assert (task.total_steps, task.steps_per_epoch, task.lr) == (4, 2, 0.1)
    for epoch in task.order.view(2, 16):
        assert sorted(epoch.tolist()) == list(range(16))
    x, labels, ids = task.batch(1)
    assert torch.equal(x, task.batch(1)[0])
    assert torch.equal(labels, few.train[1][ids])
    same_images = replace(task, order=task.order[[1, 1]])
    assert not torch.equal(same_images.batch(0)[0], same_images.batch(1)[0])
    assert x.min() == task.black.item() == -2  # black has moved in
    assert (x == -2).sum() < x.numel() / 2


@pytest.mark.parametrize(
    ("rule", "epochs", "expected"),
    [
        pytest.param(
            converging.GradientNorms,
            # changes of 0.1, 0.5 and 0.2; then of 0.5 and 0.1, and of the last alone
            [(1.0, 1.0, 1.0), (1.1, 0.5, 1.2), (0.0, 0.75, 1.32), (0.0, 0.75, 1.32)],
            [0, 1, 1, 3],
            id="gradients",
        ),
        pytest.param(
            lambda layers: converging.Movement(layers, share=0.5),
            # movements of 1, 1 and 1; then of 0.2, 0.5 and 0.1; of 0.5 and 0; of 0.02 and 0
            [(1.0, 1.0, 1.0), (0.4, 1.0, 0.2), (0.0, 1.5, 0.0), (0.0, 0.1, 0.0)],
            [0, 1, 1, 3],
            id="movement",
        ),
    ],
)
def test_rules_freeze_from_the_input_on(rule, epochs, expected):
    """An epoch is one step, which adds the gradient to the weight."""
    layers = [[torch.nn.Parameter(torch.ones(1))] for _ in range(3)]
    judge, first, found = rule(layers), 0, []
    for gradients in epochs:
        for (p,), gradient in zip(layers, gradients, strict=True):
            p.grad = torch.tensor([gradient])
            p.data += p.grad
        judge.see_step()
        first = judge.first_to_train(first)
        found.append(first)
    assert found == expected


def test_a_converged_layer_anneals_freezes_and_stays(few):
    class FirstAtOnce:
        def __init__(self, layers):
            self.layers = layers

        def see_step(self):
            pass

        def first_to_train(self, first):
            return 1

    task = few.task(MODEL, epochs=4, seed=0, lr=0.1)
    training = converging.converging(task, FirstAtOnce, anneal_epochs=1, trimmed=False)
    first = training.optimizer.param_groups[0]
    rates, weights = [], []
    for step in range(task.total_steps):
        training.step(*task.batch(step))
        rates.append([group["lr"] for group in training.optimizer.param_groups[:2]])
        weights.append(first["params"][0].detach().clone())
    cosine = [0.05 * (1 + torch.tensor(torch.pi * t / 8).cos().item()) for t in range(1, 9)]
    assert [rate for _, rate in rates] == pytest.approx(cosine)
    assert [rate for rate, _ in rates[:3]] == pytest.approx([*cosine[:2], cosine[1] / 2])
    assert [p.requires_grad for p in first["params"]] == [False] * len(first["params"])
    assert not torch.equal(weights[2], weights[3])
    assert all(torch.equal(w, weights[3]) for w in weights[4:])
    assert training.notes() == {"froze_at": [1.0]}


def test_composers_rule_freezes_at_epochs_ends_from_half_of_the_run(few):
    task = few.task(MODEL, epochs=4, seed=0, lr=0.1)
    training, frozen = scratch.composer(task), []
    modules = training.model.modules()
    leaves = [m for m in modules if not list(m.children()) and list(m.parameters())]
    for step in range(task.total_steps):
        training.step(*task.batch(step))
        frozen.append(sum(not p.requires_grad for m in leaves for p in m.parameters()))
    counts = [sum(1 for m in leaves[:n] for _ in m.parameters()) for n in range(len(leaves))]
    assert frozen[:5] == [0] * 5
    assert set(frozen[5:7]) == {counts[(len(leaves) - 1) // 2]}
    assert frozen[7] == counts[-1]


def test_all_methods_learn_and_those_that_freeze_cost_less(few, tmp_path):
    records = {
        name: scratch.run(Run(MODEL, name, 4, 0.05, 0), tmp_path, True)
        for name in (scratch.METHODS)
    }
    assert all(0 <= r["error"] <= 1 and r["nll"] > 0 and r["seconds"] > 0 for r in records.values())
    assert all(0 <= r["validation_error"] <= 1 for r in records.values())
    macs = {name: record["macs"] for name, record in records.items()}
    assert max(macs.values()) == macs["torch"]
    assert macs["FreezeOut, t_0=0.3"] < macs["FreezeOut, t_0=0.5"] < macs["FreezeOut, t_0=0.8"]
    assert macs["FreezeOut, t_0=0.8"] == macs["FreezeOut by flags, t_0=0.8"] < macs["torch"]


SHARED = {  # with which members the last one shares its first convolution
    "snapshots": [False] * 4,
    "independent": [False] * 4,
    "one network": [],
    "sticky": [False, True, True, True],
    "last_k=2": [False] * 4,
    "thaw": [False] * 4,
    "branches": [True] * 4,
    "branches, last part anew": [True] * 4,
}


@pytest.mark.parametrize("name", ensembles.METHODS)
def test_members_share_what_is_frozen(few, tmp_path, name, monkeypatch):
    monkeypatch.setattr(ensembles, "ROUNDS", 1)
    asked, method = Run(MODEL, name, 10, 0.05, 1), ensembles.METHODS[name]
    trial = ensembles.Trial(
        lambda epochs, seed: few.task(MODEL, epochs, seed, 0.05), asked, counted=False
    )
    states = method.make(trial)
    first, *_, last = states[0]  # the names of the tensors
    shared = [torch.equal(state[first], states[-1][first]) for state in states[:-1]]
    assert shared == SHARED[name]
    assert len({tuple(state[last].tolist()) for state in states}) == len(states)
    record = ensembles.run(asked, tmp_path, True)
    predict = ensembles.loop_of(few.task(MODEL, 1, 0, 0.1).build(), states)
    expected = predict(few.test[0])
    assert record["error"] == (expected.argmax(1) != few.test[1]).double().mean()
    assert record["nll"] == pytest.approx(
        torch.nn.functional.nll_loss(expected.log(), few.test[1]).item(), rel=1e-4
    )
    assert record["predict_ms"] > 0
    assert record["seconds"] > 0
    assert 0 <= record["ece"] <= 1
