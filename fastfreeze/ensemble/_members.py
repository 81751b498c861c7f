"""What an ensemble's members hold: in common, unlike each other, and since when."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fastfreeze.ensemble._packs import same_bits
from fastfreeze.graph._state import Held, HeldState, tensors_in
from fastfreeze.graph.trace import hooked

# For each tensor of the model, by name: the first member that holds the same bits, for each member.
Owners = dict[str, tuple[int, ...]]
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class MembersState:
    """What members held at a moment, and which hooks there were.

    Attributes:
        hooked: type of the first module with hooks; empty if there are none.
        parameters: of all members.
    """

    def __init__(self, members: nn.ModuleList) -> None:
        held = Held([members])
        self._modules, self._held = held.modules, HeldState(held)
        self.hooked = hooked(self._modules)
        self.parameters = list(members.parameters())

    def lasts(self, members: nn.ModuleList) -> bool:
        """Whether these are the members, and all is as it was."""
        same = members is self._modules[0] and self._held.lasts()
        return same and hooked(self._modules) == self.hooked


def owners_of(members: Sequence[nn.Module]) -> Owners:
    """Which members hold the same bits in the same layout, parameters and buffers alike."""
    held = [dict(_tensors(member)) for member in members]
    owners = {}
    for name in held[0]:
        row = [0]
        for m in range(1, len(held)):
            before = [o for o in sorted(set(row)) if hold_the_same(held[o][name], held[m][name])]
            row.append(before[0] if before else m)
        owners[name] = tuple(row)
    return owners


def hold_the_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or hold the same bits in the same layout on the same device."""
    if a is b:
        return True
    told = a.layout == b.layout == torch.strided and not (a.is_meta or b.is_meta)
    return told and a.stride() == b.stride() and same_bits(a, b)


def difference(members: Sequence[nn.Module]) -> str:
    """In what members differ besides parameters and buffers, in words; empty if in nothing.

    Tensors that are plain attributes count: nobody notices when they are written to.
    """
    first = list(members[0].named_modules(remove_duplicate=False))
    for m, member in enumerate(members[1:], 1):
        modules = list(member.named_modules(remove_duplicate=False))
        if [name for name, _ in modules] != [name for name, _ in first]:
            return f"member {m} has other modules than the first"
        for (name, module), (_, model) in zip(modules, first, strict=True):
            if what := _differs(module, model):
                return (
                    f"member {m} differs from the first in {'.'.join(filter(None, [name, what]))}"
                )
    return ""


def _differs(module: nn.Module, other: nn.Module) -> str:
    """The name of the first attribute in which two modules differ, or ``__class__``."""
    if type(module) is not type(other):
        return "__class__"
    for held in ("_parameters", "_buffers"):
        a, b = (
            {name for name, t in vars(m)[held].items() if t is not None} for m in (module, other)
        )
        if a != b:
            return held
    x, y = (
        {name: v for name, v in vars(m).items() if name not in _OF_EVERY_MODULE}
        for m in (module, other)
    )
    return next((n for n in x.keys() | y.keys() if not _equal(x.get(n), y.get(n))), "")


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or any(True for _ in tensors_in((a, b))):
        return False
    with suppress(Exception):  # of arrays and the like, or of what cannot be compared
        if a == b:
            return True
    with suppress(Exception):
        return pickle.dumps(a) == pickle.dumps(b)
    return False


def share(members: Sequence[nn.Module]) -> Owners:
    """Let members hold one parameter in common where they hold the same bits; their owners."""
    owners = owners_of(members)
    for name, row in owners.items():
        path, _, own = name.rpartition(".")
        for m, owner in enumerate(row):
            held = members[m].get_submodule(path)._parameters
            if own in held:
                held[own] = members[owner].get_submodule(path)._parameters[own]
    return owners


def unshare(members: Sequence[nn.Module]) -> None:
    """Give each member parameters of its own; those tied within a member stay tied."""
    seen: set[int] = set()
    for member in members:
        copies: dict[int, nn.Parameter] = {}
        for module in member.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None and id(tensor) in seen:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = nn.Parameter(tensor.detach().clone(), False)
                    module._parameters[name] = copies[id(tensor)]
        seen |= {id(p) for p in member.parameters()}


def _tensors(member: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By every name, tied ones too; buffers that no state dict holds included."""
    yield from member.named_parameters(remove_duplicate=False)
    yield from member.named_buffers(remove_duplicate=False)
