"""Layers: what freezes together, in the order in which a model runs.

:func:`split` cuts a model into layers, layer 0 nearest the input, and returns a :class:`LayerPlan`:
parameter groups for an optimizer, and a table of what freezes when and how much compute that saves.

A trace lists the modules and parameters that ran, in order. The rule in :func:`split`, or the user,
gives each parameter a home: the index of its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastfreeze.errors import warn
from fastfreeze.layers.execution import (
    Event,
    gradient_bits,
    graph_events,
    parameter_bits,
    parameter_names,
    run_events,
)
from fastfreeze.layers.frozen import frozen_by_schedule, note_plan
from fastfreeze.layers.names import LayerItem, ancestors, layers_by_name
from fastfreeze.layers.rule import layers_by_rule
from fastfreeze.schedule import Constant, Schedule, check_initial_lr
from fastfreeze.text import format_table, human_count, ranges, some


@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters that freeze together.

    Attributes:
        index: position, from 0 nearest the input to the head.
        name: name of the layer's first module with a weight, or the item of ``layers=``.
        modules: qualified names of the modules that belong to the layer entirely, without those
            inside another one of them. Modules without parameters belong where they run last; they
            are missing if the model was not traced.
        parameters: qualified names and parameters; each parameter of a model is in one layer.
        fixed: names of those that did not require a gradient at the time of the split.
        held_by: indices of later layers that hold a (shared) parameter which is also used before
            this layer: its backward runs until they are frozen too.
        forward_flops: FLOPs of the forward for the example input, None without one. What
            ``torch.utils.flop_counter`` has no formula for counts as 0.
        backward_flops: FLOPs of the backward before a schedule freezes anything: of each matrix
            product or convolution the forward's, once for each operand that needs a gradient. What
            a flash attention computes a second time does not count.
    """

    index: int
    name: str
    modules: tuple[str, ...]
    parameters: tuple[tuple[str, nn.Parameter], ...]
    fixed: frozenset[str]
    held_by: tuple[int, ...]
    forward_flops: int | None
    backward_flops: int | None

    @property
    def trainable(self) -> tuple[nn.Parameter, ...]:
        """The parameters that required a gradient at the time of the split."""
        return tuple(p for name, p in self.parameters if name not in self.fixed)

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Their qualified names."""
        return tuple(name for name, _ in self.parameters if name not in self.fixed)


@dataclass(frozen=True, eq=False, repr=False)
class LayerPlan:
    """A model's layers, and what a schedule makes of them. ``print(plan)`` shows a table.

    Attributes:
        model: the model that was split.
        layers: its layers, by index.
        schedule: as given to :func:`split`, with what it left to the plan
            (:class:`~fastfreeze.Frozen`) put in; or None.
        lr: likewise.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    schedule: Schedule | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.schedule is None:
            return
        flops = [(layer.forward_flops, layer.backward_flops) for layer in self.layers]
        costs = [f + b for f, b in flops if f is not None and b is not None] or None
        schedule = self.schedule.for_layers([layer.name for layer in self.layers], costs)
        schedule.segments(0, len(self.layers))  # raises if these are not as many as it asks for
        object.__setattr__(self, "schedule", schedule)

    def param_groups(self, no_decay: bool = False) -> list[dict[str, Any]]:
        """One parameter group for each layer that trains, in order.

        The parameters are those that the model holds now under the layers' names: ``fully_shard``
        of FSDP2 (:mod:`fastfreeze.distributed`), ``to_empty`` and ``load_state_dict(assign=True)``
        put others in the place of those that were split.

        Args:
            no_decay: two groups for a layer where it has both kinds: one of its weights, and one of
                its biases and norms (parameters of one dimension or none), with
                ``weight_decay=0``.

        Returns:
            Dicts of ``params``, ``layer_index``, ``layer_name`` and ``num_layers``, which counts
            the layers without a group too. The groups are the same whatever was frozen since the
            split, so that a checkpoint of the optimizer still fits.

        Raises:
            ValueError: the model has no parameter of some name any more.
        """
        held = dict(self.model.named_parameters())
        names = [name for layer in self.layers for name in layer.trainable_names]
        missing = [name for name in names if name not in held]
        if missing:
            raise ValueError(f"the plan's model must still hold the parameters {some(missing)}")
        note_plan((held[name] for name in names), self.schedule, self.lr)
        groups: list[dict[str, Any]] = []
        for layer in self.layers:
            params = [held[name] for name in layer.trainable_names]
            place = {
                "layer_index": layer.index,
                "layer_name": layer.name,
                "num_layers": len(self.layers),
            }
            decaying = [p for p in params if p.dim() > 1 or not no_decay]
            others = [p for p in params if p.dim() <= 1 and no_decay]
            if decaying:
                groups.append({"params": decaying, **place})
            if others:
                groups.append({"params": others, **place, "weight_decay": 0.0})
        return groups

    def backward_share(self, layer_index: int) -> float | None:
        """The layer's share of the backward FLOPs, in 0..1; None without an example input."""
        flops = self.layers[layer_index].backward_flops
        return None if flops is None else flops / max(self._flops()[1], 1)

    @property
    def backward_saving(self) -> float | None:
        """Share of the whole run's backward FLOPs that the schedule removes, in 0..1.

        A layer's backward is gone at the steps at which it, all layers before it and those in
        ``held_by`` are frozen. None without a schedule, an example input or a counted FLOP.
        """
        return self._saved_share(of_forward=False)

    @property
    def compute_saving(self) -> float | None:
        """Share of the whole run's forward and backward FLOPs that the schedule removes, in 0..1.

        The forward of frozen layers still runs. None as for :attr:`backward_saving`.
        """
        return self._saved_share(of_forward=True)

    def _flops(self) -> tuple[int, int]:
        """Of all layers, forward and backward; 0 where they are not known."""
        forward = sum(layer.forward_flops or 0 for layer in self.layers)
        return forward, sum(layer.backward_flops or 0 for layer in self.layers)

    def _saved_share(self, of_forward: bool) -> float | None:
        forward, backward = self._flops()
        if self.schedule is None or not backward:
            return None
        stages = self.schedule.frozen_layers(len(self.layers))
        ends = [start for start, _ in stages[1:]] + [self.schedule.total_steps]
        fixed = {layer.index for layer in self.layers if not layer.trainable}
        saved = 0
        for (start, scheduled), end in zip(stages, ends, strict=True):
            frozen = scheduled | fixed
            for layer in self.layers:
                if layer.index not in frozen:
                    break
                if frozen.issuperset(layer.held_by):
                    saved += (layer.backward_flops or 0) * (end - start)
        whole = backward + forward if of_forward else backward
        return saved / self.schedule.total_steps / whole

    def __repr__(self) -> str:
        return f"<LayerPlan: {type(self.model).__name__} in {len(self.layers)} layers>"

    def __str__(self) -> str:
        columns = {
            "layer": [str(layer.index) for layer in self.layers],
            "name": [layer.name for layer in self.layers],
            "modules": [self._members(layer) for layer in self.layers],
            "parameters": [
                human_count(sum(p.numel() for _, p in layer.parameters)) for layer in self.layers
            ],
        }
        if self._flops()[1]:
            shares = [self.backward_share(layer.index) or 0.0 for layer in self.layers]
            columns["backward"] = [f"{share:.1%}" for share in shares]
        if self.schedule is not None:
            columns |= self._scheduled_columns(self.schedule)
        table = format_table(list(columns), list(zip(*columns.values(), strict=True)))
        notes = []
        fixed = [layer.index for layer in self.layers if not layer.trainable]
        if fixed:  # by hand, or by an earlier training: nobody can tell afterwards
            notes.append(
                f"fixed: {ranges(fixed)}, as requires_grad was False at the split; "
                "to train them, call model.requires_grad_(True) before it"
            )
        if self.compute_saving is not None:
            notes.append(
                f"predicted saving: {self.compute_saving:.1%} of the compute, "
                f"{self.backward_saving:.1%} of the backward"
            )
        return "\n".join([table, "", *notes]) if notes else table

    def _members(self, layer: Layer) -> str:
        """The layer's modules that hold parameters, and its parameters outside of them."""
        owners = {
            m: {id(p) for p in self.model.get_submodule(m).parameters()} for m in layer.modules
        }
        covered = set().union(*owners.values())
        names = [m or layer.name for m in layer.modules if owners[m]]
        return some([*names, *(name for name, p in layer.parameters if id(p) not in covered)])

    def _scheduled_columns(self, schedule: Schedule) -> dict[str, list[str]]:
        rows = [self._scheduled_row(schedule, layer) for layer in self.layers]
        freezes, thaws, rates = (list(column) for column in zip(*rows, strict=True))
        columns = {"freezes at step": freezes}
        if set(thaws) != {"-"}:
            columns["thaws at step"] = thaws
        if self.lr is not None:
            columns["initial lr"] = rates
        return columns

    def _scheduled_row(self, schedule: Schedule, layer: Layer) -> list[str]:
        """When a layer freezes and thaws, and the rates from which it anneals, each once."""
        if not layer.trainable:
            return ["0 (fixed)", "-", "-"]
        place = layer.index, len(self.layers)
        steps = schedule.freeze_steps(*place), schedule.thaw_steps(*place)
        scales = [s.scale for s in schedule.segments(*place) if not s.frozen]
        rates = list(dict.fromkeys(f"{(self.lr or 0) * scale:.4g}" for scale in scales))
        return [some(texts) or "-" for texts in (*(list(map(str, s)) for s in steps), rates)]


