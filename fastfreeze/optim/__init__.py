"""Optimizers."""

from fastfreeze.optim.sgd import SGD

__all__ = ["SGD"]
