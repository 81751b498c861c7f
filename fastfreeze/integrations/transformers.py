"""Hugging Face Transformers: a Trainer callback, and what the Trainer and ensembles ask for."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from fastfreeze.cache import FeatureCache
from fastfreeze.integrations.training import MakeCache, Store, TrainsTrimmed
from fastfreeze.layers.freeze import FreezeScheduler
from fastfreeze.layers.split import LayerPlan

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise ImportError(
        "fastfreeze.integrations.transformers needs Transformers with its Trainer: "
        'pip install "transformers[torch]"'
    ) from error


def total_steps(trainer: Trainer) -> int:
    """How many optimizer steps ``trainer.train`` takes, gradient accumulation counted in.

    Raises:
        ValueError: the training data have no length, and ``max_steps`` is not set.
    """
    arguments = trainer.args
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    try:
        num_batches = len(trainer.get_train_dataloader())
    except TypeError as error:
        raise ValueError(
            f"max_steps must be > 0 for training data without a length, got {arguments.max_steps}"
        ) from error
    steps: int = max(math.ceil(num_batches / arguments.gradient_accumulation_steps), 1)
    total: int = math.ceil(arguments.num_train_epochs * steps)
    return total


class IdleScheduler(LRScheduler):
    """A scheduler that leaves learning rates as the optimizer sets them.

    For ``Trainer(optimizers=(optimizer, IdleScheduler(optimizer)))``: without it the Trainer makes
    one of its own, which an optimizer of fastfreeze with a schedule refuses.
    """

    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]


class Logits(nn.Module):
    """A model that returns the ``logits`` of another one's output, a tensor.

    What :class:`FastfreezeCallback` takes snapshots of, and :class:`fastfreeze.SnapshotEnsemble`
    averages.

    Args:
        model: is shared, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = self.model(*args, **kwargs).logits
        return logits


class FastfreezeCallback(TrainsTrimmed, TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Trims a part of a Trainer's model while it trains, and takes a snapshot at each cycle's end.

    The Trainer is given a :class:`fastfreeze.SGD`, ``Adam`` or ``AdamW`` with a schedule and an
    :class:`IdleScheduler`, or any optimizer of torch and a :class:`fastfreeze.FreezeScheduler`;
    checkpoints resume bit for bit. In the training steps alone the part is replaced by
    :func:`fastfreeze.trim` of it, so that evaluation, checkpoints and ``save_pretrained`` see the
    model itself.

    Args:
        network: name of the submodule that is trimmed, such as ``model.base_model_prefix``: "bert",
            "vit". What is behind it, the head, trains to the end.
        store: where snapshots of ``Logits(model)`` go, once for all processes; None: none are
            taken.
        plan, example_inputs: the plan of the model, or of the part, and a tuple of its arguments
            or a dict of keyword arguments, to measure what freezing saves.
        samples: name of the input that holds the samples' indices, int64 ``[B]``, which the model
            does not get: what is frozen then runs once for each sample. It wants
            ``remove_unused_columns=False``, and data that are the same in each epoch.
        make_cache: gives the :class:`fastfreeze.FeatureCache` of the trimmed part, such as
            ``functools.partial(FeatureCache, directory="kept")``.

    Attributes:
        report: the :class:`fastfreeze.FreezeReport` of the latest training; None without ``plan``.
        cache: of the latest training, closed when that ends; None without ``samples``.

    Raises, when the training starts:
        ValueError: there is no such part, or no optimizer with a schedule for it, its own or a
            ``FreezeScheduler``'s; a scheduler that is neither that nor an :class:`IdleScheduler`;
            or fewer steps in the schedule than in the training.

    Warns:
        FastfreezeWarning: the schedule has more steps than the training.
    """

    def __init__(
        self,
        network: str,
        *,
        store: Store | None = None,
        plan: LayerPlan | None = None,
        example_inputs: Any = None,
        samples: str | None = None,
        make_cache: MakeCache = FeatureCache,
    ) -> None:
        super().__init__(network, store, plan, example_inputs, samples, make_cache)

    _inputs_hook: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()  # of a training that has failed: nothing tells of that
        scheduler = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])
        if not isinstance(scheduler, (IdleScheduler, FreezeScheduler)):
            raise ValueError(
                f"the Trainer's lr_scheduler must be an IdleScheduler, or a FreezeScheduler for an "
                f"optimizer of torch, got {type(scheduler).__name__}: it would set the learning "
                "rates too"
            )
        model: nn.Module = kwargs["model"]
        self._start(
            model,
            [kwargs["optimizer"]],
            [scheduler],
            total_steps=state.max_steps,
            saved=Logits(model) if state.is_world_process_zero else None,
            plan=self._plan,
            example_inputs=self._example_inputs,
        )
        if self._samples is not None:
            self._inputs_hook = model.register_forward_pre_hook(self._inputs, with_kwargs=True)

    def _inputs(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the samples out of what the model is called with."""
        if model.training and self._samples not in kwargs:
            raise ValueError(
                f"samples must be the name of an input, got {self._samples!r}: the inputs are "
                f"{', '.join(kwargs)} (the Trainer needs remove_unused_columns=False)"
            )
        self.take_samples(kwargs.pop(self._samples, None))
        return args, kwargs

    def close(self, *_: Any, **__: Any) -> None:
        super().close()
        if self._inputs_hook is not None:
            self._inputs_hook.remove()
            self._inputs_hook = None

    on_step_begin = TrainsTrimmed.begin_batch
    on_step_end = TrainsTrimmed.end_batch
    on_train_end = close