def split(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    layers: Sequence[LayerItem] | None = None,
    schedule: Schedule | None = None,
    lr: float | None = None,
) -> LayerPlan:
    """Cut a model into layers that freeze together, in the order in which they run.

    The rule, which gives the granularity of FreezeOut's own models (stem; each residual, dense or
    transition block; each convolution of a VGG; head):

    1. The model is opened from the root down. ``Sequential``, ``ModuleList`` and ``ModuleDict`` are
       always opened; so are stacks, which hold a series of two or more blocks, and wrappers, which
       hold over 90% of the model's parameters. A series is one of these containers, or a module of
       blocks of one class whose forward loops over its children. A block is a module with
       submodules and two or more weights. What is not opened is a unit: a block, another composite
       module, a single module; a parameter that an opened module owns is a unit too.
    2. Units are ordered by their last use. A parameter with several uses belongs to the last.
    3. Units without a weight (norms, tokens, position embeddings) join the single module before
       them, if they read it or nothing; else they join the unit after them. A weight is a parameter
       of two or more dimensions, but not a norm's, and not one of shape (1, ...) that is not called
       ``weight``.
    4. The last layer, the head, never freezes. It holds every unit with a weight whose values no
       other such unit reads: with several outputs, the last unit before each. An auxiliary
       classifier, which runs in training mode alone, is no head: once the layers before it are
       frozen it teaches nothing, so it stays where it runs.

    A view, a copy or a ``cat`` of parameters alone is no use of them; the first use of the result
    is. The order is that of the training mode, auxiliary classifiers included, and of the eval mode
    where that runs more, as under LayerDrop. It comes from a run of the model on
    ``example_inputs``, with gradients off and single modules (norms, dropout) in eval mode; without
    them from :func:`torch.fx.symbolic_trace`. Both leave the model, its modules' attributes (lists,
    dicts and generators in them included) and random number generators as they found them.

    Parameters that do not require a gradient are fixed: they never train. A training leaves them
    so where its schedule has frozen them: call ``model.requires_grad_(True)`` before the next one.

    Args:
        model: the model, on the device of ``example_inputs``; the meta device will do.
        example_inputs: a tensor, a tuple of the model's positional arguments or a mapping of
            keyword arguments.
        layers: the layers instead of the rule's, in the order in which they freeze. Each item is a
            name, a regular expression, or a list of these. A string that is the qualified name of a
            module or parameter means that one; any other string, and any compiled pattern, is a
            regular expression that must match such a name in full. A module stands for all
            parameters inside it.
        schedule, lr: for the plan's table and predictions; ``lr`` is the learning rate at the start
            of the first cycle, before any scaling. A :class:`~fastfreeze.Frozen` gets the layer
            that it names or means: pass ``plan.schedule`` on.

    Raises:
        ValueError: a model without parameters, with sharded ones (``DTensor``), or whose order
            cannot be found; ``layers`` that name a parameter twice, miss one that requires a
            gradient, or match nothing; a schedule that is not for these layers.
        TypeError: an argument of the wrong type, a NumPy array among the inputs.

    Warns:
        FastfreezeWarning: parameters that were not used (they go to the head), parameters whose
            sharing keeps the backward of earlier layers alive, layers that an earlier run's
            schedule has left fixed, and a schedule that finds all layers but the head fixed.
    """
    _check_arguments(model, schedule, lr)
    events: list[Event] | None = None
    if example_inputs is not None:
        events, in_eval = _events(model, partial(run_events, model, example_inputs))
    elif layers is None:
        events, in_eval = _events(model, partial(graph_events, model))
    if layers is None:
        assert events is not None
        names, homes, messages = layers_by_rule(model, events, in_eval)
    else:
        names, homes, messages = layers_by_name(model, layers, traced=events is not None)
    messages += _fixed_messages(model, names, homes, schedule)
    described, sharing = _describe(model, names, homes, events, example_inputs is not None)
    for message in messages + sharing:
        warn(message)
    return LayerPlan(model, described, schedule, lr)


