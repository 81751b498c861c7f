"""How much of a paper's training is run, and how that is said."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from fastfreeze.recipes.rundir import Line
from fastfreeze.reproduction.papers import Row


@dataclass(frozen=True)
class Budget:
    """The length of a training beside the paper's.

    Attributes:
        epochs, images: passes over so many training images.
        paper_epochs, all_images: the same without ``scale``.
        tested, all_tested: test images, and how many there are.
        paper_data: whether the paper has a number for this data set.
    """

    epochs: int
    images: int
    paper_epochs: int
    all_images: int
    tested: int
    all_tested: int
    paper_data: bool

    @property
    def share(self) -> float:
        """Part of the paper's budget, in 0..1: images seen, over those that it would see."""
        return self.epochs * self.images / (self.paper_epochs * self.all_images)

    @property
    def comparable(self) -> bool:
        """Whether ours may be held against the paper's numbers."""
        return self.share == 1 and self.tested == self.all_tested and self.paper_data

    def __str__(self) -> str:
        whole = self.share == 1
        words = "the paper's budget" if whole else f"{100 * self.share:.2g}% of the paper's budget"
        epochs = "epoch" if self.epochs == 1 else "epochs"
        words += f": {self.epochs:,} {epochs} of {self.images:,} images"
        if self.tested < self.all_tested:
            words += f"; tested on {self.tested:,} of {self.all_tested:,} images"
        if not self.paper_data:
            words += "; the paper has no such data"
        return words if self.comparable else f"{words}; not comparable"

    def values(self) -> Line:
        """The same as plain data."""
        derived = {"share": self.share, "comparable": self.comparable, "words": str(self)}
        return {**asdict(self), **derived}


def scaled(
    row: Row, scale: float, num_images: int, num_classes: int, tested: int, all_tested: int
) -> Budget:
    """The budget of a row times ``scale``, in (0, 1]: fewer epochs, then fewer images in each.

    There are as many epochs in each cycle, at least one, and at least one image of each class. No
    epoch ends in a batch of one image, which norms cannot train on.
    """
    wanted = round(scale * row.epochs, 9)  # else 0.1 * 30 would be more than 3
    epochs = min(row.epochs, row.cycles * math.ceil(wanted / row.cycles))
    images = max(num_classes, min(num_images, round(num_images * wanted / epochs)))
    if images > row.batch_size and images % row.batch_size == 1:
        images -= 1
    return Budget(epochs, images, row.epochs, num_images, tested, all_tested, row.in_paper)
