"""The ensemble that snapshots make, and statistics of its predictions."""

from fastfreeze.ensemble.average import Soup, average_weights, greedy_soup, reestimate_norms
from fastfreeze.ensemble.calibrate import TemperatureScaling, fit_temperature
from fastfreeze.ensemble.ensemble import SnapshotEnsemble
from fastfreeze.ensemble.evaluation import EnsembleEvaluation, PredictionScores, evaluate
from fastfreeze.ensemble.metrics import (
    adaptive_calibration_error,
    brier_score,
    disagreement,
    error_rate,
    expected_calibration_error,
    nll,
)
from fastfreeze.ensemble.plots import diversity_plot, reliability_diagram
from fastfreeze.ensemble.selection import Selection, last_k_curve, select_members
from fastfreeze.ensemble.ways import Measured, Way

__all__ = [
    "EnsembleEvaluation",
    "Measured",
    "PredictionScores",
    "Selection",
    "SnapshotEnsemble",
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
