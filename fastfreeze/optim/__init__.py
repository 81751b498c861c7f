"""Optimizers."""

from fastfreeze.optim.adam import Adam, AdamW
from fastfreeze.optim.fused import FusedOptimizer
from fastfreeze.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "FusedOptimizer"]
