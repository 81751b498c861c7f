"""Frozen modules during a call: in eval mode, some with another forward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import groupby
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm

from fastfreeze.errors import warn
from fastfreeze.trimming.fold import may_fold
from fastfreeze.trimming.operations import may_take_winograd
from fastfreeze.trimming.pending import LOCAL, Run, settled
from fastfreeze.trimming.state import is_run_again

_MODELESS = ("conv", "linear", "activation", "pooling", "container", "flatten", "padding", "sparse")
_LISTS = (nn.ModuleList, nn.ModuleDict)
# Values in a module's inputs from which on a pass over them takes longer than to see a function;
# half as many where Winograd's algorithm saves more than passes.
LARGE = 2**20


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
    """A model's frozen modules under the flags that it has now, and as it is built now.

    Args:
        model: the model.
        fold: whether what they compute with may be folded.
        outermost: code of the function that runs the model.

    Attributes:
        modules: all that are in eval mode.
        names: of these.
        folds: whether waiting may pay in one of them.
    """

    def __init__(self, model: nn.Module, fold: bool, outermost: CodeType) -> None:
        modules = list(model.modules())
        self._children = [m._modules for m in modules]
        self._parameters = [m._parameters for m in modules]
        self._flags = self._read_flags()
        self.modules = frozen_modules(model)
        frozen = set(self.modules)
        self.names = {m: n for n, m in model.named_modules() if m in frozen}
        self.folds = fold and any(map(_may_fold, self.modules))
        self._own = [vars(m) for m in self.modules]
        self._kinds = set(map(type, self.modules))
        self._forwards = self._read_forwards()
        compiled: list[StandIn] = [_Compiled(m) for m in modules if _is_compiled(m)]
        units = [_Unit(m, self, outermost) for m in self.modules if not isinstance(m, _LISTS)]
        chains = [_Chain(m, frozen) for m in modules if m not in frozen and _is_chain(m)]
        self._guards = [*compiled, *[u for u in units if u.has_modes or u.watches]]
        self._guards += [c for c in chains if self.folds and c.least is not None]
        self._units = [*compiled, *units]
        self._held = [d for m in self.modules for d in (m._parameters, m._buffers) if d]
        self._buffers = [m._buffers for m in modules if m not in frozen]
        self._lock = threading.Lock()
        self._users = 0
        self._was_training: list[nn.Module] = []
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def outdated(self) -> bool:
        """Whether flags or modules are others now, or forwards of these or of their classes."""
        if self._read_flags() != self._flags:
            return True
        return not self._users and self._read_forwards() != self._forwards

    def _read_flags(self) -> Any:
        """What modules there are, and whether each parameter requires grad, or is None."""
        children = [m for d in self._children for m in d.values()]
        flags = [p is None or p.requires_grad for d in self._parameters for p in d.values()]
        return children, flags

    def _read_forwards(self) -> Any:
        """Those that modules have of their own, their classes, and what these have."""
        own = [d.get("forward") for d in self._own]
        of_kinds = [getattr(kind, "forward", None) for kind in self._kinds]  # not TorchScript's
        return own, list(map(type, self.modules)), of_kinds

    def known(self) -> set[int]:
        """Ids of the tensors that folded weights may be made of now."""
        return {id(t) for d in self._held for t in d.values() if may_fold(t)}

    def buffers(self) -> list[Tensor]:
        """Those of modules that are not frozen."""
        return [b for d in self._buffers for b in d.values() if b is not None]

    @contextmanager
    def inside(self, run: Run | None) -> Iterator[None]:
        """For a call of the model in this thread; ``run`` None folds nothing."""
        self.enter(self._guards if run is None or run.keeper is None else self._units)
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
        _set_training(own, True)
        try:
            yield
        finally:
            _set_training(own, False)

    def enter(self, stand_ins: Sequence[StandIn]) -> None:
        """In eval mode from now on, with these in their places."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._was_training = [m for m in self.modules if m.training]
            _set_training(self._was_training, False)
            self._before = [(vars(s.module), s.name, vars(s.module).get(s.name)) for s in stand_ins]
            for stand_in in stand_ins:
                vars(stand_in.module)[stand_in.name] = stand_in

    def leave(self) -> None:
        """Take back what :meth:`enter` did."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            for own, name, before in self._before:
                if before is None:
                    own.pop(name, None)
                else:
                    own[name] = before
            _set_training(self._was_training, True)
            self._was_training, self._before = [], []


class StandIn:
    """Stands in for a module's forward; a copy of the module has its own.

    Attributes:
        name: of the attribute that it stands in for.
    """

    name = "forward"

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self.module), self.module)
        return type(twin).forward.__get__(twin)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")


class _Compiled(StandIn):
    """Stands in for what torch.compile has made of a module: it gets plain tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.name = "forward" if isinstance(module, OptimizedModule) else "_compiled_call_impl"
        super().__init__(module, vars(module)[self.name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if LOCAL.run is not None:
            LOCAL.run.close()
        return self._forward(*settled(args), **settled(kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)


class _Chain(StandIn):
    """Stands in for the forward of a Sequential: what is frozen in a row is watched as one."""

    def __init__(self, module: nn.Module, frozen: set[nn.Module]) -> None:
        super().__init__(module, module.forward)
        self._quiet = {
            m for m in module.children() if m in frozen or next(m.parameters(), None) is None
        }
        self.least = _least(self._quiet)

    def __call__(self, input: Any) -> Any:
        for quiet, modules in groupby(self.module.children(), self._quiet.__contains__):
            with ExitStack() as stack:
                for module in modules:
                    if quiet:
                        stack.enter_context(_watched(self.least, input))
                    input = module(input)
        return input


class _Unit(StandIn):
    """Stands in for the forward of a frozen module, whose calls may be put off.

    In an activation checkpoint, or a custom autograd function, it leaves a module whose mode
    matters in its own mode: a second forward, during the backward, will not come past here, and
    must find the same modes.
    """

    def __init__(self, module: nn.Module, frozen: Frozen, outermost: CodeType) -> None:
        super().__init__(module, module.forward)
        self.has_modes = _has_modes(module)
        self._least = _least([module]) if frozen.folds else None
        self.watches = self._least is not None and any(True for _ in module.children())
        self._frozen, self._outermost = frozen, outermost

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = LOCAL.run
        if _may_be_checkpointed():
            if self.has_modes and is_run_again(self._outermost):
                return self._in_its_mode(args, kwargs)
        elif run is not None and run.keeper is not None:
            with torch._C.DisableTorchFunction():  # what it looks at is not the model's
                result = run.keeper.call_module(self.module, self._seen, args, kwargs)
            if result is not NotImplemented:
                return result
        if self.watches:
            with _watched(self._least, *args, *kwargs.values()):
                return self._forward(*args, **kwargs)
        return self._forward(*args, **kwargs)

    def _in_its_mode(self, args: Any, kwargs: Any) -> Any:
        with self._frozen.as_they_were(self.module):
            if any(m.training for m in self.module.modules()):
                warn(
                    f"a frozen {type(self.module).__name__} inside an activation checkpoint or "
                    "a custom autograd function keeps its training mode; call eval() on it to "
                    "freeze its norms and dropouts as well"
                )
            return self._forward(*args, **kwargs)

    def _seen(self, *args: Any, **kwargs: Any) -> Any:
        # A keeper settles what this gives: it looks at what the module does, not at folding.
        with (
            torch._C._EnableTorchFunction(),
            _watched(self._least, *args, *kwargs.values(), closing=False),
        ):
            return self._forward(*args, **kwargs)


def _watched(least: int | None, *args: Any, closing: bool = True) -> AbstractContextManager[None]:
    """A context in which functions wait, if ``args`` hold ``least`` values that require no grad.

    It changes nothing inside another one.
    """
    run = LOCAL.run
    if least is None or run is None or run.watches or not run.may_watch:
        return nullcontext()
    if torch.compiler.is_compiling():
        return nullcontext()
    flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,))]
    elements = sum([t.numel() for t in flat if isinstance(t, Tensor) and not t.requires_grad])
    return run.watch(closing) if elements >= least else nullcontext()


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def _least(modules: Iterable[nn.Module]) -> int | None:
    """How many values inputs must hold for waiting to pay in these modules; None: it never does."""
    inside = [m for module in modules for m in module.modules() if _may_fold(m)]
    if not inside:
        return None
    return LARGE if all(isinstance(m, _BatchNorm) for m in inside) else LARGE // 2


def _is_chain(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain and "forward" not in vars(module)


def _may_fold(module: nn.Module) -> bool:
    """Whether a module is a norm, or a convolution for Winograd's algorithm: waiting may pay."""
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
        if "training" in vars(module):
            vars(module)["training"] = mode
        else:  # in TorchScript
            module.training = mode
