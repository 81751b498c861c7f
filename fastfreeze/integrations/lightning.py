"""Lightning: a callback that trims a LightningModule's network and takes snapshots.

For the package ``lightning`` and its older name ``pytorch_lightning`` alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastfreeze.cache import FeatureCache
from fastfreeze.integrations.training import MakeCache, Store, TrainsTrimmed, network_of
from fastfreeze.layers.split import LayerPlan

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import (  # type: ignore[assignment, unused-ignore]
            Callback,
            LightningModule,
            Trainer,
        )
    except ImportError as error:
        raise ImportError(
            "fastfreeze.integrations.lightning needs Lightning: pip install lightning"
        ) from error


def total_steps(trainer: Trainer) -> int:
    """How many optimizer steps ``trainer.fit`` takes, gradient accumulation counted in.

    To be called in ``configure_optimizers``, as ``total_steps(self.trainer)``.

    Raises:
        ValueError: the trainer has neither ``max_steps`` nor ``max_epochs``.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise ValueError(
            "trainer must have max_steps or max_epochs, for a schedule needs an end: got "
            f"max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs}"
        )
    return int(steps)


class FastfreezeCallback(TrainsTrimmed, Callback):  # type: ignore[misc, unused-ignore]
    """Trims a LightningModule's network while it trains, and takes a snapshot at each cycle's end.

    ``configure_optimizers`` returns a :class:`fastfreeze.SGD`, ``Adam`` or ``AdamW`` with a
    schedule, or any optimizer of torch with a :class:`fastfreeze.FreezeScheduler`, stepped after
    each of its steps (``"interval": "step"``); checkpoints from the ends of epochs resume both bit
    for bit. In manual optimization each ``step()`` counts. In training batches alone
    :func:`fastfreeze.trim` of the network takes its place: validation, checkpoints and exports see
    the network itself.

    Args:
        network: name of the LightningModule's attribute, or of a submodule further down, that
            ``training_step`` calls: the module whose layers freeze.
        store: where snapshots of the network go, once for all processes; None: none are taken.
        plan: name of the LightningModule's attribute that holds the plan which ``split`` gave for
            the network, to measure what freezing saves; with ``example_inputs``.
        example_inputs: a tensor, a tuple of the network's positional arguments or a dict of keyword
            arguments.
        samples: gives the samples' indices, int64 ``[B]`` or ``[B, 2]``, of a batch: what is frozen
            then runs once for each sample. It wants data that are the same in each epoch, or
            :class:`fastfreeze.RepeatableViews`, and one call of the network in a training step.
        make_cache: gives the :class:`fastfreeze.FeatureCache` of the trimmed network, such as
            ``functools.partial(FeatureCache, directory="kept")``.

    Attributes:
        report: the :class:`fastfreeze.FreezeReport` of the latest training; None without ``plan``.
        cache: of the latest training, closed when that ends; None without ``samples``.

    Raises, when the training starts:
        ValueError: there is no such network or plan, or no optimizer with a schedule for it, its
            own or a ``FreezeScheduler``'s; or the schedule has fewer steps than the training.

    Warns:
        FastfreezeWarning: the schedule has more steps than the training.
    """

    def __init__(
        self,
        network: str = "model",
        *,
        store: Store | None = None,
        plan: str | None = None,
        example_inputs: Any = None,
        samples: Callable[[Any], Tensor] | None = None,
        make_cache: MakeCache = FeatureCache,
    ) -> None:
        super().__init__(network, store, plan, example_inputs, samples, make_cache)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        is_known = pl_module.automatic_optimization and not math.isinf(steps)
        self._start(
            pl_module,
            trainer.optimizers,
            [config.scheduler for config in trainer.lr_scheduler_configs],
            total_steps=int(steps) if is_known else None,
            saved=network_of(pl_module, self._network) if trainer.is_global_zero else None,
            plan=None if self._plan is None else _plan_of(pl_module, self._plan),
            example_inputs=trainer.strategy.batch_to_device(self._example_inputs),
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.begin_batch()
        if self._samples is not None:
            self.take_samples(self._samples(batch))

    on_train_batch_end = TrainsTrimmed.end_batch
    on_train_end = on_exception = TrainsTrimmed.close


def _plan_of(module: LightningModule, name: str) -> LayerPlan:
    plan = getattr(module, name, None)
    if isinstance(plan, LayerPlan):
        return plan
    raise ValueError(
        f"plan must be the name of an attribute of {type(module).__name__} that holds what "
        f"fastfreeze.split gave, got {name!r}, which is {plan!r}"
    )
