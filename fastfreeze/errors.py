"""Warnings and errors that are this library's own; the rest are Python's."""


class FastfreezeWarning(UserWarning):
    """Something works, but not the way it was most likely meant to."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


class SnapshotError(ValueError):
    """A snapshot file or store is damaged, altered, in use, or belongs to another model."""
