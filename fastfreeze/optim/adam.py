"""Adam and AdamW: drop-ins for torch's that step all groups at once and know their schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastfreeze.kernels import rules
from fastfreeze.kernels.library import Backend
from fastfreeze.layers.groups import Group, check_number
from fastfreeze.optim._checks import check_numbers, check_state_dtype
from fastfreeze.optim._rule import UpdateRule
from fastfreeze.optim.fused import FusedOptimizer
from fastfreeze.schedule import Schedule


class AdamRule(UpdateRule):
    """What ``torch.optim.Adam``'s for-loop computes."""

    name = "Adam"
    required = ("betas", "eps", "amsgrad")
    keys = ("betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
    kernel = rules.ADAM
    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    together = ("exp_avg", "exp_avg_sq")
    counter = "step"

    def kept(self, group: Group) -> Sequence[str]:
        return self.moments[: 3 if group["amsgrad"] else 2]

    def values(self, group: Group) -> Mapping[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            **group,
            "beta1": beta1,
            "beta2": beta2,
            "decoupled": bool(group["decoupled_weight_decay"]),
            "maximize": bool(group["maximize"]),  # None is False, as torch takes it
            "amsgrad": bool(group["amsgrad"]),
        }


class AdamWRule(AdamRule):
    """What ``torch.optim.AdamW``'s for-loop computes."""

    name = "AdamW"


class Adam(FusedOptimizer):
    """Adam, one kernel for all parameter groups.

    Takes ``torch.optim.Adam``'s arguments and computes what its for-loop computes. With a schedule
    it also sets each group's learning rate at every step, and freezes and thaws layers, as
    :class:`fastfreeze.SGD` does: a layer that thaws starts with moments of 0 and from step 0.
    Captured graphs, threads and signals are as told there.

    Each parameter's ``step`` counts the steps that have updated it, as in torch: not those without
    a gradient, while it was frozen, or where a GradScaler has found an overflow. Its tensor lies on
    the parameter's device, or on the CPU where the reference steps the parameter.

    Args:
        params: parameters, or parameter groups as dicts. A schedule that freezes needs groups with
            a ``layer_index``: ``fastfreeze.split(model).param_groups()``.
        lr: learning rate, >= 0; with a schedule each group's initial one.
        betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in
            ``torch.optim.Adam``.
        foreach, fused, capturable: accepted so that the call need not change; there is one
            implementation here, which is fused and can be captured.
        differentiable: not supported; True is refused.
        schedule: learning rates and freezing as a function of the step.
        total_steps: steps in the run; alone it means ``schedule=Cosine(total_steps)``.
        state_dtype: torch.float32 keeps the moments of float16 and bfloat16 parameters in float32;
            None, as in torch, in the parameters' dtype.
        backend: what runs the step: "cuda", "triton", "cpu", "reference", or None for the fastest
            that can take each parameter. A backend given by name never gives way to another.

    Raises:
        TypeError: an argument, or a group's layer, of the wrong type.
        ValueError: a value out of its range, a schedule that freezes without layers, or parameters
            that the backend asked for cannot take.
        RuntimeError: in a step, a sparse gradient.
        BackendUnavailableError: the backend asked for cannot run here.

    Warns:
        FastfreezeWarning: as :class:`fastfreeze.SGD`.

    Example:
        >>> optimizer = fastfreeze.Adam(model.parameters(), lr=1e-3, total_steps=10_000)
    """

    _rule: ClassVar[AdamRule] = AdamRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        schedule: Schedule | None = None,
        total_steps: int | None = None,
        state_dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        check_numbers({"lr": lr, "eps": eps, "weight_decay": weight_decay})
        _check_betas(betas)
        check_state_dtype("state_dtype", state_dtype)
        for name, value in (("lr", lr), ("betas[0]", betas[0])):
            if foreach and not capturable and isinstance(value, Tensor):  # as torch has it
                raise ValueError(
                    f"{name} as a Tensor is not supported for capturable=False and foreach=True"
                )
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            schedule=schedule,
            total_steps=total_steps,
            state_dtype=state_dtype,
            backend=backend,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay, one kernel for all parameter groups.

    Takes ``torch.optim.AdamW``'s arguments and computes what its for-loop computes. Else it is as
    :class:`fastfreeze.Adam`.

    Args:
        params: parameters, or parameter groups as dicts. A schedule that freezes needs groups with
            a ``layer_index``: ``fastfreeze.split(model).param_groups()``.
        lr: learning rate, >= 0; with a schedule each group's initial one.
        betas, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.AdamW``.
        foreach, fused, capturable: accepted, and without effect.
        differentiable: not supported; True is refused.
        schedule: learning rates and freezing as a function of the step.
        total_steps: steps in the run; alone it means ``schedule=Cosine(total_steps)``.
        state_dtype: torch.float32 keeps the moments of float16 and bfloat16 parameters in float32;
            None, as in torch, in the parameters' dtype.
        backend: what runs the step; None for the fastest that can take each parameter.

    Raises:
        TypeError, ValueError, RuntimeError, BackendUnavailableError: as :class:`fastfreeze.Adam`.

    Example:
        >>> optimizer = fastfreeze.AdamW(model.parameters(), lr=1e-3, total_steps=10_000)
    """

    _rule: ClassVar[AdamRule] = AdamWRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        schedule: Schedule | None = None,
        total_steps: int | None = None,
        state_dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            schedule=schedule,
            total_steps=total_steps,
            state_dtype=state_dtype,
            backend=backend,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # also where an Adam's state was loaded
            group["decoupled_weight_decay"] = True


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] must be >= 0 and < 1, got {beta}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
