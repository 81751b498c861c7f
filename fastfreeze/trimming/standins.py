"""Frozen modules during a call: in eval mode, with stand-ins for what can be folded."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.batchnorm import _BatchNorm

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.trimming.fold import ConvStandIn, NormStandIn
from fastfreeze.trimming.folds import Folds
from fastfreeze.trimming.operations import may_take_winograd
from fastfreeze.trimming.pending import LOCAL, Run
from fastfreeze.trimming.state import in_checkpoint

_MODELESS = ("conv", "linear", "activation", "pooling", "container", "flatten", "padding", "sparse")
_LISTS = (nn.ModuleList, nn.ModuleDict)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that have parameters, all of them frozen, and all that is in these.

    Of modules without parameters those that are nowhere else.
    """
    inside: dict[nn.Module, bool] = {}  # and whether there alone
    seen: set[tuple[int, bool]] = set()

    def visit(module: nn.Module, within: bool) -> None:
        parameters = list(module.parameters())
        own = bool(parameters) and not any(p.requires_grad for p in parameters)
        within = within or (own and not isinstance(module, _LISTS))
        if (id(module), within) in seen:
            return
        seen.add((id(module), within))
        inside[module] = inside.get(module, True) and within
        for child in module.children():
            visit(child, within)

    visit(model, False)
    return [m for m, alone in inside.items() if alone]


class Frozen:
    """A model's frozen modules under its present flags.

    Args:
        model: the model.
        fold: whether there are to be stand-ins that fold.
        folds: the model's folded weights.
        outermost: code of the function that runs the model.

    Attributes:
        modules: all that are in eval mode.
        names: of these.
        folds: whether something may gain by waiting: a norm, or a convolution of Winograd's kind.
    """

    def __init__(self, model: nn.Module, fold: bool, folds: Folds, outermost: CodeType) -> None:
        self.modules = frozen_modules(model)
        self._stand_ins: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._forwards: list[tuple[dict[str, Any], Any]] = []
        self._units: list[tuple[nn.Module, Callable[..., Any]]] = []
        for module in self.modules:
            forward: Callable[..., Any] | None = None
            own = vars(module).get("forward")
            self._forwards.append((vars(module), own))
            if fold and own is None and type(module) is nn.Conv2d:
                forward = ConvStandIn(module, folds)
            elif fold and own is None and type(module) is nn.BatchNorm2d:
                forward = NormStandIn(module)
            if _has_modes(module):
                forward = _Guard(module, forward or module.forward, self, outermost)
            if forward is not None:
                self._stand_ins.append((module, forward))
            if not isinstance(module, _LISTS):
                unit = _Unit(module, forward or module.forward)
                self._units.append((module, unit))
        self.names = {m: n for n, m in model.named_modules() if m in set(self.modules)}
        self.folds = fold and any(map(_may_fold, self.modules))
        frozen = set(self.modules)
        self._buffers = [b for m in model.modules() if m not in frozen for b in m._buffers.values()]
        self._lock = threading.Lock()
        self._users = 0
        self._was_training: list[nn.Module] = []
        self._before: list[tuple[nn.Module, Any]] = []

    def outdated(self) -> bool:
        """Whether a module has been given another forward."""
        return not self._users and any(d.get("forward") is not f for d, f in self._forwards)

    def buffers(self) -> list[Tensor]:
        """Those of modules that are not frozen."""
        return [b for b in self._buffers if b is not None]

    def waiting_tensors(self) -> list[Tensor]:
        """What convolutions and norms compute with that may wait."""
        modules = [m for m, _ in self._stand_ins if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
        own = [d for m in modules for d in (m._parameters, m._buffers)]
        return [t for d in own for t in d.values() if t is not None]

    @contextmanager
    def inside(self, run: Run | None) -> Iterator[None]:
        """For a call of the model in this thread; ``run`` None folds nothing."""
        self.enter(self._stand_ins if run is None or run.keeper is None else self._units)
        outer, LOCAL.run = LOCAL.run, run
        try:
            yield
        finally:
            LOCAL.run = outer
            self.leave()

    @contextmanager
    def as_they_were(self, module: nn.Module) -> Iterator[None]:
        """With what is in ``module`` in the mode that it had before the call."""
        own = [m for m in module.modules() if m in set(self._was_training)]
        outer, LOCAL.run = LOCAL.run, None
        _set_training(own, True)
        try:
            yield
        finally:
            _set_training(own, False)
            LOCAL.run = outer

    def enter(self, stand_ins: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> None:
        """In eval mode from now on, with these in the place of their forwards."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._was_training = [m for m in self.modules if m.training]
            _set_training(self._was_training, False)
            self._before = [(m, vars(m).get("forward")) for m, _ in stand_ins]
            for module, stand_in in stand_ins:
                vars(module)["forward"] = stand_in

    def leave(self) -> None:
        """Take back what :meth:`enter` did."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            for module, forward in self._before:
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = forward
            _set_training(self._was_training, True)
            self._was_training, self._before = [], []


class _Guard:
    """Stands in for the forward of a frozen module whose mode matters.

    In an activation checkpoint it leaves the module in its own mode: the second forward, during the
    backward, will not come past here, and must find the same modes.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        frozen: Frozen,
        outermost: CodeType,
    ) -> None:
        self._module, self._forward = module, forward
        self._frozen, self._outermost = frozen, outermost

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _may_be_checkpointed() or not in_checkpoint(self._outermost):
            return self._forward(*args, **kwargs)
        with self._frozen.as_they_were(self._module):
            if any(m.training for m in self._module.modules()):
                warnings.warn(
                    f"a frozen {type(self._module).__name__} inside an activation checkpoint keeps "
                    "its training mode; call eval() on it to freeze its norms and dropouts as well",
                    FastfreezeWarning,
                    stacklevel=3,
                )
            return self._forward(*args, **kwargs)


class _Unit:
    """Stands in for the forward of a frozen module whose calls may be put off."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        keeper = None if LOCAL.run is None else LOCAL.run.keeper
        if keeper is not None and not _may_be_checkpointed():
            result = keeper.call_module(self._module, self._forward, args, kwargs)
            if result is not NotImplemented:
                return result
        return self._forward(*args, **kwargs)


def folds_now() -> bool:
    """Whether values may wait here: in no transform of torch.func, and under no dispatch mode."""
    return peek_interpreter_stack() is None and not torch._C._len_torch_dispatch_stack()


def _may_fold(module: nn.Module) -> bool:
    """Whether something is gained where values wait for this module, or it waits for others."""
    if isinstance(module, _BatchNorm):
        return True
    return type(module) is nn.Conv2d and may_take_winograd(module)


def _has_modes(module: nn.Module) -> bool:
    """Whether what a module's own forward computes may depend on its mode."""
    *_, package, kind = ("", *type(module).__module__.split("."))
    return not (package == "modules" and kind in _MODELESS)


def _may_be_checkpointed() -> bool:
    """Whether autograd is off, or what it saves is looked after by someone."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return not torch.is_grad_enabled() or hooks is not None


def _set_training(modules: Sequence[nn.Module], mode: bool) -> None:
    for module in modules:
        vars(module)["training"] = mode
