"""What SGD tells of a set-up that trains something else than it seems to."""

from __future__ import annotations

import warnings
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastfreeze._frozen import is_driven
from fastfreeze.errors import FastfreezeWarning
from fastfreeze.layers.groups import earlier_run_message, layers_in_words

if TYPE_CHECKING:
    from fastfreeze.optim.sgd import SGD

_requires_grad_of = attrgetter("requires_grad")
_PATIENCE = 10  # steps without a gradient until a group is named: some train in turns


def _tell_of_earlier_run(optimizer: SGD) -> None:
    """Warn if layers that should train are as an earlier run's schedule has frozen them."""
    if is_driven(optimizer):
        return
    message = earlier_run_message(optimizer.param_groups, optimizer._frozen)
    if message:
        _warn(message)


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
    return layers_in_words(optimizer.param_groups, groups)


def _warn(message: str) -> None:
    warnings.warn(message, FastfreezeWarning, stacklevel=4)