def _check_arguments(model: nn.Module, schedule: Schedule | None, lr: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError("model must not hold torch.jit modules: split it before scripting it")
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(f"model has uninitialised parameters ({some(lazy)}): run it once first")
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "to_local")]
    if sharded:  # a run without FSDP2's hooks would leave its state broken
        raise ValueError(f"model has sharded parameters ({some(sharded)}): split before sharding")
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model has no parameters: {type(model).__name__}")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a fastfreeze Schedule, got {type(schedule).__name__}")
    if lr is not None:
        check_initial_lr(schedule or Constant(1), lr, "lr")


def _events(
    model: nn.Module, trace: Callable[..., list[Event]]
) -> tuple[list[Event], Callable[[], list[Event]]]:
    """What runs when, in training mode, and a function that tells it of eval mode.

    Where the training mode has left out what the eval mode runs (layers dropped at random), the
    order is that of eval mode, with what only the training mode reads in its places.
    """

    @cache
    def in_eval() -> list[Event]:
        try:
            return trace(training=False)
        except ValueError:  # there may be no way to call it
            return []

    events = trace(training=True)
    read = {event.parameter for event in events}
    unread = {name for name, p in model.named_parameters() if p.requires_grad} - read
    if unread and not unread.isdisjoint(event.parameter for event in in_eval()):
        events = _in_eval_order(events, in_eval())
    return events, in_eval


