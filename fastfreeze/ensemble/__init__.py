"""Snapshots on disk, the ensemble they make, and statistics of its predictions."""

from fastfreeze.ensemble.calibration import TemperatureScaling, fit_temperature
from fastfreeze.ensemble.evaluation import EnsembleEvaluation, PredictionScores, evaluate
from fastfreeze.ensemble.memory import MemorySnapshots
from fastfreeze.ensemble.metrics import (
    adaptive_calibration_error,
    brier_score,
    disagreement,
    error_rate,
    expected_calibration_error,
    nll,
)
from fastfreeze.ensemble.plots import diversity_plot, reliability_diagram
from fastfreeze.ensemble.predict import SnapshotEnsemble
from fastfreeze.ensemble.snapshots import Snapshot, SnapshotStore
from fastfreeze.ensemble.ways import Measured, Way

__all__ = [
    "EnsembleEvaluation",
    "Measured",
    "MemorySnapshots",
    "PredictionScores",
    "Snapshot",
    "SnapshotEnsemble",
    "SnapshotStore",
    "TemperatureScaling",
    "Way",
    "adaptive_calibration_error",
    "brier_score",
    "disagreement",
    "diversity_plot",
    "error_rate",
    "evaluate",
    "expected_calibration_error",
    "fit_temperature",
    "nll",
    "reliability_diagram",
]
