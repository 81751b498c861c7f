"""Snapshots on disk, the ensemble they make, and statistics of its predictions."""

from fastfreeze.ensemble._manifest import Snapshot
from fastfreeze.ensemble.averaging import Soup, average_weights, greedy_soup, reestimate_norms
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
from fastfreeze.ensemble.selection import Selection, last_k_curve, select_members
from fastfreeze.ensemble.snapshots import SnapshotStore
from fastfreeze.ensemble.ways import Measured, Way

__all__ = [
    "EnsembleEvaluation",
    "Measured",
    "MemorySnapshots",
    "PredictionScores",
    "Selection",
    "Snapshot",
    "SnapshotEnsemble",
    "SnapshotStore",
    "Soup",
    "TemperatureScaling",
    "Way",
    "adaptive_calibration_error",
    "average_weights",
    "brier_score",
    "disagreement",
    "diversity_plot",
    "error_rate",
    "evaluate",
    "expected_calibration_error",
    "fit_temperature",
    "greedy_soup",
    "last_k_curve",
    "nll",
    "reestimate_norms",
    "reliability_diagram",
    "select_members",
]
