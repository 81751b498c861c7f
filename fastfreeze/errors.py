"""Warnings and errors that are this library's own; the rest are Python's."""

import sys
import warnings


class FastfreezeWarning(UserWarning):
    """Something works, but not the way it was most likely meant to."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


class SnapshotError(ValueError):
    """A snapshot file or store is damaged, altered, in use, or belongs to another model."""


def warn(message: str) -> None:
    """Warn at the line outside of this library and of torch that has led here.

    A ``with`` over something of theirs leads through ``contextlib``.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inner(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FastfreezeWarning, stacklevel=level)


def _is_inner(module: str) -> bool:
    return module.partition(".")[0] in ("fastfreeze", "torch", "contextlib")
