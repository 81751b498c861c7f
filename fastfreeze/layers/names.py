"""Layers as a user lists them: names and patterns, and the parameters that they stand for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from fastfreeze.layers.execution import parameter_names
from fastfreeze.text import some

LayerPattern = str | re.Pattern[str]
LayerItem = LayerPattern | Sequence[LayerPattern]
# Names of the layers, the layer of each parameter, and what to warn of.
LayerHomes = tuple[list[str], dict[str, int], list[str]]


def layers_by_name(model: nn.Module, layers: Sequence[LayerItem], traced: bool) -> LayerHomes:
    """Layers as the user lists them."""
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise TypeError(f"layers must be a non-empty list of names or patterns, got {layers!r}")
    items = [_patterns(item) for item in layers]
    names = parameter_names(model)
    taken: dict[str, int] = {}  # under each name of a shared parameter
    homes = dict.fromkeys(names.values(), -1)
    split_up = set()
    for i, patterns in enumerate(items):
        for name in _matched_parameters(model, patterns):
            if taken.setdefault(name, i) != i:
                raise ValueError(
                    f"layers: parameter {name!r} matches two items, "
                    f"{layers[taken[name]]!r} and {layers[i]!r}"
                )
            own = names[id(model.get_parameter(name))]
            if homes[own] not in (-1, i):
                split_up.add(own)
            homes[own] = i
    missed = [name for name, i in homes.items() if i == -1]
    trained = [name for name in missed if model.get_parameter(name).requires_grad]
    if trained:
        raise ValueError(f"layers: no item matches the trainable parameters {some(trained)}")
    homes |= dict.fromkeys(missed, len(layers) - 1)
    messages = [f"shared parameters go to the last of their layers: {some(sorted(split_up))}"]
    labels = [_text(patterns[0]) for patterns in items]
    return labels, homes, messages if split_up and not traced else []


def _patterns(item: LayerItem) -> Sequence[LayerPattern]:
    patterns = [item] if isinstance(item, str | re.Pattern) else item
    is_list = isinstance(patterns, list | tuple) and bool(patterns)
    if not is_list or not all(isinstance(pattern, str | re.Pattern) for pattern in patterns):
        raise TypeError(f"layers: expected a name, a pattern or a list of these, got {item!r}")
    return patterns


def _matched_parameters(model: nn.Module, patterns: Sequence[LayerPattern]) -> list[str]:
    """Names of the parameters that patterns stand for, in the model's order."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    matched = set()
    for pattern in patterns:
        text = _text(pattern)
        names = _matching_names(pattern, [*modules, *parameters])
        if not names:
            known = difflib.get_close_matches(text, modules + parameters) or modules[1:]
            raise ValueError(f"layers: {text!r} matches no module or parameter; try {some(known)}")
        inside = {p for p in parameters if p in names or not names.isdisjoint(ancestors(p))}
        if not inside:
            raise ValueError(f"layers: {text!r} matches modules without parameters only")
        matched |= inside
    return [p for p in parameters if p in matched]


def _matching_names(pattern: LayerPattern, names: list[str]) -> set[str]:
    if isinstance(pattern, str) and pattern in names:
        return {pattern}
    try:
        return set(filter(re.compile(pattern).fullmatch, names))
    except re.error as error:
        raise ValueError(
            f"layers: {pattern!r} is no name and no regular expression: {error}"
        ) from None


def _text(pattern: LayerPattern) -> str:
    return pattern if isinstance(pattern, str) else pattern.pattern


def ancestors(name: str) -> Iterator[str]:
    """Names of the modules around a module or parameter, up to the root."""
    while name:
        name = name.rpartition(".")[0]
        yield name
