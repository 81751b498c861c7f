"""Repeatable views: what is random in a data set, made a function of sample and view."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastfreeze import RepeatableViews


class Draws(Dataset):
    """Items that hold a draw of each generator."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        numbers = [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()]
        return torch.tensor([index, *numbers], dtype=torch.float64), index % 3


def generator_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def by_sample(loader):
    """Items by sample of one pass over a loader."""
    return {
        tuple(sample.tolist()): tuple(item.tolist())
        for (items, labels), samples in loader
        for item, label, sample in zip(items, labels, samples, strict=True)
        if label == sample[0] % 3
    }


def test_a_view_is_always_the_same_and_generators_are_put_back():
    data = RepeatableViews(Draws(5), num_views=3, seed=7)
    seen = {}
    for epoch in [*range(6), 2, 0]:
        data.set_epoch(epoch)
        for index in torch.randperm(5).tolist():
            random.random(), np.random.rand(), torch.rand(())
            before = generator_states()
            (item, label), sample = data[index]
            assert generator_states() == before
            assert sample.dtype == torch.int64
            assert sample.tolist() == [index, data.view(index)]
            assert label == index % 3
            expected = seen.setdefault(tuple(sample.tolist()), item)
            assert torch.equal(item, expected)
            assert torch.equal(data[np.int64(index - 5)][0][0], item)  # the same sample
    draws = torch.stack(list(seen.values()))[:, 1:]
    assert len(seen) == 15
    assert all(len(set(column)) == 15 for column in draws.T.tolist())
    other = RepeatableViews(Draws(5), num_views=3, seed=8)
    assert not torch.equal(other[3][0][0][1:], data[3][0][0][1:])
    assert [other.view(i) for i in range(5)] != [data.view(i) for i in range(5)]
    with pytest.raises(IndexError):
        data[5]
    for bad, error in ((-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="epoch must be"):
            data.set_epoch(bad)
    assert data.epoch == 0


@pytest.mark.parametrize("num_views", [1, 2, 5])
def test_a_sample_goes_through_all_views_before_one_repeats(num_views):
    data = RepeatableViews(Draws(40), num_views=num_views, seed=3)
    views = []
    for epoch in range(3 * num_views):
        data.set_epoch(epoch)
        views.append([data.view(i) for i in range(40)])
    for turn in range(3):
        rounds = np.array(views[turn * num_views : (turn + 1) * num_views])
        assert (np.sort(rounds, axis=0) == np.arange(num_views)[:, None]).all()
    if num_views > 1:
        assert len({tuple(v) for v in np.array(views).T}) > 5  # orders of their own


@pytest.mark.parametrize("context", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_epochs_reach_workers_that_stay(context):
    data = RepeatableViews(Draws(11), num_views=2)
    workers = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": context}
    loader = DataLoader(data, batch_size=3, shuffle=True, **(workers if context else {}))
    for epoch in (0, 1, 5):
        data.set_epoch(epoch)
        found = by_sample(loader)
        expected = {}
        for i in range(11):
            (item, _), sample = data[i]
            expected[tuple(sample.tolist())] = tuple(item.tolist())
        assert found == expected


class Broken(Draws):
    def __getitem__(self, index):
        torch.rand(3)
        raise OSError("no such image")


def test_generators_are_put_back_after_an_error():
    before = generator_states()
    with pytest.raises(OSError, match="no such image"):
        RepeatableViews(Broken(2))[0]
    assert generator_states() == before


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset": Stream()}, TypeError, "dataset must be map-style, got Stream"),
        ({"dataset": 3}, TypeError, "dataset must be map-style, got int without __getitem__"),
        ({"num_views": 0}, ValueError, "num_views must be >= 1, got 0"),
        ({"num_views": 2.0}, TypeError, "num_views must be an int >= 1, got 2.0"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        RepeatableViews(**{"dataset": Draws(2), **arguments})
