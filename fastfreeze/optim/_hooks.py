"""Hooks of an optimizer's step, and its line in a profile, free where nobody waits for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch.autograd import profiler
from torch.optim import Optimizer, optimizer

_P = ParamSpec("_P")
_T = TypeVar("_T")


def hooked_if_awaited(step: Callable[_P, _T]) -> Callable[_P, _T]:
    """The step in torch's wrapper where a hook or a profiler waits for it, bare where none does.

    The wrapper takes a fifth of a small network's step, most of it to tell no profiler.
    """
    wrapped = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def either(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        own: Any = args[0]
        awaited = (
            profiler._is_profiler_enabled
            or own._optimizer_step_pre_hooks
            or own._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
        )
        # Where a subclass has a step of its own, torch has wrapped that one.
        if awaited and hasattr(getattr(type(own).step, "__wrapped__", either), "hooked"):
            return wrapped(*args, **kwargs)
        return step(*args, **kwargs)

    either.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it
    return either
