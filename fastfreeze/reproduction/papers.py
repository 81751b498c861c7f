"""What the two papers trained, and what they report: the rows that ``reproduce`` runs.

Snapshot Ensembles: Huang et al., ICLR 2017, table 1 and section 4.2. FreezeOut: Brock et al., 2017,
the abstract, and the settings of the authors' code (github.com/ajbrock/FreezeOut, train.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastfreeze.recipes.names import EMBEDDED


@dataclass(frozen=True)
class Row:
    """One network on one data set, how long a paper trained it, and what it tells of that.

    Attributes:
        model: what the row is called.
        title: the network's name in the paper.
        network, stem_stride: as in :func:`fastfreeze.recipes.models.build_model`.
        data: as in :func:`fastfreeze.recipes.data.load_data`.
        epochs, batch_size: of each training.
        cycles: snapshots; 1 where there is no ensemble.
        errors: of Snapshot Ensembles: share of the test images, in 0..1, by column.
        time_saved: of FreezeOut: share of the training's wall-clock time, in 0..1.
        relative_loss: by how much accuracy falls, as a share of it.
        claim: the abstract's words, in short.
        The last four are None where the paper tells nothing.
    """

    model: str
    title: str
    network: str
    data: str
    epochs: int
    batch_size: int
    cycles: int
    stem_stride: int = 1
    errors: dict[str, float] | None = None
    time_saved: float | None = None
    relative_loss: float | None = None
    claim: str | None = None

    @property
    def in_paper(self) -> bool:
        """Whether the paper has this data set."""
        return self.data != EMBEDDED


SNAPSHOT_LRS = (0.1, 0.2)
SNAPSHOT_COLUMNS = ("single", "nocycle", *(f"snapshot-{lr}" for lr in SNAPSHOT_LRS))
FREEZEOUT_T_0S = (0.8, 0.5)  # the code's default, and the setting of the authors' first experiment
INITIAL_LR = 0.1  # of every training but Snapshot's second

_TITLES = {
    "resnet110": "ResNet-110",
    "resnet32-w64": "Wide ResNet-32",
    "densenet40": "DenseNet-40",
    "densenet100-24": "DenseNet-100",
    "densenet-bc-76": "DenseNet-BC, k=12, L=76",
    "wrn40-4": "WRN-40-4",
    "vgg16": "VGG-16",
}
# By data set the error in percent: single model, NoCycle, Snapshot from 0.1, from 0.2.
_TABLE_1: dict[str, dict[str, tuple[float, ...]]] = {
    "resnet110": {
        "cifar10": (5.52, 5.49, 5.73, 5.32),
        "cifar100": (28.02, 26.97, 25.55, 24.19),
        "svhn-extra": (1.96, 1.78, 1.63, 1.66),
        "tinyimagenet": (46.50, 43.69, 40.54, 39.40),
    },
    "resnet32-w64": {
        "cifar10": (5.43, 5.18, 4.41, 4.73),
        "cifar100": (23.55, 22.81, 21.26, 21.56),
        "svhn-extra": (1.90, 1.81, 1.64, 1.51),
        "tinyimagenet": (39.63, 38.64, 35.45, 32.90),
    },
    "densenet40": {
        "cifar10": (5.24, 5.20, 4.99, 4.84),
        "cifar100": (24.42, 24.63, 23.34, 21.93),
        "svhn-extra": (1.77, 1.80, 1.64, 1.73),
        "tinyimagenet": (39.09, 38.51, 37.25, 36.61),
    },
    "densenet100-24": {
        "cifar10": (3.74, 3.80, 3.57, 3.44),
        "cifar100": (19.25, 19.30, 18.12, 17.41),
    },
}
# By network what the abstract says: time saved, relative loss, and its words.
_FREEZEOUT: dict[str, tuple[float, float | None, str]] = {
    "densenet-bc-76": (0.2, 0.03, "up to 20% of the time saved, with a loss of 3% in accuracy"),
    "wrn40-4": (0.2, 0.0, "20% faster without loss of accuracy"),
    "vgg16": (0.0, None, "no improvement"),
}


def snapshot_rows() -> tuple[Row, ...]:
    """Every row of table 1 that can be run, and each network on the embedded data.

    No paper has these, so they run with the budget of CIFAR.
    """
    return tuple(
        _snapshot_row(model, data)
        for model, errors in _TABLE_1.items()
        for data in (*errors, EMBEDDED)
    )


def freezeout_rows() -> tuple[Row, ...]:
    """Every network of FreezeOut on both CIFARs, and on the embedded data."""
    datasets = ("cifar10", "cifar100", EMBEDDED)
    return tuple(_freezeout_row(model, data) for model in _FREEZEOUT for data in datasets)


def _snapshot_row(model: str, data: str) -> Row:
    dense, table = model.startswith("densenet"), _TABLE_1[model]
    if data == "tinyimagenet":
        epochs, cycles, batch_size, stem_stride = 150, 6, 64 if dense else 128, 2
    elif data == "svhn-extra":
        epochs, cycles, batch_size, stem_stride = 40, 5, 64, 1
    else:
        epochs, cycles, batch_size, stem_stride = 300 if dense else 200, 6 if dense else 5, 64, 1
    errors = None
    if data in table:
        shares = [round(percent / 100, 4) for percent in table[data]]
        errors = dict(zip(SNAPSHOT_COLUMNS, shares, strict=True))
    title = _TITLES[model]
    return Row(model, title, model, data, epochs, batch_size, cycles, stem_stride, errors=errors)


def _freezeout_row(model: str, data: str) -> Row:
    network = "vgg16-fc" if model == "vgg16" else model  # the authors' has three linear layers
    row = Row(model, _TITLES[model], network, data, epochs=100, batch_size=50, cycles=1)
    if data == EMBEDDED:
        return row
    saved, loss, claim = _FREEZEOUT[model]
    return replace(row, time_saved=saved, relative_loss=loss, claim=claim)
