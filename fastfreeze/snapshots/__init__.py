"""Snapshots of one model, on disk and in memory."""

from fastfreeze.snapshots.format import Snapshot
from fastfreeze.snapshots.memory import MemorySnapshots
from fastfreeze.snapshots.store import SnapshotStore

__all__ = ["MemorySnapshots", "Snapshot", "SnapshotStore"]
