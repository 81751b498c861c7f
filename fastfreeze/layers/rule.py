"""Layers by the rule that :func:`fastfreeze.split` documents: units, their order, what joins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from types import CodeType

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastfreeze.layers.execution import Event, parameter_bits, parameter_names
from fastfreeze.layers.names import LayerHomes
from fastfreeze.text import some


@dataclass(eq=False)
class _Unit:
    """A piece of which layers are made: a module, or a parameter that an opened module owns.

    Attributes:
        single: not a block: a norm right after it belongs to it.
        parameters: those that are used last in it.
        own: bits of those of them that nothing else reads.
        upstream: bits of the parameters on which its operations depend.
        last: place of its last event; -1 if it has none.
    """

    name: str
    weights: int
    single: bool
    parameters: list[str] = field(default_factory=list)
    own: int = 0
    upstream: int = 0
    last: int = -1


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
    last_unit = dict(by_parameter)
    users: dict[str, set[_Unit]] = {name: set() for name in by_parameter}
    depends = [event.upstream for event in events]
    for i in reversed(range(len(events) - 1)):
        if events[i].parameter is not None:  # one of several that an operation reads
            depends[i] = depends[i] or depends[i + 1]
    for i, (event, upstream) in enumerate(zip(events, depends, strict=True)):
        unit = by_module.get(event.module)
        if event.parameter is not None:
            unit = last_unit[event.parameter] = unit or by_parameter[event.parameter]
            users[event.parameter].add(unit)
        if unit is not None:
            unit.last, unit.upstream = i, unit.upstream | upstream
    unused = [name for name, unit in last_unit.items() if unit.last < 0]
    for name, bit in parameter_bits(model).items():
        if last_unit[name].last >= 0:
            last_unit[name].parameters.append(name)
            last_unit[name].own |= bit if len(users[name]) == 1 else 0
    units = sorted({unit for unit in last_unit.values() if unit.parameters}, key=lambda u: u.last)
    if not units:
        raise ValueError(f"{type(model).__name__} runs without any of its parameters")
    heads = _heads(units)
    if len(heads) > 1:
        run = {by_module.get(e.module) or by_parameter.get(e.parameter or "") for e in in_eval()}
        heads = [h for h in heads if not run or h in run or h is heads[-1]]
    groups = _grouped(units, heads)
    homes = {name: i for i, group in enumerate(groups) for u in group for name in u.parameters}
    homes |= dict.fromkeys(unused, len(groups) - 1)
    leading = [next((unit for unit in group if unit.weights), group[0]) for group in groups]
    names = [unit.name or type(model).__name__ for unit in leading]
    trained = [name for name in unused if model.get_parameter(name).requires_grad]
    message = f"parameters not used in the forward, put into the head {names[-1]!r}: "
    return names, homes, [message + some(trained)] if trained else []


def _union(bits: Iterable[int]) -> int:
    return reduce(or_, bits, 0)


def _heads(units: list[_Unit]) -> list[_Unit]:
    """Units of whose values no other unit with a weight reads any, and the last of all."""
    weighted = [unit for unit in units if unit.weights]

    def is_read(unit: _Unit) -> bool:
        return any(other.upstream & unit.own for other in weighted if other is not unit)

    return [u for u in weighted if u is weighted[-1] or (u.own and not is_read(u))]


def _grouped(units: list[_Unit], heads: list[_Unit]) -> list[list[_Unit]]:
    """Rules 3 and 4: which units make up each layer; the heads and what reads them, the last."""
    weights = _union(unit.own for unit in units if unit.weights)
    made_by_heads = _union(unit.own for unit in heads)
    groups: list[list[_Unit]] = []
    waiting: list[_Unit] = []
    last: list[_Unit] = []
    single: _Unit | None = None
    for unit in units:
        read = unit.upstream & weights
        behind = read & made_by_heads or heads[-1:] == [u for u in last if u.weights][-1:]
        if unit in heads or (behind and not unit.weights):
            last.append(unit)
        elif unit.weights:
            groups.append([*waiting, unit])
            waiting, single = [], unit if unit.single else None
        elif single and (not read or not single.own or read & single.own):
            groups[-1].append(unit)
        else:
            waiting.append(unit)
    return [*groups, [*waiting, *last]]
