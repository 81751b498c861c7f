"""Layers by the rule that :func:`fastfreeze.split` documents: units, their order, what joins."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from types import CodeType

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastfreeze.execution import Event, parameter_bits, parameter_names
from fastfreeze.layer_names import LayerHomes
from fastfreeze.text import some


@dataclass(frozen=True)
class _Unit:
    """A piece of which layers are made: a module, or a parameter that an opened module owns."""

    name: str
    weights: int
    single: bool  # not a block: a norm right after it belongs to it


def _units(model: nn.Module) -> tuple[dict[str, _Unit], dict[str, _Unit]]:
    """The units by the names of the modules in them, and by the names of their parameters."""
    by_module: dict[str, _Unit] = {}
    by_parameter: dict[str, _Unit] = {}
    names = parameter_names(model)
    module_names = {id(module): name for name, module in model.named_modules()}
    total = sum(p.numel() for p in model.parameters())

    def visit(name: str, module: nn.Module) -> None:
        if _is_opened(module, total, is_root=module is model):
            for local, p in module.named_parameters(recurse=False):
                unit = _Unit(names[id(p)], int(_is_weight(module, local, p)), single=True)
                by_parameter.setdefault(unit.name, unit)
            for local, child in module.named_children():
                visit(f"{name}.{local}" if name else local, child)
        elif any(True for _ in module.parameters()):
            weights = _num_weights(module)
            unit = _Unit(name, weights, single=weights < 2 or not _is_composite(module))
            for inner in module.modules():
                by_module.setdefault(module_names[id(inner)], unit)
            for p in module.parameters():
                by_parameter.setdefault(names[id(p)], unit)

    visit("", model)
    return by_module, by_parameter


def _is_opened(module: nn.Module, total: int, is_root: bool) -> bool:
    """Whether the rule looks inside a module of a model with ``total`` elements in parameters."""
    if type(module) is nn.Sequential or isinstance(module, _LISTS) or _is_stack(module):
        return True
    if type(module).__module__.startswith("torch.nn.modules.") or is_parametrized(module):
        return False
    share = sum(p.numel() for p in module.parameters()) / total
    return is_root or (_is_composite(module) and share > 0.9)


_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_SERIES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_stack(module: nn.Module) -> bool:
    """Whether the module holds a series of two or more blocks."""
    series = (m for m in module.modules() if isinstance(m, _SERIES) or _loops_over_children(m))
    return any(sum(map(_is_block, m.children())) >= 2 for m in series)


def _loops_over_children(module: nn.Module) -> bool:
    """Whether its forward runs blocks of one class without a name for any of them."""
    if type(module) is nn.Module:  # what fx.GraphModule keeps in the place of the model's own
        return True
    held = [m for m in module.children() if any(True for _ in m.parameters())]
    if len({type(m) for m in held}) != 1 or not all(map(_is_block, held)):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    named = {name for name, _ in module.named_children()}
    return code is not None and named.isdisjoint(_names_in(code))


def _names_in(code: CodeType) -> set[str]:
    """Attributes that a function's code, and functions within it, use by name."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _is_block(module: nn.Module) -> bool:
    return _is_composite(module) and not isinstance(module, _SERIES) and _num_weights(module) >= 2


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not is_parametrized(module)


def _num_weights(module: nn.Module) -> int:
    return sum(
        _is_weight(owner, name, p)
        for owner in module.modules()
        for name, p in owner.named_parameters(recurse=False)
    )