def _in_eval_order(events: list[Event], in_eval: list[Event]) -> list[Event]:
    known = {event.parameter for event in in_eval}
    merged = list(in_eval)
    place = 0
    for event in (e for e in events if e.parameter is not None):
        if event.parameter in known:
            place = max(i for i, e in enumerate(merged) if e.parameter == event.parameter)
        else:
            merged.insert(place + 1, event)
            place += 1
    return merged


def _fixed_messages(
    model: nn.Module, names: list[str], homes: dict[str, int], schedule: Schedule | None
) -> list[str]:
    """Warnings for a user who may not know that layers are fixed."""
    parameters = dict(model.named_parameters())
    trained = {homes[name] for name, p in parameters.items() if p.requires_grad}
    fixed = [i for i in range(len(names)) if i not in trained]
    remedy = "to train them, call model.requires_grad_(True) before split"
    marked = set(map(id, frozen_by_schedule(parameters.values())))
    left = sorted({homes[name] for name, p in parameters.items() if id(p) in marked})
    if left:
        return [
            f"layers {ranges(left)} ({some([names[i] for i in left])}) do not train: a schedule "
            f"froze them in an earlier run on this model; {remedy}"
        ]
    all_but_the_head = list(range(len(names) - 1))
    if schedule is not None and schedule.freezes and fixed and fixed == all_but_the_head:
        return [
            f"layers {ranges(fixed)} do not train (requires_grad is False), and the schedule has "
            f"nothing to freeze. If an earlier run froze them: {remedy}"
        ]
    return []


