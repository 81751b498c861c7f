"""Train faster by freezing, and get an ensemble for free."""

from fastfreeze._version import __version__
from fastfreeze.errors import BackendUnavailableError, FastfreezeWarning, SnapshotError
from fastfreeze.ops._library import backends

__all__ = [
    "BackendUnavailableError",
    "FastfreezeWarning",
    "SnapshotError",
    "__version__",
    "backends",
]
