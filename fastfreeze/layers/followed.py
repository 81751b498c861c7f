"""Parameter groups that follow a schedule: their rates, and how layers freeze and thaw."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastfreeze.layers.frozen import frozen_by_schedule, note_frozen, note_thawed
from fastfreeze.layers.groups import Group, check_scheduled_groups
from fastfreeze.schedule import Schedule, SegmentTable


class FollowedGroups:
    """What a schedule says of an optimizer's groups at each step, and who is frozen by it now.

    Args:
        schedule: learning rates and freezing as a function of the step.
        groups: the optimizer's.
        frozen: what freezing has switched off already, by group.

    Attributes:
        segments: of each group, by start.
        frozen: by group, the parameters that freezing has switched off until now.
        changes: the steps at which a group freezes or thaws, or may do so.

    Raises:
        TypeError, ValueError: groups that cannot follow the schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        groups: Sequence[Group],
        frozen: dict[int, list[Tensor]] | None = None,
    ) -> None:
        self.segments = check_scheduled_groups(schedule, groups)
        self.frozen = {} if frozen is None else frozen
        self.changes = frozenset(s.start for group in self.segments for s in group)
        self._last_step = schedule.total_steps - 1
        self._table = SegmentTable(self.segments, schedule.eta_min, schedule.warmup_steps)

    def lrs(self, step: int, initial_lrs: Sequence[float | Tensor]) -> list[float]:
        """Each group's learning rate at ``step``."""
        return self._table.lrs(step, np.array(list(map(float, initial_lrs))))

    def frozen_at(self, step: int) -> set[int]:
        """The groups that are frozen at ``step``; after the last one, those that were then."""
        return self._table.frozen(min(step, self._last_step))

    def check_count(self, groups: Sequence[Group], advice: str) -> None:
        """Raise ValueError if groups came or went since."""
        known = len(self.segments)
        if len(groups) != known:
            raise ValueError(
                f"param_groups must be the {known} groups that the schedule knows, got "
                f"{len(groups)}: {advice}"
            )

    def go_to(
        self,
        step: int,
        groups: Sequence[Group],
        state: MutableMapping[Tensor, Any],
        new_state: Callable[[Group, Tensor], dict[str, Any]] | None = None,
    ) -> None:
        """Freeze and thaw what is due at ``step``.

        Args:
            step: of the schedule.
            groups: the optimizer's.
            state: the optimizer's; what it holds of frozen parameters is released.
            new_state: gives the state of a parameter that thaws, for optimizers that make theirs
                before the first step.
        """
        frozen = self.frozen_at(step)
        for g in sorted(frozen):
            self._freeze(g, groups[g]["params"], state)
        for g in sorted(set(self.frozen) - frozen):
            thawed = self.frozen.pop(g)
            for p in thawed:
                p.requires_grad_(True)
                if new_state is not None and p not in state:  # none was loaded since
                    state[p] = new_state(groups[g], p)
            note_thawed(thawed)

    def _freeze(self, g: int, params: Sequence[Tensor], state: MutableMapping[Tensor, Any]) -> None:
        if g not in self.frozen:
            earlier = set(map(id, frozen_by_schedule(params)))  # by the run that this one resumes
            self.frozen[g] = [p for p in params if p.requires_grad or id(p) in earlier]
            note_frozen(self.frozen[g])
        for p in params:  # each time: somebody may have switched it on, or loaded state for it
            p.requires_grad_(False)
            p.grad = None
            state.pop(p, None)
