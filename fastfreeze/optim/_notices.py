"""What an optimizer tells of a set-up that trains something else than it seems to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

from torch import Tensor
from torch.optim import Optimizer

from fastfreeze.errors import warn
from fastfreeze.layers.frozen import is_driven
from fastfreeze.layers.groups import Group, layers_in_words, tell_of_earlier_run

_requires_grad_of = attrgetter("requires_grad")
_PATIENCE = 10  # steps without a gradient until a group is named: some train in turns

Frozen = Mapping[int, Sequence[Tensor]]  # by group, the parameters that freezing switched off


class Notices:
    """Looks at gradients while an optimizer freezes; warns of layers that should train and do not.

    Args:
        frozen: the groups that are frozen now.
        step: of the schedule.
    """

    def __init__(self, frozen: Frozen, step: int) -> None:
        self._silent: set[int] = set()  # groups without a gradient since a freeze
        self._has_begun = self._told_of_thaw = False
        self.freeze(frozen, step, set())

    def freeze(self, frozen: Frozen, step: int, had_gradients: set[int]) -> None:
        """Groups have frozen or thawed; ``had_gradients``: those that had some at the last step."""
        self._frozen = frozen
        self._watched = [] if self._told_of_thaw else [ps[0] for ps in frozen.values() if ps]
        if not self._silent:
            self._silent, self._since = had_gradients - set(frozen), step

    def look(
        self, optimizer: Optimizer, step: int, groups_with_gradients: Callable[[], set[int]]
    ) -> None:
        """Before a step of the schedule."""
        groups, frozen = optimizer.param_groups, self._frozen
        if not self._has_begun:  # a checkpoint may have been loaded until now
            self._has_begun = True
            if not is_driven(optimizer):  # a scheduler tells of earlier runs by itself
                tell_of_earlier_run(groups, frozen)
        if any(map(_requires_grad_of, self._watched)):
            self._tell_of_thaw(groups, frozen)
        if not self._silent:
            return
        self._silent -= groups_with_gradients() | set(frozen)
        if step >= self._since + _PATIENCE - 1:
            silent, self._silent = self._silent, set()
            if silent:
                warn(
                    f"{layers_in_words(groups, silent)} should train, and have had no gradient "
                    f"since layers froze at step {self._since}. If the model uses "
                    "torch.utils.checkpoint, pass it use_reentrant=False: the reentrant kind gives "
                    "no gradients behind a frozen input"
                )

    def _tell_of_thaw(self, groups: Sequence[Group], frozen: Frozen) -> None:
        thawed = {g for g, params in frozen.items() if any(map(_requires_grad_of, params))}
        self._watched, self._told_of_thaw = [], True
        warn(
            f"{layers_in_words(groups, thawed)} are frozen by the schedule, and require gradients "
            "again, which are computed for nothing. requires_grad_(True) does not thaw a layer; a "
            "schedule that thaws, or an optimizer without one, trains it"
        )
