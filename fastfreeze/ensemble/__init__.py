"""The ensemble that snapshots make, and statistics of its predictions."""

from fastfreeze.ensemble.average import average_weights, reestimate_norms
from fastfreeze.ensemble.calibrate import TemperatureScaling, fit_temperature
from fastfreeze.ensemble.ensemble import SnapshotEnsemble
from fastfreeze.ensemble.scores import (
    EnsembleEvaluation,
    PredictionScores,
    brier_score,
    error_rate,
    evaluate,
    expected_calibration_error,
    nll,
)
from fastfreeze.ensemble.selection import last_k_curve, select_members

__all__ = [
    "EnsembleEvaluation",
    "PredictionScores",
    "SnapshotEnsemble",
    "TemperatureScaling",
    "average_weights",
    "brier_score",
    "error_rate",
    "evaluate",
    "expected_calibration_error",
    "fit_temperature",
    "last_k_curve",
    "nll",
    "reestimate_norms",
    "select_members",
]
