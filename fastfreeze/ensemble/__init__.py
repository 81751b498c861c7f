"""The ensemble that snapshots make, and statistics of its predictions."""

from fastfreeze.ensemble.average import average_weights, reestimate_norms
from fastfreeze.ensemble.calibrate import TemperatureScaling, fit_temperature
from fastfreeze.ensemble.ensemble import SnapshotEnsemble
from fastfreeze.ensemble.scores import (
    EnsembleEvaluation,
    PredictionScores,
    evaluate,
    prediction_scores,
)
from fastfreeze.ensemble.selection import last_k_curve, select_members

__all__ = [
    "EnsembleEvaluation",
    "PredictionScores",
    "SnapshotEnsemble",
    "TemperatureScaling",
    "average_weights",
    "evaluate",
    "fit_temperature",
    "last_k_curve",
    "prediction_scores",
    "reestimate_norms",
    "select_members",
]