def _is_weight(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(owner, nn.LayerNorm | nn.RMSNorm) or parameter.ndim < 2:
        return False
    return parameter.shape[0] != 1 or name == "weight"


def layers_by_rule(
    model: nn.Module, events: list[Event], in_eval: Callable[[], list[Event]]
) -> LayerHomes:
    """Layers by the rules 1 to 4 of :func:`fastfreeze.split`.

    Args:
        events: of a run in training mode.
        in_eval: gives those of a run in eval mode, empty where there is none.
    """
    by_module, by_parameter = _units(model)
    bits = parameter_bits(model)
    last_unit: dict[str, _Unit] = {}
    users: dict[str, set[_Unit]] = {}
    upstream: dict[_Unit, int] = {}
    sequence: list[_Unit] = []
    for event in events:
        unit = by_module.get(event.module)
        if event.parameter is not None:
            unit = last_unit[event.parameter] = unit or by_parameter[event.parameter]
            users.setdefault(event.parameter, set()).add(unit)
        if unit is not None:
            sequence.append(unit)
            upstream[unit] = upstream.get(unit, 0) | event.upstream
    position = {unit: i for i, (unit, _) in enumerate(itertools.groupby(sequence))}
    members: dict[_Unit, list[str]] = {}
    unused = []
    for name in parameter_names(model).values():
        unit = last_unit.get(name, by_parameter[name])
        if unit in position:
            members.setdefault(unit, []).append(name)
        else:
            unused.append(name)
    if not members:
        raise ValueError(f"{type(model).__name__} runs without any of its parameters")
    uses = {
        unit: _Uses(
            own=_union(bits[n] for n in names if len(users.get(n, ())) == 1)
            or _union(bits[n] for n in names),
            upstream=upstream[unit],
        )
        for unit, names in members.items()
    }
    groups = _merged(sorted(members, key=position.__getitem__), uses)
    if ends := _ends(groups, uses):
        run = {by_module.get(e.module) or by_parameter.get(e.parameter or "") for e in in_eval()}
        heads = [g for g in ends if not run or not run.isdisjoint(g)]
        groups = [g for g in groups if g not in heads]
        groups[-1] = [*itertools.chain(*heads), *groups[-1]]
    homes = {name: i for i, group in enumerate(groups) for u in group for name in members[u]}
    homes |= dict.fromkeys(unused, len(groups) - 1)
    leading = [next((unit for unit in group if unit.weights), group[0]) for group in groups]
    names = [unit.name or type(model).__name__ for unit in leading]
    trained = [name for name in unused if model.get_parameter(name).requires_grad]
    message = f"parameters not used in the forward, put into the head {names[-1]!r}: "
    return names, homes, [message + some(trained)] if trained else []


@dataclass(frozen=True)
class _Uses:
    """Bits of parameters.

    Attributes:
        own: of the unit, without those that are read elsewhere too, if it has others.
        upstream: on which its operations depend.
    """

    own: int
    upstream: int


def _union(bits: Iterable[int]) -> int:
    return reduce(or_, bits, 0)


def _merged(units: list[_Unit], uses: dict[_Unit, _Uses]) -> list[list[_Unit]]:
    """Rule 3: units without a weight join the single unit before them, or the unit after them."""
    groups: list[list[_Unit]] = []
    waiting: list[_Unit] = []
    weights = _union(uses[unit].own for unit in units if unit.weights)
    single: _Unit | None = None
    for unit in units:
        read = uses[unit].upstream & weights
        if unit.weights:
            groups.append([*waiting, unit])
            waiting, single = [], unit if unit.single else None
        elif single and (not read or read & uses[single].own):
            groups[-1].append(unit)
        else:
            waiting.append(unit)
    if waiting:
        groups[-1:] = [[*itertools.chain(*groups[-1:]), *waiting]]
    return groups


def _ends(groups: list[list[_Unit]], uses: dict[_Unit, _Uses]) -> list[list[_Unit]]:
    """The groups before the last of whose weighted unit no other group reads a value."""
    own = [_union(uses[u].own for u in group if u.weights) for group in groups]
    upstream = [_union(uses[u].upstream for u in group) for group in groups]
    return [
        group
        for i, group in enumerate(groups[:-1])
        if not own[i] & _union(upstream[:i] + upstream[i + 1 :])
    ]
