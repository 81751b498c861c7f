"""The rewriter: what is frozen runs without autograd, in eval mode; the cut follows the flags."""

from fastfreeze.graph.cut import Cut
from fastfreeze.graph.trim import TrimmedModel, trim

__all__ = ["Cut", "TrimmedModel", "trim"]
