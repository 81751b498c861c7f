"""What frozen modules give, kept for each sample, so that they need not run again.

In a call through a cache their calls are put off (``chain``); what is read of them is found among
rows (``kept``, ``rows``, ``store``) if all that goes in, and all that the modules hold
(``digest``), is as it was.
"""

from fastfreeze.cache.cache import FeatureCache
from fastfreeze.cache.kept import CacheStats

__all__ = ["CacheStats", "FeatureCache"]
