"""Train faster by freezing, and get an ensemble for free."""

from fastfreeze._version import __version__
from fastfreeze.errors import BackendUnavailableError, FastfreezeWarning, SnapshotError
from fastfreeze.freezing import Layer, LayerPlan, split
from fastfreeze.ops._library import backends
from fastfreeze.optim import SGD
from fastfreeze.schedule import (
    Constant,
    Cosine,
    FreezeOut,
    FreezeOutCycles,
    Schedule,
    SnapshotCycles,
)

__all__ = [
    "SGD",
    "BackendUnavailableError",
    "Constant",
    "Cosine",
    "FastfreezeWarning",
    "FreezeOut",
    "FreezeOutCycles",
    "Layer",
    "LayerPlan",
    "Schedule",
    "SnapshotCycles",
    "SnapshotError",
    "__version__",
    "backends",
    "split",
]
