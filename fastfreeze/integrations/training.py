"""What the callbacks do, whichever framework calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastfreeze.cache import FeatureCache
from fastfreeze.errors import warn
from fastfreeze.layers.freeze import FreezeScheduler
from fastfreeze.layers.report import FreezeReport
from fastfreeze.layers.split import LayerPlan
from fastfreeze.schedule import Schedule
from fastfreeze.snapshots import MemorySnapshots, SnapshotStore
from fastfreeze.trimming import TrimmedModel, trim

Store = SnapshotStore | MemorySnapshots
MakeCache = Callable[[TrimmedModel], FeatureCache]


class Kept(nn.Module):
    """A trimmed network behind its feature cache, for callers that do not name the samples.

    Attributes:
        samples: those of the next call, as the cache takes them; None: the network runs alone.
    """

    def __init__(self, cache: FeatureCache) -> None:
        super().__init__()
        self.network = cache.network
        self._cache = cache
        self.samples: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.samples is None:
            return self.network(*args, **kwargs)
        return self._cache(*args, samples=self.samples, **kwargs)


class TrainsTrimmed:
    """What all callbacks do: trim a network, and take snapshots.

    From :meth:`begin_batch` to :meth:`end_batch` the trimmed network is in the network's place.
    Validation, checkpoints and all else see the network itself.
    """

    report: FreezeReport | None = None
    cache: FeatureCache | None = None
    _hook: RemovableHandle | None = None  # there while a training runs

    def __init__(
        self,
        network: str,
        store: Store | None,
        plan: Any,
        example_inputs: Any,
        samples: Any,
        make_cache: MakeCache,
    ) -> None:
        self._network, self._store, self._plan = network, store, plan
        self._example_inputs = example_inputs
        self._samples, self._make_cache = samples, make_cache

    def _start(
        self,
        owner: nn.Module,
        optimizers: Iterable[Any],
        schedulers: Iterable[Any],
        *,
        total_steps: int | None,
        saved: nn.Module | None,
        plan: LayerPlan | None,
        example_inputs: Any,
    ) -> None:
        """A training of ``owner`` begins, of ``total_steps``, or None where that is not known.

        Where ``saved`` is given, this process takes snapshots of it.

        Raises:
            ValueError: there is no such network or optimizer, the framework takes more steps than
                the schedule has, or one of ``plan`` and ``example_inputs`` is missing.

        Warns:
            FastfreezeWarning: the framework takes fewer steps than the schedule has.
        """
        if (plan is None) != (example_inputs is None):
            raise ValueError("plan and example_inputs must be given together, for a report")
        network = network_of(owner, self._network)
        found = _optimizer_of(network, self._network, optimizers, schedulers)
        optimizer, self._freezer, self._schedule = found
        _check_total_steps(self._schedule, total_steps)
        self.report = None
        if plan is not None:
            self.report = FreezeReport(plan.model, optimizer, plan, example_inputs)
        parent, _, self._attribute = self._network.rpartition(".")
        self._parent = owner.get_submodule(parent)
        self._whole, trimmed = network, trim(network)
        self._trimmed: nn.Module = trimmed
        self.cache = None
        if self._samples is not None:
            self.cache = self._make_cache(trimmed)
            self._trimmed = Kept(self.cache)
        self._saved = saved
        self._measured = ExitStack()  # open while an optimizer step is being measured
        self._first_step: int | None = None  # the optimizer's, when that began
        self._seen = self._steps_taken
        self._hook = optimizer.register_step_post_hook(self._save_if_due)

    def begin_batch(self, *_: Any, **__: Any) -> None:
        """A batch is about to be trained on; the optimizer may need several for a step."""
        setattr(self._parent, self._attribute, self._trimmed)
        if self.report is not None and self._first_step is None:
            self._first_step = self._steps_taken
            self._measured.enter_context(self.report.step())

    def end_batch(self, *_: Any, **__: Any) -> None:
        """A batch is over.

        Raises:
            RuntimeError: the optimizer has taken several steps in it, and they are measured.
        """
        setattr(self._parent, self._attribute, self._whole)
        if self._first_step is None:
            return
        taken = self._steps_taken - self._first_step
        if taken > 1:
            raise RuntimeError(
                f"a report takes one optimizer step for each batch, got {taken}: leave out plan"
            )
        if taken == 1:
            self._first_step = None
            self._measured.close()

    def close(self, *_: Any, **__: Any) -> None:
        """Leave the model as it was; to be called after a training that has failed in a step."""
        if self._hook is None:
            return
        setattr(self._parent, self._attribute, self._whole)
        self._hook.remove()
        self._hook = None
        if self.cache is not None:
            self.cache.close()
        if self._first_step is not None:  # in the middle of a step: it does not count
            self._first_step = None
            self._measured.__exit__(GeneratorExit, GeneratorExit(), None)

    def take_samples(self, samples: Tensor | None) -> None:
        """Which samples the next call of the network is for."""
        if isinstance(self._trimmed, Kept):
            self._trimmed.samples = samples

    @property
    def _steps_taken(self) -> int:
        if isinstance(self._freezer, FreezeScheduler):
            return self._freezer.steps_taken
        step: int = self._freezer.current_step
        return step

    def _save_if_due(self, *_: Any) -> None:
        step, before, ends = self._steps_taken, self._seen, self._schedule.cycle_ends
        self._seen = step
        # A step that was skipped for an overflow ends nothing.
        if self._saved is not None and self._store is not None and step != before and step in ends:
            self._store.save(self._saved, step=step, cycle=ends.index(step))


def network_of(owner: nn.Module, name: str) -> nn.Module:
    """The submodule of this qualified name.

    Raises:
        ValueError: there is none.
    """
    try:
        if name:
            return owner.get_submodule(name)
    except AttributeError:
        pass
    children = ", ".join(n for n, _ in owner.named_children())
    raise ValueError(
        f"network must be the name of a submodule of {type(owner).__name__} ({children}), "
        f"got {name!r}"
    )


def _optimizer_of(
    network: nn.Module, name: str, optimizers: Iterable[Any], schedulers: Iterable[Any]
) -> tuple[Optimizer, Any, Schedule]:
    """The optimizer that trains the network, what freezes for it, and the schedule of that."""
    own = set(network.parameters())
    # Frameworks wrap optimizers, and keep what they wrap under this name.
    unwrapped: list[Optimizer] = [getattr(o, "optimizer", o) for o in optimizers]
    freezers = {id(s.optimizer): s for s in schedulers if isinstance(s, FreezeScheduler)}
    for optimizer in unwrapped:
        params = (p for group in optimizer.param_groups for p in group["params"])
        freezer = freezers.get(id(optimizer), optimizer)
        schedule = getattr(freezer, "schedule", None)
        if isinstance(schedule, Schedule) and not own.isdisjoint(params):
            return optimizer, freezer, schedule
    found = ", ".join(f"{type(o).__module__}.{type(o).__name__}" for o in unwrapped) or "none"
    raise ValueError(
        f"the optimizer of {name!r} must be a fastfreeze.SGD, Adam or AdamW with a schedule, "
        f"or have a FreezeScheduler among the schedulers, over parameters that train, got {found}"
    )


def _check_total_steps(schedule: Schedule, total_steps: int | None) -> None:
    if total_steps is None or total_steps == schedule.total_steps:
        return
    text = f"the schedule has total_steps={schedule.total_steps}, the training {total_steps}"
    if total_steps > schedule.total_steps:
        raise ValueError(f"{text}: make the schedule with total_steps={total_steps}")
    warn(f"{text}: what is due later, snapshots among it, will not happen")
