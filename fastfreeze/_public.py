"""The public names, which ``fastfreeze`` imports when the first of them is needed."""

from fastfreeze._version import __version__
from fastfreeze.cache import CacheStats, FeatureCache
from fastfreeze.ensemble import SnapshotEnsemble
from fastfreeze.errors import BackendUnavailableError, FastfreezeWarning, SnapshotError
from fastfreeze.kernels.library import backends
from fastfreeze.kernels.softmax import (
    EnsembleAverage,
    EnsembleStatistics,
    ensemble_softmax,
    ensemble_statistics,
)
from fastfreeze.layers.blockers import BackwardBlocker, backward_blockers
from fastfreeze.layers.freeze import FreezeScheduler
from fastfreeze.layers.report import FreezeReport, FreezeRow
from fastfreeze.layers.saving import freezeout_for_saving
from fastfreeze.layers.split import Layer, LayerPlan, split
from fastfreeze.optim import SGD, Adam, AdamW
from fastfreeze.schedule import (
    Constant,
    Cosine,
    FreezeOut,
    FreezeOutCycles,
    Frozen,
    GradualUnfreezing,
    Schedule,
    SnapshotCycles,
)
from fastfreeze.snapshots import MemorySnapshots, Snapshot, SnapshotStore
from fastfreeze.trimming import TrimmedModel, trim
from fastfreeze.views import RepeatableViews

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BackendUnavailableError",
    "BackwardBlocker",
    "CacheStats",
    "Constant",
    "Cosine",
    "EnsembleAverage",
    "EnsembleStatistics",
    "FastfreezeWarning",
    "FeatureCache",
    "FreezeOut",
    "FreezeOutCycles",
    "FreezeReport",
    "FreezeRow",
    "FreezeScheduler",
    "Frozen",
    "GradualUnfreezing",
    "Layer",
    "LayerPlan",
    "MemorySnapshots",
    "RepeatableViews",
    "Schedule",
    "Snapshot",
    "SnapshotCycles",
    "SnapshotEnsemble",
    "SnapshotError",
    "SnapshotStore",
    "TrimmedModel",
    "__version__",
    "backends",
    "backward_blockers",
    "ensemble_softmax",
    "ensemble_statistics",
    "freezeout_for_saving",
    "split",
    "trim",
]
