"""What a store of snapshots holds, as data and as JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastfreeze.ensemble._checks import check_count
from fastfreeze.ensemble._packs import Pack, dtype_name
from fastfreeze.errors import SnapshotError

_FORMAT_VERSION = 2
_HASH = re.compile("[0-9a-f]{64}")
_NAMED_AT_MOST = 3  # tensors of a kind in an error message

# Name of each tensor, in the state dict's order: its shape and its dtype's name.
Signature = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot, without its weights.

    Attributes:
        step: optimizer steps completed when it was taken.
        cycle: cycle whose end it marks, from 0.
        metrics: numbers by name.
        time: when it was saved, ISO 8601, UTC.
        sha256: hash of the weights: of the tensors' names and content. None in memory.
        schedule: what :meth:`fastfreeze.schedule.Schedule.config` tells of the schedule;
            :func:`fastfreeze.schedule.from_config` makes it again. None if none was given.
    """

    step: int
    cycle: int
    metrics: Mapping[str, float] = field(hash=False)
    time: str
    sha256: str | None = None
    schedule: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Entry:
    """A snapshot, and the hashes of its tensors in the order of the signature."""

    snapshot: Snapshot
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """All that a store holds.

    Attributes:
        signature: of the model.
        packs: files, by age.
        entries: snapshots, by step.
    """

    signature: Signature
    packs: tuple[Pack, ...] = ()
    entries: tuple[Entry, ...] = ()

    def pack_of(self) -> dict[str, Pack]:
        """Where each hash is: in the latest pack, the earlier one was damaged."""
        return {h: pack for pack in self.packs for h in pack.hashes}


def signature_of(state: Mapping[str, Tensor]) -> Signature:
    return {name: (tuple(t.shape), dtype_name(t.dtype)) for name, t in state.items()}


def signature_bytes(signature: Signature) -> int:
    """Size of the tensors."""
    return sum(
        torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        for shape, dtype in signature.values()
    )


def state_hash(signature: Signature, hashes: Sequence[str]) -> str:
    """Hash of a state dict whose tensors have these hashes."""
    return _sha256([list(signature), list(hashes)])


def check_signature(label: str, found: Signature, expected: Signature) -> None:
    """Raise a SnapshotError that names the first differences; the order does not matter."""
    missing = [repr(name) for name in expected if name not in found]
    unexpected = [repr(name) for name in found if name not in expected]
    unlike = [
        f"{name!r}: {_described(found[name])}, expected {_described(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "unlike": unlike}
    differences = [
        f"{kind}: {', '.join(names[:_NAMED_AT_MOST])}"
        + (f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else "")
        for kind, names in kinds.items()
        if names
    ]
    if differences:
        raise SnapshotError(f"{label} is of another model: " + "; ".join(differences))


def _described(spec: tuple[tuple[int, ...], str]) -> str:
    return f"{spec[1]} {list(spec[0])}"


def checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metrics[{name!r}] must be a number, got {value!r}") from error
    return numbers


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as JSON. A snapshot's tensors are positions in the list of all hashes."""
    position = {h: i for i, h in enumerate(h for p in manifest.packs for h in p.hashes)}
    content = {
        "format_version": _FORMAT_VERSION,
        "tensors": [
            {"name": name, "shape": list(shape), "dtype": dtype}
            for name, (shape, dtype) in manifest.signature.items()
        ],
        "packs": [
            {"file": p.file, "bytes": p.nbytes, "hashes": list(p.hashes)} for p in manifest.packs
        ],
        "snapshots": [
            {**asdict(e.snapshot), "tensors": [position[h] for h in e.hashes]}
            for e in manifest.entries
        ],
    }
    return _json({**content, "checksum": _sha256(content)})


def parse_manifest(data: bytes) -> Manifest:
    """What :func:`manifest_bytes` wrote; otherwise one of the errors that bad data provokes."""
    content = json.loads(data)
    if content["format_version"] != _FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {_FORMAT_VERSION}, got {content['format_version']!r}"
        )
    checksum = content.pop("checksum")
    if checksum != _sha256(content):
        raise ValueError(f"checksum must be {_sha256(content)}, got {checksum!r}: it was altered")
    signature = {t["name"]: (tuple(t["shape"]), t["dtype"]) for t in content["tensors"]}
    signature_bytes(signature)
    packs = tuple(_parse_pack(pack) for pack in content["packs"])
    hashes = [h for pack in packs for h in pack.hashes]
    entries = tuple(_parse_entry(entry, signature, hashes) for entry in content["snapshots"])
    steps = [e.snapshot.step for e in entries]
    if steps != sorted(set(steps)):
        raise ValueError(f"steps must rise, got {steps}")
    return Manifest(signature, packs, entries)


def _parse_pack(content: Any) -> Pack:
    for found in content["hashes"]:
        if not _HASH.fullmatch(found):
            raise ValueError(f"a hash must be 64 hexadecimal digits, got {found!r}")
    check_count("bytes", content["bytes"])
    pack = Pack(tuple(content["hashes"]), content["bytes"])
    if content["file"] != pack.file:  # so that a name never leads out of the directory
        raise ValueError(f"file must be {pack.file!r}, got {content['file']!r}")
    return pack


def _parse_entry(content: Any, signature: Signature, hashes: Sequence[str]) -> Entry:
    own = tuple(hashes[i] for i in content.pop("tensors"))
    snapshot = Snapshot(**content)
    check_count("step", snapshot.step)
    check_count("cycle", snapshot.cycle)
    checked_metrics(snapshot.metrics)
    if len(own) != len(signature) or snapshot.sha256 != state_hash(signature, own):
        raise ValueError(f"the sha256 of step {snapshot.step} is not that of its tensors")
    return Entry(snapshot, own)


def _sha256(value: Any) -> str:
    return hashlib.sha256(_json(value)).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
