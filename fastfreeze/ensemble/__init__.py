"""Snapshots on disk, the ensemble they make, and statistics of its predictions."""

from fastfreeze.ensemble.metrics import error_rate, expected_calibration_error, nll
from fastfreeze.ensemble.predict import SnapshotEnsemble
from fastfreeze.ensemble.snapshots import Snapshot, SnapshotStore

__all__ = [
    "Snapshot",
    "SnapshotEnsemble",
    "SnapshotStore",
    "error_rate",
    "expected_calibration_error",
    "nll",
]
