"""How members are made, and what they hold: in common, unlike each other, and since when."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._pytree import tree_leaves, tree_map

from fastfreeze.ensemble.graphs.held import Held, HeldState
from fastfreeze.ensemble.graphs.trace import hooked
from fastfreeze.trimming.bits import same_bits
from fastfreeze.trimming.state import tensors_in

# For each tensor of the model, by name: the first member that holds the same bits, for each member.
Owners = dict[str, tuple[int, ...]]
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_LOCKS = (type(threading.Lock()), type(threading.RLock()))


class CannotCopyError(Exception):
    """A module has no copy of its own; the message says why."""


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy. Of results that autograd tracks, which old weight norms keep, it has the values.

    Raises:
        CannotCopyError: an attribute has no copy, or one that uses modules of the original.
    """
    held = chain.from_iterable(tensors_in(vars(m)) for m in module.modules())
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if not t.is_leaf}
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:  # of whatever kind
        reason = str(error).split("\n")[0]
        raise CannotCopyError(f"{type(error).__name__}: {reason}") from error
    if name := _uses(copied, set(map(id, module.modules()))):
        raise CannotCopyError(f"the function in {name} would use the original's modules")
    return copied


def _uses(module: nn.Module, others: set[int]) -> str:
    """The name of an attribute with a function whose closure holds one of these modules."""
    for prefix, owner in module.named_modules():
        for name, value in vars(owner).items():
            for function in tree_leaves(value):
                if any(id(getattr(v, "__self__", v)) in others for v in _closure(function)):
                    return f"{prefix}.{name}".lstrip(".")
    return ""


def _closure(function: Any) -> list[Any]:
    """What a function written in Python takes from around it, and so do the functions in that."""
    found: list[Any] = []
    functions = [function]
    for each in functions:  # which grows
        cells = getattr(each, "__closure__", None) if isinstance(each, FunctionType) else None
        held = [c.cell_contents for c in cells or () if c != CellType()]
        found += held
        functions += [v for v in held if isinstance(v, FunctionType) and v not in functions]
    return found


def new_member(
    model: nn.Module | Callable[[], nn.Module], before: Sequence[nn.Module]
) -> nn.Module:
    """A module to be a member, whose tensors no member ``before`` has.

    Raises:
        TypeError: ``model`` is no module nor makes one, or has no copy.
        ValueError: it makes a module of tensors that it gave before.
    """
    if isinstance(model, nn.Module):
        try:
            return copy_of(model)
        except CannotCopyError as error:
            raise TypeError(
                f"model cannot be copied ({error}): give a function that makes a new module, such "
                f"as its class, in its place"
            ) from error
    member = model() if callable(model) else model
    if not isinstance(member, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, or a function that makes one, got {type(member).__name__}"
        )
    taken = {id(t) for other in before for _, t in _tensors(other)}
    if shared := next((name for name, t in _tensors(member) if id(t) in taken), None):
        raise ValueError(f"model must make new tensors at each call, got {shared!r} again")
    return member


class MembersState:
    """What members held at a moment, and which hooks there were.

    Attributes:
        parameters: of all members.
    """

    def __init__(self, members: nn.ModuleList) -> None:
        held = Held([members])
        self._modules, self._held = held.modules, HeldState(held)
        self._hooked = hooked(self._modules)
        self.parameters = list(members.parameters())
        attributes = chain.from_iterable(tensors_in(_attributes(m)) for m in held.modules)
        self._written = [(t, t._version) for t in attributes if not t.is_inference()]

    def lasts(self, members: nn.ModuleList) -> bool:
        """Whether these are the members, and all is as it was."""
        same = members is self._modules[0] and self._held.lasts()
        same = same and all(t._version == version for t, version in self._written)
        return same and hooked(self._modules) == self._hooked


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

    Attributes that hold the member's own parameters and buffers again do not count, nor do those
    that are tensors of the same bits.
    """
    first = list(members[0].named_modules(remove_duplicate=False))
    names_first = {id(t): name for name, t in _tensors(members[0])}
    for m, member in enumerate(members[1:], 1):
        modules = list(member.named_modules(remove_duplicate=False))
        if [name for name, _ in modules] != [name for name, _ in first]:
            return f"member {m} has other modules than the first"
        names = {id(t): name for name, t in _tensors(member)}
        for (name, module), (_, model) in zip(modules, first, strict=True):
            if what := _differs(module, names, model, names_first):
                return (
                    f"member {m} differs from the first in {'.'.join(filter(None, [name, what]))}"
                )
    return ""


def _differs(
    module: nn.Module, names: Mapping[int, str], other: nn.Module, names_other: Mapping[int, str]
) -> str:
    """The name of the first attribute in which two modules differ, or ``__class__``."""
    if type_before_parametrizations(module) is not type_before_parametrizations(other):
        return "__class__"  # parametrized modules have a class of their own each
    for held in ("_parameters", "_buffers"):
        a, b = (
            {name for name, t in vars(m)[held].items() if t is not None} for m in (module, other)
        )
        if a != b:
            return held
    x, y = _by_name(_attributes(module), names), _by_name(_attributes(other), names_other)
    return next((n for n in x.keys() | y.keys() if not _equal(x.get(n), y.get(n))), "")


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Those that not every module has."""
    return {name: v for name, v in vars(module).items() if name not in _OF_EVERY_MODULE}


def _by_name(attributes: dict[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """With tensors that have names, and weak references to such, by these."""

    def named(value: Any) -> Any:
        value = value() if isinstance(value, weakref.ref) else value
        return names.get(id(value), value) if isinstance(value, Tensor) else value

    return {name: tree_map(named, value) for name, value in attributes.items()}


def _equal(a: Any, b: Any) -> bool:
    if a is b or (type(a) is type(b) and isinstance(a, _LOCKS)):
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        noticed = not (a.is_inference() or b.is_inference())  # when they are written to
        return noticed and type(a) is type(b) and hold_the_same(a, b)
    if type(a) is not type(b) or any(True for _ in tensors_in((a, b))):
        return False
    with suppress(Exception):  # of arrays and the like, or of what cannot be compared
        if a == b:
            return True
    with suppress(Exception):
        return pickle.dumps(a) == pickle.dumps(b)
    return False


def share(members: Sequence[nn.Module]) -> Owners:
    """Let members hold one parameter in common where they hold the same bits; their owners.

    Parameters that other attributes hold as well stay each member's own.
    """
    owners = owners_of(members)
    fixed = {i for member in members for i in held_again(member)}
    for name, row in owners.items():
        path, _, own = name.rpartition(".")
        for m, owner in enumerate(row):
            module = members[m].get_submodule(path)
            held = module._parameters.get(own)
            common = members[owner].get_submodule(path)._parameters.get(own)
            if held is not common and not {id(held), id(common)} & fixed:
                _put(module, own, common)
    return owners


def held_again(member: nn.Module) -> dict[int, str]:
    """By its id, the attribute that holds a tensor; not the lists that torch itself renews."""
    return {
        id(tensor): f"{prefix}.{name}".lstrip(".")
        for prefix, module in member.named_modules()
        if not isinstance(module, nn.RNNBase)
        for name, value in _attributes(module).items()
        for tensor in tensors_in(value)
    }


def _put(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    module._parameters[name] = parameter
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()  # the list of parameters that its forward reads


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
                    _put(module, name, copies[id(tensor)])
        seen |= {id(p) for p in member.parameters()}


def _tensors(member: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By every name, tied ones too; buffers that no state dict holds included."""
    yield from member.named_parameters(remove_duplicate=False)
    yield from member.named_buffers(remove_duplicate=False)
