"""Trimming without a graph: frozen modules are put in eval mode as they are called.

Autograd already leaves out what neither reads nor holds anything that requires grad, so that only
the modes of norms and dropouts are left to care for. Whether a module lies in the frozen prefix
is seen from its inputs when it is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.trim.state import call_in_eval, in_checkpoint, requires_grad


class FrozenModules:
    """Modules that are put in eval mode, with all in them, when called with nothing to train.

    Args:
        modules: modules none of whose parameters requires grad.
        outermost: code of the function that runs the model, for telling whether a call in it is
            checkpointed.
    """

    def __init__(self, modules: Iterable[nn.Module], outermost: CodeType) -> None:
        # Those below as well: a forward may call a grandchild without calling its child.
        below = {m for module in modules for m in module.modules()}
        self._stand_ins = [
            _EvalForward(module, outermost)
            for module in below
            if any(True for _ in module.parameters())
        ]

    @contextmanager
    def in_eval(self) -> Iterator[None]:
        """While inside, calls of a module with no input that requires grad are in eval mode."""
        before = [vars(s.module).get("forward") for s in self._stand_ins]
        try:
            for stand_in in self._stand_ins:
                stand_in.replace_forward()
            yield
        finally:
            for stand_in, forward in zip(self._stand_ins, before, strict=True):
                vars(stand_in.module).pop("forward", None)
                if forward is not None:
                    vars(stand_in.module)["forward"] = forward

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """While inside, hooks put modules in eval mode at the same calls as was done before."""
        handles: list[RemovableHandle] = []
        for stand_in in self._stand_ins:
            handles += _follow(stand_in.module, iter(stand_in.applied))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _EvalForward:
    """Stands in for a frozen module's forward.

    Attributes:
        applied: for each call in the latest use, whether the module was put in eval mode.
    """

    def __init__(self, module: nn.Module, outermost: CodeType) -> None:
        self.module = module
        self.applied: list[bool] = []
        self._outermost = outermost
        self._forward: Callable[..., Any]

    def replace_forward(self) -> None:
        self.applied = []
        if self.module.forward is not self:  # else the model calls itself
            self._forward = self.module.forward
            vars(self.module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.applied.append(self._applies(args, kwargs))
        if self.applied[-1]:
            return call_in_eval(self._forward, self.module, *args, **kwargs)
        return self._forward(*args, **kwargs)

    def _applies(self, args: Any, kwargs: Any) -> bool:
        training = any(m.training for m in self.module.modules())
        if not training or requires_grad((args, kwargs)):
            return False
        if not in_checkpoint(self._outermost):
            return True
        # The checkpoint's second forward will not come past here, and must find the same modes.
        warnings.warn(
            f"a frozen {type(self.module).__name__} inside an activation checkpoint keeps "
            "its training mode; call eval() on it to freeze its norms and dropouts as well",
            FastfreezeWarning,
            stacklevel=5,
        )
        return False


def _follow(module: nn.Module, applied: Iterator[bool]) -> list[RemovableHandle]:
    """Hooks that put ``module`` in eval mode at the calls for which ``applied`` is True."""
    changed: list[list[nn.Module]] = []

    def enter(*_: Any) -> None:
        applies = next(applied, False)  # hooks may make a module call its children
        changed.append([m for m in module.modules() if m.training] if applies else [])
        for m in changed[-1]:
            m.training = False

    def leave(*_: Any) -> None:
        for m in changed.pop():
            m.training = True

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
