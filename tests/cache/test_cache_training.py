"""Whole trainings with the feature cache end with the bits of those without it."""

from __future__ import annotations

import multiprocessing
import random
import time
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import fastfreeze
from fastfreeze import FeatureCache, RepeatableViews, trim
from tests.cache.cases import images, on
from tests.nets import Blocks

pytestmark = pytest.mark.usefixtures("one_thread", "small_counts")


class Augmented(Dataset):
    """Random crops and flips by all three generators."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index].roll(random.randrange(3), -1)
        return x.flip(-1) if torch.rand(()) < 0.5 else x, index % 5


def freezeout(total_steps):
    return fastfreeze.FreezeOut(total_steps, t_0=0.4, scale_lr=False)


def unfreezing(total_steps):
    every = total_steps // 4
    return fastfreeze.GradualUnfreezing(total_steps, unfreeze_every=every, warmup_steps=every)


def forty():
    """Images with labels, each with its index."""
    labels = torch.arange(40) % 5
    return [((x, label), i) for i, (x, label) in enumerate(zip(images(40), labels, strict=True))]


def training(dataset, num_epochs, use=None, workers=0, schedule=freezeout):
    """Losses and final weights of a training; ``use`` makes a cache of a network."""
    torch.manual_seed(3)
    model = Blocks()
    loader = DataLoader(
        dataset, 7, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1)
    )
    schedule = schedule(num_epochs * len(loader))
    layers = [["a"], ["b"], ["c"], ["head"]]
    plan = fastfreeze.split(model, images(2), layers=layers, schedule=schedule, lr=0.1)
    optimizer = fastfreeze.SGD(plan.param_groups(), lr=0.1, momentum=0.9, schedule=schedule)
    net = trim(model)
    cache = use and use(net)
    losses = []
    for epoch in range(num_epochs):
        if isinstance(dataset, RepeatableViews):
            dataset.set_epoch(epoch)
        for (x, labels), samples in loader:
            optimizer.zero_grad()
            output = cache(x, samples=samples) if cache else net(x)
            loss = F.cross_entropy(output, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    if cache:
        stats = cache.stats()
        cache.close()
        return losses, weights, stats
    return losses, weights, None


def assert_equal_trainings(found, expected):
    assert found[0] == expected[0]
    assert all(t.equal(expected[1][name]) for name, t in found[1].items())


@cache
def plain_training(num_epochs, schedule):
    return training(forty(), num_epochs, schedule=schedule)


TRAININGS = {  # epochs, schedule, options of the cache, and the least hits
    "FreezeOut": (10, freezeout, {"enabled": True}, 60),
    "unfreezing": (12, unfreezing, {"enabled": True}, 60),  # of what has thawed nothing is of use
    "measured": (8, freezeout, {}, 0),
    "files": (8, freezeout, {"enabled": True, "directory": "rows"}, 40),
    "small budget": (8, freezeout, {"enabled": True, "max_bytes": 30_000}, 0),
}


@pytest.mark.parametrize(
    ("epochs", "schedule", "options", "hits"), TRAININGS.values(), ids=TRAININGS
)
def test_training(epochs, schedule, options, hits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = training(forty(), epochs, partial(FeatureCache, **options), schedule=schedule)
    assert_equal_trainings(found, plain_training(epochs, schedule))
    assert found[2].hits >= hits
    assert found[2].bytes <= options.get("max_bytes", 10**6)
    if schedule is freezeout and epochs == 10:
        assert found[2].advanced > 35
        assert found[2].rows == 40


def test_training_with_views_and_workers():
    data = RepeatableViews(Augmented(images(20)), num_views=3)
    found = training(data, 12, on, workers=2)
    assert_equal_trainings(found, training(data, 12))
    assert found[2].hits + found[2].advanced > 5
    assert found[2].rows == 60


def trained_on_and_on(data, cached, ready):
    ready()
    while True:
        training(data, 8, cached)


def test_killed_in_a_training_and_begun_again(tmp_path):
    cached = partial(on, directory=tmp_path / "cache")
    context = multiprocessing.get_context("spawn")  # a fork may be unable to compute gradients
    for seconds in (0.05, 0.3):
        begun = context.Event()
        child = context.Process(target=trained_on_and_on, args=(forty(), cached, begun.set))
        child.start()
        assert begun.wait(120)
        time.sleep(seconds)
        assert child.is_alive()
        child.kill()
        child.join()
    assert_equal_trainings(training(forty(), 8, cached), plain_training(8, freezeout))
