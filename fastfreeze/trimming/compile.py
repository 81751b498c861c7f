"""Freezing under torch.compile: the model compiled ahead for each stage of a plan.

A compiled graph does not follow ``requires_grad`` flags: it is compiled again each time they
change, until a limit is reached and everything runs uncompiled. Here every stage has a function
with code of its own, compiled when its turn has not come yet.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastfreeze.execution import arguments
from fastfreeze.freezing import LayerPlan
from fastfreeze.text import format_table, some
from fastfreeze.trimming.compare import observe
from fastfreeze.trimming.state import copied, preserved
from fastfreeze.trimming.trimmed import TrimmedModel

_MOST_UNASKED = 8
_NUMBERS = itertools.count()
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class CompiledStage:
    """What a plan trains for a while, compiled.

    Attributes:
        steps: the steps from which on it runs, one for each time.
        frozen: indices of the layers that are frozen.
        seconds: what compiling it took, with the runs for that.
        saved_bytes: bytes that a forward keeps for its backward, for the first example.
    """

    steps: tuple[int, ...]
    frozen: frozenset[int]
    seconds: float
    saved_bytes: int


_Measured = tuple[CompiledStage, int]  # with the bytes that it would keep uncompiled


@dataclass(frozen=True)
class CompiledStages:
    """What :func:`compile_stages` has done. ``print`` shows a table.

    Attributes:
        stages: in the order in which they first run.
    """

    stages: tuple[CompiledStage, ...]

    @property
    def seconds(self) -> float:
        """What compiling took; it belongs to the time of the training."""
        return sum(stage.seconds for stage in self.stages)

    def __str__(self) -> str:
        rows = [
            (
                str(i),
                some([str(step) for step in stage.steps]),
                str(len(stage.frozen)),
                f"{stage.saved_bytes / 2**20:.1f} MiB",
                f"{stage.seconds:.1f}",
            )
            for i, stage in enumerate(self.stages)
        ]
        return format_table(["stage", "from step", "frozen layers", "kept", "seconds"], rows)


def compile_stages(
    network: TrimmedModel,
    plan: LayerPlan,
    *examples: Any,
    dynamic: bool | None = None,
    **options: Any,
) -> CompiledStages:
    """Compile the model for each stage of a plan, forward and backward, before the training.

    ``network`` then runs what was compiled for the stage that its ``requires_grad`` flags tell: the
    model with its frozen modules in eval mode, where nothing is folded. Nothing is compiled during
    the training, for inputs like the examples; others are as in any compiled function. Uncompiled
    run: a network in eval mode, a call without autograd, one with an input that requires grad. A
    call with flags that belong to no stage does too, and that is announced.

    Each stage is run on the examples, forward and backward; parameters, buffers, gradients, flags
    and random number generators are left as they were. Autocast is to be on if it will be then.

    Args:
        network: of :func:`fastfreeze.trim`.
        plan: of :func:`fastfreeze.split`, for the same model, with its schedule; without one there
            is a single stage.
        examples: at least one of what the network will be called with: a tensor, a tuple of
            positional arguments or a dict of keyword arguments; of another shape a second one.
        dynamic, options: for :func:`torch.compile`: ``backend``, ``mode``, ``options``.

    Raises:
        TypeError: an argument of another type.
        ValueError: no examples; a plan for another model; a schedule with more than 8 stages that
            was not asked for ``stages=``; a model that cannot be compiled as one graph.
        RuntimeError: a stage's compiled backward does not keep fewer bytes than that of the stage
            before, though uncompiled it does.
    """
    _check(network, plan, examples)
    calls = [arguments(f"examples[{i}]", example) for i, example in enumerate(examples)]
    options = {"dynamic": dynamic, **options}
    found: dict[tuple[bool, ...], Callable[..., Any]] = {}
    done: list[_Measured] = []
    with _as_found(network):
        for frozen, steps in _stages(plan).items():
            for layer in plan.layers:
                for parameter in layer.trainable:
                    parameter.requires_grad_(layer.index not in frozen)
            done.append(_compile(network, steps, frozen, calls, options, found))
            _check_shrunk(done[-2:])
    network.use_compiled(found)
    return CompiledStages(tuple(stage for stage, _ in done))


def _check(network: TrimmedModel, plan: LayerPlan, examples: Sequence[Any]) -> None:
    if not isinstance(network, TrimmedModel):
        raise TypeError(f"network must be a TrimmedModel, got {type(network).__name__}")
    if not isinstance(plan, LayerPlan):
        raise TypeError(f"plan must be a LayerPlan, got {type(plan).__name__}")
    if plan.model is not network.model:
        raise ValueError("plan must be of the network's model, got that of another one")
    if not examples:
        raise ValueError("examples must hold at least one input, got none")
    found = len(_stages(plan))
    if found > _MOST_UNASKED and getattr(plan.schedule, "stages", None) is None:
        how = "it stages=" if hasattr(plan.schedule, "stages") else "split fewer layers="
        raise ValueError(
            f"schedule must have at most {_MOST_UNASKED} stages to compile, got {found}: give "
            f"{how}, so that layers freeze together"
        )


def _stages(plan: LayerPlan) -> dict[frozenset[int], tuple[int, ...]]:
    """The layers frozen in each stage, in the order of the stages, and the stage's first steps."""
    never = ((0, frozenset[int]()),)
    pairs = never if plan.schedule is None else plan.schedule.frozen_layers(len(plan.layers))
    fixed = {layer.index for layer in plan.layers if not layer.trainable}
    stages: dict[frozenset[int], tuple[int, ...]] = {}
    for step, frozen in pairs:
        stages[frozen | fixed] = (*stages.get(frozen | fixed, ()), step)
    return stages


