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
from fastfreeze.graph._state import call_in_eval, in_checkpoint, requires_grad


class EvalForward:
    """Stands in for a frozen module's forward.

    Attributes:
        applied: for each call so far, whether the module was put in eval mode.
    """

    def __init__(self, module: nn.Module, outermost: CodeType) -> None:
        self._module = module
        self._forward: Callable[..., Any] = module.forward
        self._outermost = outermost
        self.applied: list[bool] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.applied.append(self._applies(args, kwargs))
        if self.applied[-1]:
            return call_in_eval(self._forward, self._module, *args, **kwargs)
        return self._forward(*args, **kwargs)

    def _applies(self, args: Any, kwargs: Any) -> bool:
        training = any(m.training for m in self._module.modules())
        if not training or requires_grad((args, kwargs)):
            return False
        if not in_checkpoint(self._outermost):
            return True
        # The checkpoint's second forward will not come past here, and must find the same modes.
        warnings.warn(
            f"a frozen {type(self._module).__name__} inside an activation checkpoint keeps "
            "its training mode; call eval() on it to freeze its norms and dropouts as well",
            FastfreezeWarning,
            stacklevel=5,
        )
        return False


@contextmanager
def frozen_in_eval(
    modules: Iterable[nn.Module], outermost: CodeType
) -> Iterator[dict[nn.Module, EvalForward]]:
    """While inside, ``modules`` and their submodules run in eval mode if no input requires grad.

    Args:
        modules: modules none of whose parameters requires grad.
        outermost: code object of the function that runs the model, for :func:`in_checkpoint`.

    Yields:
        What stands in for each module's forward.
    """
    # Those below as well: a forward may call a grandchild without calling its child.
    below = {m for module in modules for m in module.modules() if any(True for _ in m.parameters())}
    stand_ins = {module: EvalForward(module, outermost) for module in below}
    before = {module: vars(module).get("forward") for module in below}
    try:
        for module, stand_in in stand_ins.items():
            vars(module)["forward"] = stand_in
        yield stand_ins
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


@contextmanager
def replayed(stand_ins: dict[nn.Module, EvalForward]) -> Iterator[None]:
    """While inside, hooks put modules in eval mode at the same calls as ``stand_ins`` did."""
    handles: list[RemovableHandle] = []

    def follow(module: nn.Module, applied: Iterator[bool]) -> None:
        changed: list[list[nn.Module]] = []

        def enter(*_: Any) -> None:
            applies = next(applied, False)  # hooks may make a module call its children
            changed.append([m for m in module.modules() if m.training] if applies else [])
            for m in changed[-1]:
                m.training = False

        def leave(*_: Any) -> None:
            for m in changed.pop():
                m.training = True

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    for module, stand_in in stand_ins.items():
        follow(module, iter(stand_in.applied))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
