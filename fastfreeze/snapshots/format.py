"""The manifest of a store of snapshots, as data and as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfreeze.errors import SnapshotError
from fastfreeze.snapshots.tensors import HASH, Spec, described, dtype_name, spec_of
from fastfreeze.text import some

_FORMAT_VERSION = 3
_MAX_BYTES = 2**63 - 1  # of a tensor

# Name of each tensor, in the state dict's order: its shape and its dtype's name.
Signature = dict[str, Spec]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot, without its weights.

    Attributes:
        step: optimizer steps completed when it was taken.
        cycle: cycle whose end it marks, from 0.
        metrics: numbers by name.
        time: when it was saved, ISO 8601, UTC.
        sha256: hash of the weights: of the tensors' names and content. None in memory.
    """

    step: int
    cycle: int
    metrics: Mapping[str, float] = field(hash=False)
    time: str
    sha256: str | None = None


class Entry(NamedTuple):
    """A snapshot, and the hashes of its tensors in the order of the signature."""

    snapshot: Snapshot
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The signature of a store's model, and its snapshots by step."""

    signature: Signature
    entries: tuple[Entry, ...] = ()

    @property
    def hashes(self) -> list[str]:
        """Of all tensors, each once."""
        return list(dict.fromkeys(h for entry in self.entries for h in entry.hashes))


def signature_of(state: Mapping[str, Tensor]) -> Signature:
    return {name: spec_of(t) for name, t in state.items()}


def state_hash(signature: Signature, hashes: Sequence[str]) -> str:
    """Hash of a state dict whose tensors have these hashes."""
    return _sha256([list(signature), list(hashes)])


def check_signature(label: str, found: Signature, expected: Signature) -> None:
    """Raise a SnapshotError that names the first differences; the order does not matter."""
    missing = [repr(name) for name in expected if name not in found]
    unexpected = [repr(name) for name in found if name not in expected]
    unlike = [
        f"{name!r}: {described(found[name])}, expected {described(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "unlike": unlike}
    differences = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
    if differences:
        raise SnapshotError(f"{label} is of another model: " + "; ".join(differences))


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as JSON. A snapshot's tensors are positions in the list of all hashes."""
    hashes = manifest.hashes
    position = {h: i for i, h in enumerate(hashes)}
    content = {
        "format_version": _FORMAT_VERSION,
        "tensors": [
            {"name": name, "shape": list(shape), "dtype": dtype}
            for name, (shape, dtype) in manifest.signature.items()
        ],
        "hashes": hashes,
        "snapshots": [
            {**asdict(e.snapshot), "tensors": [position[h] for h in e.hashes]}
            for e in manifest.entries
        ],
    }
    return _json({**content, "checksum": _sha256(content)})


def parse_manifest(data: bytes) -> Manifest:
    """The manifest that :func:`manifest_bytes` has written.

    Raises:
        ValueError, RecursionError: ``data`` is something else; the message names the field.
    """
    content = json.loads(data, object_pairs_hook=_without_repeats)
    _check_type("it", content, dict)
    version = content.get("format_version")
    _check("format_version", f"be {_FORMAT_VERSION}", version == _FORMAT_VERSION, version)
    _check_fields(
        "", content, format_version=int, tensors=list, hashes=list, snapshots=list, checksum=str
    )
    checksum = content.pop("checksum")
    _check("checksum", "be that of the rest", checksum == _sha256(content), checksum)
    signature = _parsed_signature(content["tensors"])
    hashes = content["hashes"]
    for i, found in enumerate(hashes):  # which are names of files
        fits = isinstance(found, str) and HASH.fullmatch(found)
        _check(f"hashes[{i}]", "be 64 hexadecimal digits", fits, found)
    entries = tuple(
        _parsed_entry(f"snapshots[{i}]", entry, signature, hashes)
        for i, entry in enumerate(content["snapshots"])
    )
    steps = [e.snapshot.step for e in entries]
    _check("snapshots", "have steps that rise", steps == sorted(set(steps)))
    return Manifest(signature, entries)


def _parsed_signature(content: list[Any]) -> Signature:
    signature: Signature = {}
    for i, tensor in enumerate(content):
        where = f"tensors[{i}]"
        _check_fields(where, tensor, name=str, shape=list, dtype=str)
        name, shape, dtype = tensor["name"], tensor["shape"], tensor["dtype"]
        _check(f"{where}.name", "differ from the others", name not in signature, name)
        found: Any = getattr(torch, dtype, None)
        known = isinstance(found, torch.dtype) and dtype_name(found) == dtype
        _check(f"{where}.dtype", "be the name of a dtype", known, dtype)
        sizes = all(type(n) is int and n >= 0 for n in shape)
        fits = sizes and math.prod(n or 1 for n in shape) * found.itemsize <= _MAX_BYTES
        _check(f"{where}.shape", "be sizes that fit into memory", fits, shape)
        signature[name] = (tuple(shape), dtype)
    return signature


def _parsed_entry(where: str, content: Any, signature: Signature, hashes: Sequence[str]) -> Entry:
    _check_fields(
        where, content, step=int, cycle=int, metrics=dict, time=str, sha256=str, tensors=list
    )
    for name in ("step", "cycle"):
        _check(f"{where}.{name}", "be >= 0", content[name] >= 0, content[name])
    for name, value in content["metrics"].items():
        _check_type(f"{where}.metrics[{name!r}]", value, float)
    places = content.pop("tensors")
    fits = all(type(i) is int and 0 <= i < len(hashes) for i in places)
    _check(f"{where}.tensors", f"be positions among {len(hashes)} hashes", fits, places)
    own = tuple(hashes[i] for i in places)
    same = len(own) == len(signature) and content["sha256"] == state_hash(signature, own)
    _check(f"{where}.sha256", "be that of the snapshot's tensors", same, content["sha256"])
    return Entry(Snapshot(**content), own)


def _check(where: str, what: str, holds: object, *found: object) -> None:
    if not holds:
        got = "".join(f", got {reprlib.repr(value):.200}" for value in found)
        raise ValueError(f"{where} must {what}{got}")


def _check_type(where: str, value: object, kind: type) -> None:
    """JSON's types have no subclasses but bool, which is no number here."""
    _check(where, f"be of type {kind.__name__}", type(value) is kind, value)


def _check_fields(where: str, value: Any, **fields: type) -> None:
    _check_type(where, value, dict)
    same = value.keys() == fields.keys()
    _check(where or "it", f"have the fields {', '.join(fields)}", same, list(value))
    for name, kind in fields.items():
        _check_type(f"{where}.{name}".lstrip("."), value[name], kind)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    _check("an object", "name each field once", len(content) == len(pairs), [k for k, _ in pairs])
    return content


def _sha256(value: Any) -> str:
    return hashlib.sha256(_json(value)).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