@contextmanager
def _as_found(network: TrimmedModel) -> Iterator[None]:
    """In training mode; flags and modes are put back."""
    flags = [(p, p.requires_grad) for p in network.model.parameters()]
    with preserved(network.model):
        try:
            if not network.model.training:
                network.model.train()
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _compile(
    network: TrimmedModel,
    steps: tuple[int, ...],
    frozen: frozenset[int],
    calls: Sequence[_Arguments],
    options: dict[str, Any],
    found: dict[tuple[bool, ...], Callable[..., Any]],
) -> _Measured:
    """Compile the model as it is to run now, and add it to what was ``found``."""
    start = time.perf_counter()
    network.use_compiled({})
    uncompiled = _saved_bytes(network, calls[0])
    found[network.flags()] = _function(network.model, options)
    network.use_compiled(found)
    try:
        for args, kwargs in calls:
            observe(network.model, partial(network, *args, **kwargs), backward=True)
        compiled = _saved_bytes(network, calls[0])
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"network cannot be compiled as one graph: {reason}") from error
    finally:
        network.use_compiled({})
    return CompiledStage(steps, frozen, time.perf_counter() - start, compiled), uncompiled


def _function(model: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    """The model, compiled as a function of its own: what is compiled for others does not count."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # torch.compile tells functions apart by their code.
    name = f"<fastfreeze stage {next(_NUMBERS)}>"
    code = function.__code__.replace(co_filename=name, co_name=f"stage_{next(_NUMBERS)}")
    own = FunctionType(code, globals(), code.co_name, None, function.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, **options)
    return compiled


def _saved_bytes(network: TrimmedModel, call: _Arguments) -> int:
    """Bytes of storage that a forward keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # else a node that keeps its own output is never freed

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    args, kwargs = copied(call)
    with preserved(network.model), torch.enable_grad(), hooks:
        output = network(*args, **kwargs)
    del output
    return sum(kept.values())


def _check_shrunk(latest: Sequence[_Measured]) -> None:
    """Compare a stage with the one before it, of which it freezes more."""
    if len(latest) < 2 or not latest[0][0].frozen < latest[1][0].frozen:
        return
    (before, uncompiled_before), (now, uncompiled) = latest
    if uncompiled < uncompiled_before and now.saved_bytes >= before.saved_bytes:
        raise RuntimeError(
            f"the compiled backward from step {now.steps[0]} on keeps {now.saved_bytes} bytes, not "
            f"fewer than the {before.saved_bytes} before it froze layers "
            f"{some([str(i) for i in sorted(now.frozen - before.frozen)])}"
        )
