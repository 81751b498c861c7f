"""A data set whose random augmentation repeats: each sample has a few views, and no others."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastfreeze.checks import check_int

_VIEW, _ORDER = 0, 1  # what a seed is for


class RepeatableViews(Dataset[tuple[Any, Tensor]]):
    """``num_views`` fixed variants of each sample of a data set, one of them in each epoch.

    A data set with random augmentation gives a new item each time. Here the item of a sample and a
    view is always the same, in any process and any order: while it is made, the global random
    number generators of torch (the CPU's), numpy and Python are seeded by (seed, index, view), and
    put back after. Which view an epoch sees depends on (seed, index, epoch) alone: a sample goes
    through all of its views, in an order of its own, before one comes again.

    Args:
        dataset: map-style. Randomness of its own, from other generators than those three, does not
            repeat, and :class:`~fastfreeze.FeatureCache` will refuse it.
        num_views: >= 1; 1 for data without random augmentation, or to do without its variety.
        seed: >= 0.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> data = RepeatableViews(dataset, num_views=4)
        >>> loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=2)
        >>> for epoch in range(num_epochs):
        ...     data.set_epoch(epoch)
        ...     for (images, labels), samples in loader:
        ...         loss = criterion(cache(images, samples=samples), labels)
    """

    def __init__(self, dataset: Dataset[Any], num_views: int = 4, seed: int = 0) -> None:
        missing = [n for n in ("__getitem__", "__len__") if not hasattr(type(dataset), n)]
        if missing or isinstance(dataset, IterableDataset):
            lack = f" without {missing[0]}" if missing else ""
            raise TypeError(f"dataset must be map-style, got {type(dataset).__name__}{lack}")
        self.dataset = dataset
        check_int("num_views", num_views, minimum=1)
        check_int("seed", seed, minimum=0)
        self.num_views, self.seed = num_views, seed
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """This epoch's view of a sample.

        Returns:
            The data set's item, and int64 ``[2]``: the sample's index, >= 0, and the view.
        """
        at = range(len(self))[operator.index(index)]
        view = self.view(at)
        with _seeded(self.seed, at, view):
            item = self.dataset[at]
        return item, torch.tensor([at, view], device="cpu")

    @property
    def epoch(self) -> int:
        """The epoch whose views are drawn, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of ``epoch``, >= 0, from now on; before the loader is iterated over.

        It reaches the workers of a loader, those that stay (``persistent_workers``) too.
        """
        check_int("epoch", epoch, minimum=0)
        self._epoch.fill_(epoch)

    def view(self, index: int) -> int:
        """Which view of a sample, 0..num_views - 1, this epoch sees."""
        if self.num_views == 1:
            return 0
        turn, position = divmod(self.epoch, self.num_views)
        order = np.random.default_rng((self.seed, _ORDER, index, turn)).permutation(self.num_views)
        return int(order[position])


@contextmanager
def _seeded(seed: int, index: int, view: int) -> Iterator[None]:
    """Global generators seeded by the three numbers, and as they were on leaving."""
    words = np.random.SeedSequence((seed, _VIEW, index, view)).generate_state(6)
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(words[2:4])
        # Not torch.manual_seed: that would seed accelerators too.
        torch.default_generator.manual_seed(int(words[4]) << 32 | int(words[5]))
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
