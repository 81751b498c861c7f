"""What an optimizer's step costs the host where a GPU does the rest.

As many tensors as a network has, but without elements, on the CPU: torch's fused kernel then finds
nothing to do, and ours, whose plan is that of a CUDA device, is not launched. What launches and
questions about streams cost is not in it: of torch's one launch for each group, of ours one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

import fastfreeze
from benchmarks.case import OURS, Case
from benchmarks.optimizer_cases import SGD_VALUES, TOTAL_STEPS
from benchmarks.shapes import parameter_groups, shapes_of
from fastfreeze.kernels.choice import PLANS
from fastfreeze.kernels.device_plan import DevicePlan


class HostPlan(DevicePlan):
    """A CUDA plan's step up to its launch."""

    table_from = 480

    def _launch(self, *_: object) -> None:
        pass


def host_case(model_name: str, num_groups: int) -> Case:
    """A step of a network's parameters, in so many groups."""
    shapes = [(0, *shape[1:]) for shape in shapes_of(model_name)]

    def groups() -> list[dict]:
        made = parameter_groups(shapes, num_groups)
        return [{"params": group["params"]} for group in made]

    schedule = fastfreeze.Cosine(TOTAL_STEPS)
    optimizers = {
        OURS: fastfreeze.SGD(groups(), **SGD_VALUES),
        f"{OURS}, schedule": fastfreeze.SGD(groups(), **SGD_VALUES, schedule=schedule),
        "torch fused": torch.optim.SGD(groups(), **SGD_VALUES, fused=True),
        "torch foreach": torch.optim.SGD(groups(), **SGD_VALUES, foreach=True),
    }
    with mock.patch.dict(PLANS, cpu=HostPlan):
        for optimizer in optimizers.values():
            optimizer.step()  # plans and momentum are made
    in_groups = f", {num_groups} groups" if num_groups > 1 else ""
    return Case(
        name=f"host time of a step, {model_name}, {len(shapes)} tensors{in_groups}",
        runs={name: optimizer.step for name, optimizer in optimizers.items()},
    )


HOST_CASES: dict[str, Callable[[], Case]] = {
    "host-resnet110": partial(host_case, "resnet110", 1),
    "host-resnet110-layers": partial(host_case, "resnet110", 110),
    "host-resnet50": partial(host_case, "resnet50", 1),
    "host-vgg16": partial(host_case, "vgg16", 1),
}
