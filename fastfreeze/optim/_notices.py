"""What SGD tells of a set-up that trains something else than it seems to."""

from __future__ import annotations

import math
import warnings
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastfreeze._frozen import frozen_by_schedule, planned
from fastfreeze.errors import FastfreezeWarning
from fastfreeze.schedule import Schedule
from fastfreeze.text import ranges

if TYPE_CHECKING:
    from fastfreeze.optim.sgd import SGD

_requires_grad_of = attrgetter("requires_grad")
_PATIENCE = 10  # steps without a gradient until a group is named: some train in turns


def tell_of_plan(groups: list[dict[str, Any]], schedule: Schedule | None) -> None:
    """Warn if the groups come from a plan that was made for another schedule or learning rate."""
    plan = planned(p for group in groups for p in group["params"])
    if plan is None or not all("layer_index" in group for group in groups):  # not its groups
        return
    config, lr = plan
    if config is not None and schedule is None:
        _warn(
            f"split() was given schedule={config['name']}, and this optimizer has none: no layer "
            "will freeze. Pass schedule=plan.schedule to the optimizer too"
        )
    elif config is not None and schedule is not None and config != schedule.config():
        _warn(
            f"split() was given schedule {config}, and this optimizer follows "
            f"{schedule.config()}: the plan tells of another run. Pass both the same schedule"
        )
    rates = {float(group.get("initial_lr", group["lr"])) for group in groups}
    if (
        lr is not None
        and len(rates) == 1
        and not math.isclose(lr, rate := rates.pop(), rel_tol=1e-6)
    ):
        _warn(
            f"split() was given lr={float(lr)}, and this optimizer starts from lr={rate}, which is "
            "what counts: the plan's table shows rates that no layer has. Pass both the same lr"
        )


def _tell_of_earlier_run(optimizer: SGD) -> None:
    """Warn if layers that should train are as an earlier run's schedule has frozen them."""
    groups = {
        g: group["params"]
        for g, group in enumerate(optimizer.param_groups)
        if g not in optimizer._frozen
    }
    frozen = set(map(id, frozen_by_schedule(p for params in groups.values() for p in params)))
    fixed = {g for g, params in groups.items() if not frozen.isdisjoint(map(id, params))}
    if fixed:
        _warn(
            f"{_layers(optimizer, fixed)} do not train: the schedule of an earlier run has "
            "frozen parameters of theirs. Call model.requires_grad_(True) before a new run"
        )


class Notices:
    """Looks at gradients while an optimizer freezes, and names the layers that do not get along."""

    def __init__(self) -> None:
        self._frozen: list[Tensor] = []  # a parameter of each frozen group
        self._silent: set[int] = set()  # groups without a gradient since a freeze
        self._since = 0  # the step of that freeze
        self._has_begun = self._told_of_thaw = False

    def freeze(self, optimizer: SGD, had_gradients: set[int]) -> None:
        """Groups have frozen or thawed; ``had_gradients``: those that had some at the last step."""
        lists = (optimizer._frozen[g] for g in optimizer._frozen)
        self._frozen = [] if self._told_of_thaw else [params[0] for params in lists if params]
        if not self._silent:
            self._silent, self._since = had_gradients - set(optimizer._frozen), optimizer._step

    def look(self, optimizer: SGD, groups_with_gradients: Any) -> None:
        """Before a step. ``groups_with_gradients``: a function that tells which have some."""
        if not self._has_begun:  # a checkpoint may have been loaded until now
            self._has_begun = True
            _tell_of_earlier_run(optimizer)
        if any(map(_requires_grad_of, self._frozen)):
            self._tell_of_thaw(optimizer)
        if not self._silent:
            return
        self._silent -= groups_with_gradients() | set(optimizer._frozen)
        if optimizer._step >= self._since + _PATIENCE - 1:
            silent, self._silent = self._silent, set()
            if silent:
                _warn(
                    f"{_layers(optimizer, silent)} should train, and have had no gradient since "
                    f"layers froze at step {self._since}. If the model uses "
                    "torch.utils.checkpoint, pass it use_reentrant=False: the reentrant kind gives "
                    "no gradients behind a frozen input"
                )

    def _tell_of_thaw(self, optimizer: SGD) -> None:
        thawed = {
            g for g, params in optimizer._frozen.items() if any(map(_requires_grad_of, params))
        }
        self._frozen, self._told_of_thaw = [], True
        _warn(
            f"{_layers(optimizer, thawed)} are frozen by the schedule, and require gradients "
            "again, which are computed for nothing. requires_grad_(True) does not thaw a layer; a "
            "schedule that thaws, or an optimizer without one, trains it"
        )


def _layers(optimizer: SGD, groups: set[int]) -> str:
    indices = {optimizer.param_groups[g].get("layer_index", g) for g in groups}
    return f"layers {ranges(sorted(indices))}"


def _warn(message: str) -> None:
    warnings.warn(message, FastfreezeWarning, stacklevel=4)
