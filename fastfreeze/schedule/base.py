"""What every schedule has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, overload

import numpy as np
import numpy.typing as npt

from fastfreeze.checks import check_int, check_rate, check_share
from fastfreeze.schedule.segments import FloatArray, Segment, SegmentTable


@dataclass(frozen=True)
class Schedule(ABC):
    """What every schedule can answer. Layers count from 0, the one nearest the input.

    Attributes:
        total_steps: number of optimizer steps in the whole run, at least 1.
        warmup_steps: every rate at step t is multiplied by ``min(1, (t + 1) / warmup_steps)``: it
            rises linearly over the first so many steps, 0 (no warm-up) to ``total_steps``.
        layer_decay: of layers 0..N, N being the head, layer i's rate is multiplied by
            ``layer_decay ** (N - i)``; in (0, 1]. It keeps a pretrained network's first layers near
            to where they are: the discriminative rates of ULMFiT (Howard & Ruder, ACL 2018), which
            takes 1 / 2.6, and the layer-wise decay of ELECTRA (Clark et al., ICLR 2020).
        freezes: whether any layer is ever frozen, so that layers must be known.
    """

    freezes: ClassVar[bool] = False

    total_steps: int
    warmup_steps: int = field(default=0, kw_only=True)
    layer_decay: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            if isinstance(getattr(self, name), np.generic):  # which JSON does not know
                object.__setattr__(self, name, getattr(self, name).item())
        check_int("total_steps", self.total_steps, minimum=1)
        check_int("warmup_steps", self.warmup_steps, minimum=0, maximum=self.total_steps)
        check_share("layer_decay", self.layer_decay)

    def segments(self, layer_index: int = 0, num_layers: int = 1) -> tuple[Segment, ...]:
        """The layer's segments, by start; the first starts at step 0.

        Raises:
            ValueError: ``layer_index`` is not in ``0..num_layers-1``, or the schedule is for more
                layers, or for a plan's.
        """
        check_int("num_layers", num_layers, minimum=1)
        check_int("layer_index", layer_index, minimum=0, maximum=num_layers - 1)
        decay = float(self.layer_decay) ** (num_layers - 1 - layer_index)
        rows = self._segments(layer_index, num_layers - 1)
        return tuple(replace(row, scale=row.scale * decay) for row in rows)

    @abstractmethod
    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        """Those of layer ``i`` of 0..``head``, without the layers' decay.

        One may start at ``total_steps``, to say where the rate is when training is over. A scale of
        0 is a rate of 0; a length of 0 is frozen.
        """

    def for_layers(self, names: Sequence[str], costs: Sequence[float] | None) -> Schedule:
        """The schedule with what only a plan can tell filled in; itself if nothing is missing.

        Args:
            names: of the layers, by index.
            costs: their FLOPs, forward and backward; None: not known.

        Raises:
            ValueError: these layers are not what the schedule asks for.
        """
        return self

    @property
    def eta_min(self) -> float:
        """Lower bound of the learning rate of a layer that trains."""
        return 0.0

    @property
    def needs_layers(self) -> bool:
        """Whether layers differ, by freezing or in their rates, so that they must be known."""
        return self.freezes or self.layer_decay != 1

    @property
    def cycle_ends(self) -> tuple[int, ...]:
        """Numbers of completed steps after which a cycle is over, and a snapshot due."""
        return (self.total_steps,)

    @overload
    def lr(
        self, step: int, initial_lr: float, layer_index: int = 0, num_layers: int = 1
    ) -> float: ...
    @overload
    def lr(
        self,
        step: Sequence[int] | npt.NDArray[np.int64],
        initial_lr: float,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> FloatArray: ...
    def lr(
        self, step: Any, initial_lr: float, layer_index: int = 0, num_layers: int = 1
    ) -> float | FloatArray:
        """Learning rate of a layer at a step, or at each step of an array.

        Args:
            step: 0-based step(s), in ``0..total_steps``. At ``total_steps`` training is over, and
                the value is where the last segment arrives.
            initial_lr: learning rate at the start of the first cycle, before any scaling; > 0.
            layer_index, num_layers: the layer's position, and how many layers there are.

        Returns:
            A float, or a float64 array of the shape of ``step``.

        Raises:
            TypeError, ValueError: a step outside the range, ``initial_lr`` no number or below
                ``eta_min``, or a bad layer.
        """
        segments = self.segments(layer_index, num_layers)
        check_initial_lr(self, initial_lr)
        steps = np.asarray(step)
        if steps.size and not (steps.min() >= 0 and steps.max() <= self.total_steps):  # NaN too
            raise ValueError(f"step must be in 0..{self.total_steps} (total_steps), got {step!r}")
        table = SegmentTable([segments], self.eta_min, self.warmup_steps)
        lrs = table.rates(steps, initial_lr)[..., 0]
        return float(lrs) if np.ndim(step) == 0 else lrs

    def is_frozen(self, step: int, layer_index: int = 0, num_layers: int = 1) -> bool:
        """Whether the layer is frozen at ``step`` (0-based)."""
        return 0 in SegmentTable([self.segments(layer_index, num_layers)]).frozen(step)

    def freeze_steps(self, layer_index: int = 0, num_layers: int = 1) -> tuple[int, ...]:
        """The steps at which the layer becomes frozen, in order; empty if it never does."""
        return tuple(
            s.start
            for s in self.segments(layer_index, num_layers)
            if s.frozen and s.start < self.total_steps
        )

    def thaw_steps(self, layer_index: int = 0, num_layers: int = 1) -> tuple[int, ...]:
        """The steps from which the layer trains after it was frozen, in order; often none."""
        return tuple(
            after.start
            for before, after in pairwise(self.segments(layer_index, num_layers))
            if before.frozen and not after.frozen and after.start < self.total_steps
        )

    def frozen_layers(self, num_layers: int) -> tuple[tuple[int, frozenset[int]], ...]:
        """What is frozen when: pairs of a first step and the indices of all layers frozen then.

        In order; each lasts until the next one's first step, the last until the run's end.
        """
        rows = [self.segments(i, num_layers) for i in range(num_layers)]
        table = SegmentTable(rows)
        found: list[tuple[int, frozenset[int]]] = []
        for step in sorted({s.start for row in rows for s in row if s.start < self.total_steps}):
            frozen = frozenset(table.frozen(step))
            if not found or found[-1][1] != frozen:
                found.append((step, frozen))
        return tuple(found)

    def config(self) -> dict[str, Any]:
        """The schedule as plain data; :func:`from_config` makes it again."""
        return {"name": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Annealed(Schedule):
    """A schedule with a lower bound, which is that of every layer."""

    eta_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("eta_min", self.eta_min)
        if self.eta_min > 0 and self.layer_decay != 1:  # a decayed rate could begin below it
            raise ValueError(
                f"eta_min must be 0 where layer_decay is not 1, got eta_min={self.eta_min!r} and "
                f"layer_decay={self.layer_decay!r}"
            )


def check_initial_lr(schedule: Schedule, initial_lr: float, name: str = "initial_lr") -> None:
    """Raise unless ``initial_lr`` (``name`` in errors) is finite and fits ``schedule.eta_min``."""
    check_rate(name, initial_lr)
    if initial_lr < schedule.eta_min:
        raise ValueError(
            f"eta_min must not exceed the initial learning rate {initial_lr!r}, "
            f"got {schedule.eta_min!r}"
        )
