"""The methods of benchmarks.worth.finetuning on a toy network: what trains, and at what step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks.worth", reason="tests run outside the source tree")
import fastfreeze
from benchmarks.worth.finetuning import FineTask, methods
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
        body = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(HEAD)]
        return nn.Sequential(*body, nn.Linear(WIDTH, WIDTH))

    def stages(self, model):
        return list(model)

    def features(self, model, x):
        return model[:-1](x)

    def head(self, model, features):
        return model[-1](features)


def toy_task():
    generator = torch.Generator().manual_seed(0)
    count = 8
    x = torch.randn(count, WIDTH, generator=generator)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(EPOCHS)])
    order = order.view(EPOCHS * STEPS, -1)
    return Toy("toy", x, x.argmax(1), order, lr=0.1, weights=Path(), epochs=EPOCHS)


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
        ("half frozen, trimmed", 8 * [2]),
        ("three quarters frozen, kept", 8 * [3]),
        ("all but the head frozen, kept", 8 * [HEAD]),
        ("head only", 8 * [HEAD]),
        ("head on stored features", 8 * [HEAD]),
        ("head, then last block", 4 * [HEAD] + 4 * [2]),
        ("fastai's fine_tune", 4 * [HEAD] + 4 * [0]),
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
