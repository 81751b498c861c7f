"""The methods of benchmarks.worth.finetuning on a toy network: what trains, and at what step."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks.worth", reason="tests run outside the source tree")
import fastfreeze
from benchmarks.worth import finetune_ensembles
from benchmarks.worth.ensembles import Trial
from benchmarks.worth.finetuning import FineTask, methods
from benchmarks.worth.question import Run
from benchmarks.worth.training import record

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS, STEPS, WIDTH = 2, 4, 8
METHODS = methods((0.1,))
HEAD = 3


class Toy(FineTask):
    """Four stages of one size."""

    half, last_block = 2, 2
    optimizer = staticmethod(partial(torch.optim.SGD, momentum=0.9))
    ours = staticmethod(partial(fastfreeze.SGD, momentum=0.9))

    def pretrained(self):
        with torch.random.fork_rng():  # the head alone is new
            torch.manual_seed(0)
            body = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(HEAD)]
        return nn.Sequential(*body, nn.Linear(WIDTH, WIDTH))

    def stages(self, model):
        return list(model)

    def features(self, model, x):
        return model[:-1](x)

    def head(self, model, features):
        return model[-1](features)


def toy_task(epochs=EPOCHS, seed=0):
    generator = torch.Generator().manual_seed(0)
    count = 8
    x = torch.randn(count, WIDTH, generator=generator)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    order = order.view(epochs * STEPS, -1)
    return Toy("toy", x, x.argmax(1), order, seed, lr=0.1, weights=Path(), epochs=epochs)


def first_that_trains(training):
    trains = [p.requires_grad for stage in training.model for p in list(stage.parameters())[:1]]
    assert trains == sorted(trains)
    return trains.index(True)


@pytest.mark.parametrize(
    ("name", "firsts"),
    [
        ("everything trains", 8 * [0]),
        ("layer-wise rate decay", 8 * [0]),
        ("half frozen by hand", 8 * [2]),
        ("half frozen, kept", 8 * [2]),
        ("half frozen, kept, layer-wise rate decay", 8 * [2]),
        ("half frozen, trimmed", 8 * [2]),
        ("three quarters frozen, kept", 8 * [3]),
        ("all but the head frozen, kept", 8 * [HEAD]),
        ("head only", 8 * [HEAD]),
        ("head on stored features", 8 * [HEAD]),
        ("head, then last block", 4 * [HEAD] + 4 * [2]),
        ("fastai's fine_tune", 4 * [HEAD] + 4 * [0]),
        ("fastai's fine_tune above half, kept", 4 * [HEAD] + 4 * [2]),
        ("gradual unfreezing by hand", [3, 2, 1] + 5 * [0]),
        ("gradual unfreezing, trimmed", [3, 2, 1] + 5 * [0]),
        ("half frozen, kept, then all thawed", 6 * [2] + 2 * [0]),
        ("all, then half frozen, kept", 2 * [0] + 6 * [2]),
        ("FreezeOut, not scaled, kept", None),
    ],
)
def test_what_trains_at_each_step(name, firsts):
    task = toy_task()
    training = METHODS[name].make(task)
    start = [p.detach().clone() for p in training.model.parameters()]
    found = []
    for step in range(task.total_steps):
        found.append(first_that_trains(training))
        training.step(*task.batch(step))
    assert found == (sorted(found) if firsts is None else firsts)
    moved = [not p.equal(q) for p, q in zip(start, training.model.parameters(), strict=True)]
    assert moved == [i // 2 >= min(found) for i in range(8)]


def test_a_record_has_all_that_the_answer_needs():
    task = toy_task()
    sets = {"": (task.images, task.labels), "validation_": (task.images[:3], task.labels[:3])}
    kept, hand = (
        record(METHODS[name], task, True, sets)
        for name in ("half frozen, kept", "half frozen by hand")
    )
    product = WIDTH * WIDTH  # MACs of a stage: four forward, three backward
    assert hand["macs"] == 16 * 7 * product
    assert kept["macs"] == 8 * 7 * product + 8 * 5 * product  # the second epoch's are found
    assert kept["hits"] == 8
    assert {"seconds", "error", "nll", "validation_error", "validation_nll"} <= kept.keys()
    assert kept["error"] == pytest.approx(hand["error"])


FULL, HALF, FOUND = 11, 7, 5  # products of a sample's step
ENSEMBLES = {  # the products, members, and whether they share their first half
    "snapshots": (80 * FULL, 5, False),
    "independent": (80 * FULL, 5, False),
    "one network": (80 * FULL, 1, True),
    "independent, half frozen by hand": (80 * HALF, 5, True),
    # A branch does not know before its first batch of two what is read of the kept values.
    "branches above a kept half": ((8 + 4 * 2) * HALF + (72 - 4 * 2) * FOUND, 5, True),
    "snapshots above a kept half": (8 * HALF + 72 * FOUND, 5, True),
    "one network, half frozen, kept": (8 * HALF + 72 * FOUND, 1, True),
}


@pytest.mark.parametrize("name", finetune_ensembles.METHODS)
def test_ensembles_share_a_frozen_half_that_runs_once_a_sample(name):
    products, count, shared = ENSEMBLES[name]
    trial = Trial(toy_task, Run("toy", name, 10, 0.1, 1), counted=True)
    states = finetune_ensembles.METHODS[name].make(trial)
    assert len(states) == count
    assert all(state["1.0.weight"].equal(states[0]["1.0.weight"]) for state in states) == shared
    assert len({tuple(state["3.bias"].tolist()) for state in states}) == count
    assert trial.cost["macs"] == products * WIDTH * WIDTH


def test_torchs_cycles_begin_at_the_whole_rate():
    task, rates = toy_task(10), []

    def make(task):
        training = METHODS["everything trains"].make(task)
        optimizer = training.optimizer
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return training

    finetune_ensembles.snapshots(Trial(lambda n, seed: task, Run("", "", 10, 0.1, 0), False), make)
    assert len(rates) == 40
    assert rates[::8] == pytest.approx(5 * [0.1])
    assert rates[7::8] == pytest.approx(5 * [0.05 * (1 + math.cos(math.pi * 7 / 8))])