def _describe(
    model: nn.Module,
    names: list[str],
    homes: dict[str, int],
    events: list[Event] | None,
    counted: bool,
) -> tuple[tuple[Layer, ...], list[str]]:
    """The layers with what the trace says about them, and what to warn of."""
    own = parameter_names(model)
    homes_in = {
        name: {homes[own[id(p)]] for p in module.parameters()}
        for name, module in model.named_modules()
    }
    placed = {name: min(found) for name, found in homes_in.items() if len(found) == 1}
    without_parameters: dict[str, int] = {}
    forward, backward, upstream = ([0] * len(names) for _ in range(3))
    shared = _read_in_several_modules(model, events or ())
    current = 0
    for event in events or ():
        inside = event.module in placed or event.parameter is not None
        if event.module in placed:
            current = placed[event.module]
        elif event.parameter is not None:
            current = homes[event.parameter]
        elif not homes_in[event.module]:
            without_parameters[event.module] = current
        forward[current] += event.forward_flops
        backward[current] += event.backward_flops
        upstream[current] |= event.upstream if inside else event.upstream & shared
    placed |= without_parameters
    modules = [m for m in homes_in if m in placed]
    outermost = [m for m in modules if placed[m] not in (placed.get(a) for a in ancestors(m))]
    held_by, messages = _sharing(names, homes, upstream, gradient_bits(model))
    described = []
    for i, name in enumerate(names):
        parameters = tuple((n, p) for n, p in model.named_parameters() if homes[n] == i)
        layer = Layer(
            index=i,
            name=name,
            modules=tuple(m for m in outermost if placed[m] == i),
            parameters=parameters,
            fixed=frozenset(n for n, p in parameters if not p.requires_grad),
            held_by=held_by[i],
            forward_flops=forward[i] if counted else None,
            backward_flops=backward[i] if counted else None,
        )
        described.append(layer)
    return tuple(described), messages


def _read_in_several_modules(model: nn.Module, events: Sequence[Event]) -> int:
    """Bits of the parameters that several modules read."""
    readers: dict[str, set[str]] = {}
    for event in events:
        if event.parameter is not None:
            readers.setdefault(event.parameter, set()).add(event.module)
    bits = parameter_bits(model)
    return sum(bits[name] for name, modules in readers.items() if len(modules) > 1)


def _sharing(
    names: list[str], homes: dict[str, int], upstream: list[int], bits: dict[str, int]
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Of each layer, the later layers with a parameter upstream of it; and the warnings."""
    held_by: list[tuple[int, ...]] = []
    earliest: dict[str, int] = {}
    for i, mask in enumerate(upstream):
        later = {name: home for name, home in homes.items() if home > i and mask & bits[name]}
        held_by.append(tuple(sorted(set(later.values()))))
        for name in later:
            earliest.setdefault(name, i)
    groups: dict[tuple[int, int], list[str]] = {}
    for name, i in earliest.items():
        groups.setdefault((i, homes[name]), []).append(name)
    return held_by, [
        f"layer {home} ({names[home]!r}) holds parameters that are also used before layer {i} "
        f"({names[i]!r}): {some(shared)}. Until they freeze, the backward runs down to layer {i}"
        for (i, home), shared in groups.items()
    ]
