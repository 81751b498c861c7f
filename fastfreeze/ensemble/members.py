"""Members: how they are made, which tensors they have in common, and whether they have changed."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from types import BuiltinFunctionType, CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._pytree import tree_leaves

from fastfreeze.ensemble.graphs.trace import Attributes, NoGraphError
from fastfreeze.trimming.bits import bits, same_bits
from fastfreeze.trimming.state import HOOKS, tensors_in

# By a tensor's name, for each member: the first member that holds the same bits.
Owners = dict[str, tuple[int, ...]]
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_CODE = (type, FunctionType, BuiltinFunctionType)


class CannotCopyError(Exception):
    """A module has no copy of its own; the message says why."""


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy. Results that autograd tracks, as old weight norms keep them, become constants.

    Raises:
        CannotCopyError: an attribute cannot be copied, or its copy uses modules of the original.
    """
    held = chain.from_iterable(tensors_in(vars(m)) for m in module.modules())
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if not t.is_leaf}
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:  # of whatever kind
        reason = str(error).split("\n")[0]
        raise CannotCopyError(f"{type(error).__name__}: {reason}") from error
    originals = set(map(id, module.modules()))
    for prefix, owner in copied.named_modules():
        for name, value in vars(owner).items():
            around = [v for function in tree_leaves(value) for v in _closure(function)]
            if any(id(getattr(v, "__self__", v)) in originals for v in around):
                where = f"{prefix}.{name}".lstrip(".")
                raise CannotCopyError(f"the function in {where} would use the original's modules")
    return copied


def _closure(function: Any) -> list[Any]:
    """The values in the closure of a Python function, and in those of the functions among them."""
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
    """A module that has no tensor in common with the members ``before``.

    Raises:
        TypeError: ``model`` is neither a module nor makes one, or it cannot be copied.
        ValueError: it makes a module of tensors that an earlier member has.
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
    """What members, and the hooks on them, were at a moment.

    It keeps their tensors and memory, so that no others get their ids and addresses.

    Attributes:
        parameters: of all members.
    """

    def __init__(self, members: nn.ModuleList) -> None:
        self._members, modules = members, list(members.modules())
        self.parameters = list(members.parameters())
        self._attributes = Attributes(modules)
        self._tensors = list(tensors_in([vars(m) for m in modules]))
        self._memory = [t.detach() for t in self._tensors]
        self._states = _states(self._tensors)

    def lasts(self, members: nn.ModuleList) -> bool:
        """Whether these are the members, and unchanged; False where that cannot be told."""
        same = members is self._members and self._states is not None
        same = same and not (_has_any_global_hook() or self._attributes.changed())
        return same and _states(self._tensors) == self._states


def _states(tensors: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """Numbers that change when a tensor is written to or gets other memory; None if unknown."""
    try:
        return [(t.data_ptr(), t._version) for t in tensors]
    except RuntimeError:  # of torch.func's transforms, of inference mode, or fake
        return None


def owners_of(members: Sequence[nn.Module]) -> Owners:
    """The owners of parameters and buffers: the first members with the same bits and layout."""
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


def check_alike(members: nn.ModuleList) -> None:
    """Raise a NoGraphError that says why one graph cannot stand for all members."""
    if any(module.training for member in members for module in member.modules()):
        raise NoGraphError("a member is in training mode")
    if _has_any_global_hook():
        raise NoGraphError("every module has hooks")
    for module in members.modules():  # a graph would not call them
        if any(getattr(module, kind) for kind in HOOKS):
            raise NoGraphError(f"{type(module).__name__} has hooks")
    held = [*members.parameters(), *members.buffers()]
    if any(t.is_meta for t in held):
        raise NoGraphError("on the meta device nothing can be compared")
    if any(t.is_inference() for t in held):
        raise NoGraphError("its tensors were made in inference mode, where writes go unnoticed")
    first, *others = map(_described, members)
    for m, found in enumerate(others, 1):
        for name in [*first, *found]:
            if first.get(name) != found.get(name):
                raise NoGraphError(f"member {m} differs from the first in {name}")


def _described(member: nn.Module) -> dict[str, Any]:
    """The classes and attributes of modules by name, in a form that is equal for equal ones.

    A parameter or buffer stands there by its name, wherever an attribute holds it.
    """
    modules = list(member.named_modules(remove_duplicate=False))
    names = {id(held): name for name, held in (*modules, *_tensors(member))}
    found: dict[str, Any] = {}
    for prefix, module in modules:
        held = {"__class__": type_before_parametrizations(module), **_attributes(module)}
        for kind in ("_parameters", "_buffers"):
            held[kind] = sorted(n for n, t in vars(module)[kind].items() if t is not None)
        for name, value in held.items():
            found[f"{prefix}.{name}".lstrip(".")] = _bytes_of(value, names)
    return found


def _bytes_of(value: Any, names: Mapping[int, str]) -> Any:
    """A value's pickle, which is equal for equal values; its id if it has none."""
    file = io.BytesIO()
    try:
        _Pickler(file, names).dump(value)
    except Exception:  # of whatever kind
        return id(value)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles what attributes hold: what has a name in the member by that name, code by its id."""

    def __init__(self, file: io.BytesIO, names: Mapping[int, str]) -> None:
        super().__init__(file)
        self._names = names

    def persistent_id(self, obj: Any) -> Any:
        obj = obj() if isinstance(obj, weakref.ref) else obj
        if id(obj) in self._names:
            return self._names[id(obj)]
        if isinstance(obj, _LOCKS):
            return "a lock"
        if isinstance(obj, _CODE):
            return id(obj)
        if isinstance(obj, Tensor):
            if obj.is_inference():  # where writes go unnoticed
                return id(obj)
            form = (type(obj).__name__, str(obj.dtype), str(obj.device), obj.shape, obj.stride())
            return (*form, bits(obj).cpu().numpy().tobytes())
        return None


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that not every module has."""
    return {name: v for name, v in vars(module).items() if name not in _OF_EVERY_MODULE}


def share(members: Sequence[nn.Module]) -> Owners:
    """Let members hold parameters of the same bits in common; returns the owners of all tensors.

    A parameter that other attributes hold as well stays each member's own.
    """
    owners = owners_of(members)
    fixed = {
        id(tensor)
        for member in members
        for module in member.modules()
        if not isinstance(module, nn.RNNBase)  # whose lists torch itself renews
        for tensor in tensors_in(_attributes(module))
    }
    for name, row in owners.items():
        path, _, own = name.rpartition(".")
        for m, owner in enumerate(row):
            module = members[m].get_submodule(path)
            held = module._parameters.get(own)
            common = members[owner].get_submodule(path)._parameters.get(own)
            if held is not common and not {id(held), id(common)} & fixed:
                _put(module, own, common)
    return owners


def _put(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    module._parameters[name] = parameter
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()  # the list of parameters that its forward reads


def unshare(members: Sequence[nn.Module]) -> None:
    """Give each member parameters of its own; parameters tied within a member stay tied."""
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
    """Parameters and buffers by each of their names, also buffers that no state dict holds."""
    yield from member.named_parameters(remove_duplicate=False)
    yield from member.named_buffers(remove_duplicate=False)
