"""The rewriter: what is frozen runs without autograd and in eval mode, on any model.

A model is traced once (``trace``); the graph is cut by its ``requires_grad`` flags (``cut``) and
written as a program (``rewrite``) each time they change (``graphs``). Models that cannot be traced
are trimmed module by module (``modules``). :func:`trim` is the way in. What the frozen prefix gives
can be kept for each sample (``cache``; ``kept``, ``rows``, ``store``), and what trains is compiled
ahead for each stage of a plan (``compiled``).
"""

from fastfreeze.graph.cache import CacheStats, FeatureCache
from fastfreeze.graph.compiled import CompiledStage, CompiledStages, compile_stages
from fastfreeze.graph.cut import Cut
from fastfreeze.graph.trim import TrimmedModel, trim

__all__ = [
    "CacheStats",
    "CompiledStage",
    "CompiledStages",
    "Cut",
    "FeatureCache",
    "TrimmedModel",
    "compile_stages",
    "trim",
]
