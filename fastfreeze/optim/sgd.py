"""SGD: a drop-in for ``torch.optim.SGD`` that steps all groups at once and knows its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfreeze.kernels import rules
from fastfreeze.kernels.library import Backend
from fastfreeze.layers.groups import Group, check_number
from fastfreeze.optim._checks import check_numbers, check_state_dtype
from fastfreeze.optim._rule import UpdateRule
from fastfreeze.optim.fused import FusedOptimizer
from fastfreeze.schedule import Schedule


class SgdRule(UpdateRule):
    """What ``torch.optim.SGD``'s for-loop computes."""

    name = "SGD"
    required = ("momentum", "dampening", "nesterov")
    keys = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    kernel = rules.SGD
    moments = ("momentum_buffer",)

    def kept(self, group: Group) -> Sequence[str]:
        return self.moments if group["momentum"] != 0 else ()

    def values(self, group: Group) -> Mapping[str, Any]:
        # None is False, as torch takes it.
        return {**group, **{name: bool(group.get(name)) for name in ("nesterov", "maximize")}}


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum, one kernel for all parameter groups.

    Takes ``torch.optim.SGD``'s arguments and computes what its for-loop computes. With a schedule
    it also sets each group's learning rate at every step, and freezes and thaws layers: a frozen
    layer's parameters have ``requires_grad=False``, no gradient and no momentum, and are not
    touched until they thaw.

    Args:
        params: parameters, or parameter groups as dicts. A schedule that freezes needs groups with
            a ``layer_index``: ``fastfreeze.split(model).param_groups()``.
        lr: learning rate, >= 0; with a schedule each group's initial one.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        foreach, fused: accepted so that the call need not change; there is one implementation here,
            and it is fused.
        differentiable: not supported; True is refused.
        schedule: learning rates and freezing as a function of the step.
        total_steps: steps in the run; alone it means ``schedule=Cosine(total_steps)``.
        momentum_dtype: torch.float32 keeps the momentum of float16 and bfloat16 parameters in
            float32; None, as in torch, in the parameters' dtype.
        backend: what runs the step: "cuda", "triton", "cpu", "reference", or None for the fastest
            that can take each parameter. A backend given by name never gives way to another.

    A step on a CUDA device may be captured in a graph (``torch.cuda.graph``), after at least one
    step outside it with the same gradients present. Each replay then takes the next step: the
    schedule, a GradScaler's overflow and frozen layers are followed on the device, and
    ``current_step`` waits for the device. Freezing in a graph leaves the weights as they are, but
    the captured backward stays as long as it was: capture anew after a freeze, which a thaw makes
    a must, and do not replay an old graph after other steps. Without a schedule a graph keeps the
    learning rates it was captured with.

    Several threads may step one optimizer, and read its state: one after the other. Handlers of
    signals, and so Ctrl-C, wait for the end of a step: weights, momentum, rates and the step change
    together.

    Raises:
        TypeError: an argument, or a group's layer, of the wrong type.
        ValueError: a value out of its range, a schedule that freezes without layers, or parameters
            that the backend asked for cannot take.
        BackendUnavailableError: the backend asked for cannot run here.

    Warns:
        FastfreezeWarning: groups of a plan that was made for another schedule or learning rate;
            layers that start at over 10 times the rate; layers that an earlier run has frozen; in
            a step, frozen layers that require gradients again, and layers that get none since
            others froze.

    Example:
        >>> optimizer = fastfreeze.SGD(model.parameters(), lr=0.1, momentum=0.9, total_steps=10_000)
    """

    _rule = SgdRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        schedule: Schedule | None = None,
        total_steps: int | None = None,
        momentum_dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        check_numbers({"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        check_number("dampening", dampening)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening 0, got "
                f"momentum={momentum} and dampening={dampening}"
            )
        check_state_dtype("momentum_dtype", momentum_dtype)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "foreach": foreach,
                "differentiable": differentiable,
                "fused": fused,
            },
            schedule=schedule,
            total_steps=total_steps,
            state_dtype=momentum_dtype,
            backend=backend,
        )
