"""Ways to fine-tune a pretrained network: torch's and other packages', and ours.

All but the two recipes of other packages warm up for a tenth of the run and anneal by one cosine.
What a rival freezes is in eval mode, without gradients, all of it after what it reads: the best
that can be done by hand without keeping values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fastfreeze
from benchmarks.training_rivals import Task, Training, stepping
from benchmarks.worth.question import Method
from fastfreeze.layers.split import LayerPlan
from fastfreeze.schedule import Cosine, FreezeOut, Frozen, GradualUnfreezing, Segment

WARM = 0.1  # of a run


@dataclass(frozen=True, kw_only=True)
class FineTask(Task):
    """A pretrained network, and what it is fine-tuned on.

    Attributes:
        weights: where those of the network are.
        epochs: the budget.
        layout: memory format of inputs and weights.
        half: how many stages have half of the compute, at most.
        last_block: how many stages a head and the last block are.
        optimizer, ours: torch's, at its fastest, and fastfreeze's, of groups and a learning rate.
    """

    weights: Path
    epochs: int
    layout: ClassVar[torch.memory_format] = torch.contiguous_format
    half: ClassVar[int]
    last_block: ClassVar[int]
    optimizer: ClassVar[Callable[..., Optimizer]]
    ours: ClassVar[Callable[..., Optimizer]]

    def pretrained(self) -> nn.Module:
        """The network with a new head, in training mode."""
        raise NotImplementedError

    def stages(self, model: nn.Module) -> list[nn.Module]:
        """What freezes together, from the input to the head."""
        raise NotImplementedError

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the head reads."""
        raise NotImplementedError

    def head(self, model: nn.Module, features: Tensor) -> Tensor:
        """Logits."""
        raise NotImplementedError

    def lora_names(self, model: nn.Module, first: int) -> list[str]:
        """Modules in the stages from ``first`` on that get adapters."""
        raise NotImplementedError

    def arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.contiguous(memory_format=self.layout),)

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return self.pretrained().to(memory_format=self.layout)

    @property
    def steps_per_epoch(self) -> int:
        return self.total_steps // self.epochs

    @property
    def warm(self) -> int:
        """Steps of the warm-up."""
        return math.ceil(WARM * self.total_steps)

    def annealed(self, decay: float = 1.0) -> Rate:
        """By one cosine, and smaller by ``decay`` for each stage between a stage and the head."""
        schedule = Cosine(self.total_steps, warmup_steps=self.warm, layer_decay=decay)
        return lambda step, stage=0, stages=1: schedule.lr(step, 1.0, stage, stages)

    def training(
        self, model: nn.Module, optimizer: Optimizer, after_step: Callable[[int], object]
    ) -> Training:
        """Of a model that is called as it is."""
        return Training(model, self.calls(model), optimizer, after_step, self.layout)

    def calls(self, network: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """Logits of a batch and its ids, by a network that does not ask for the ids."""
        return lambda x, ids: self.logits(network(*self.arguments(x)))


Schedules = Callable[[FineTask, LayerPlan, int], Any]  # of a task, its plan and its warm-up
Rate = Callable[[int, int, int], float]  # step, stage, stages: times the task's
First = Callable[[int, int], int]  # step, stages: the first stage that trains


def by_hand(
    task: FineTask, *, first: First = lambda step, stages: 0, rate: Rate | None = None
) -> Training:
    """torch's optimizer, one group for each stage; the stages before ``first`` are frozen."""
    model = task.build()
    stages = task.stages(model)
    groups = [{"params": list(stage.parameters())} for stage in stages]
    optimizer = task.optimizer(groups, task.lr)
    rate = rate or task.annealed()
    rates = [partial(rate, stage=i, stages=len(stages)) for i in range(len(stages))]
    scheduler = LambdaLR(optimizer, rates)
    trains = 0

    def freeze(taken: int) -> None:
        nonlocal trains
        now = first(taken, len(stages))
        if now != trains:
            for i, stage in enumerate(stages):
                stage.requires_grad_(i >= now).train(i >= now)
            trains = now

    def follow(taken: int) -> None:
        scheduler.step()
        freeze(taken)

    freeze(0)
    return task.training(model, optimizer, follow)


def half_by_hand(task: FineTask) -> Training:
    return by_hand(task, first=lambda step, stages: task.half)


def head_alone(task: FineTask) -> Training:
    return by_hand(task, first=lambda step, stages: stages - 1)


def head_then_last_block(task: FineTask) -> Training:
    """The last block joins the head for the second half of the run."""

    def first(step: int, stages: int) -> int:
        return stages - (1 if 2 * step < task.total_steps else task.last_block)

    return by_hand(task, first=first)


def gradually_by_hand(task: FineTask) -> Training:
    """The head first, then stage by stage, all for the second half of the run (ULMFiT)."""

    def first(step: int, stages: int) -> int:
        return max(0, stages - 1 - 2 * stages * step // task.total_steps)

    return by_hand(task, first=first)


def fine_tune(task: FineTask, *, kept: bool = False) -> Training:
    """fastai's recipe: the head for an epoch, then everything, with discriminative rates.

    A cycle each; in the second the rate is half as high and falls evenly, by logarithms, to its
    100th part at the input. In the first, norms of the body do not train, which fastai lets them.
    A run of one epoch is cut in halves. If ``kept``, the first half stays frozen, and is kept.
    """
    begin = task.half if kept else 0
    turn = min(task.steps_per_epoch, task.total_steps // 2)

    def first(step: int, stages: int) -> int:
        return stages - 1 if step < turn else begin

    def rate(step: int, stage: int, stages: int) -> float:
        if step < turn:
            return _one_cycle(step / turn, rises=0.99)
        scale = 0.5 * 100 ** (stage / (stages - 1) - 1)
        return scale * _one_cycle((step - turn) / (task.total_steps - turn), rises=0.3)

    training = by_hand(task, first=first, rate=rate)
    if kept:
        keep(training, task, fastfreeze.trim(training.model))
    return training


def _one_cycle(done: float, rises: float) -> float:
    """fastai's: from 1/25 up to 1 and down to 1e-5, by halves of a cosine."""
    if done < rises:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * done / rises))
    return 1e-5 + 0.5 * (1 + math.cos(math.pi * min(1.0, (done - rises) / (1 - rises))))


def backbone_finetuning(task: FineTask) -> Training:
    """Lightning's callback: the head until half of the epochs, then the rest, a tenth as fast.

    Its own rates are constant within an epoch, and the body's double with each, up to the head's.
    """
    from lightning.pytorch.callbacks import BackboneFinetuning

    model = task.build()
    *body, head = task.stages(model)
    module = nn.Module()  # what the callback looks for in a LightningModule
    module.backbone = nn.ModuleList(body)
    callback = BackboneFinetuning(max(1, task.epochs // 2), lambda epoch: 2.0)
    callback.freeze_before_training(module)
    groups = [{"params": list(head.parameters())}]
    optimizer = task.optimizer(groups, task.lr)

    def follow(taken: int) -> None:
        if taken % task.steps_per_epoch == 0 and taken < task.total_steps:
            callback.finetune_function(module, taken // task.steps_per_epoch, optimizer)

    return task.training(model, optimizer, follow)


def head_on_stored_features(task: FineTask) -> Training:
    """What is before the head runs once for each sample, at the start; the head trains on that."""
    model = task.build()
    *body, head = task.stages(model)
    for stage in body:
        stage.requires_grad_(False).eval()
    with torch.no_grad():
        found = [(ids, task.features(model, x)) for x, ids in _all_samples(task)]
    stored = torch.empty(len(task.labels), *found[0][1].shape[1:])
    for ids, features in found:
        stored[ids] = features
    optimizer = task.optimizer([{"params": list(head.parameters())}], task.lr)
    computed, taken = sum(len(ids) for ids, _ in found), 0

    def network(x: Tensor, ids: Tensor) -> Tensor:
        nonlocal taken
        taken += len(ids)
        return task.head(model, stored[ids])

    anneal = stepping(LambdaLR(optimizer, task.annealed()))
    training = Training(model, network, optimizer, anneal, task.layout)
    training.notes = lambda: {"hits": max(0, taken - computed), "misses": min(taken, computed)}
    return training


def _all_samples(task: FineTask) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of inputs and ids that hold each sample that will be trained on."""
    seen: set[int] = set()
    for step in range(task.total_steps):
        x, _, ids = task.batch(step)
        if not seen.issuperset(ids.tolist()):
            seen.update(ids.tolist())
            yield x.contiguous(memory_format=task.layout), ids


def lora(task: FineTask, *, kept: bool = False) -> Training:
    """peft's adapters in all stages; if ``kept``, in the second half alone, above kept values."""
    from peft import LoraConfig, inject_adapter_in_model

    first = task.half if kept else 0
    model = task.build()
    stages = task.stages(model)
    names = task.lora_names(model, first)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=names)
    model = inject_adapter_in_model(config, model).to(memory_format=task.layout)
    stages[-1].requires_grad_(True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = task.optimizer([{"params": trainable}], task.lr)
    training = task.training(model, optimizer, stepping(LambdaLR(optimizer, task.annealed())))
    if kept:
        for stage in stages[:first]:
            stage.eval()
        keep(training, task, fastfreeze.trim(model))
    return training


@dataclass(frozen=True, kw_only=True)
class ThenThawed(Frozen):
    """A frozen prefix that trains with the rest for the last quarter, at a tenth of its rate."""

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        own = super()._segments(i, head)
        start = self.total_steps * 3 // 4
        return (*own, Segment(start, self.total_steps - start, 0.1)) if own[0].frozen else own


@dataclass(frozen=True, kw_only=True)
class ThenFrozen(Frozen):
    """A prefix that trains with the rest for the first quarter, and is frozen from then on."""

    def _segments(self, i: int, head: int) -> tuple[Segment, ...]:
        if not super()._segments(i, head)[0].frozen:
            return (Segment(0, self.total_steps),)
        return Segment(0, self.total_steps), Segment(max(1, self.total_steps // 4), 0)


def prefix(until: float, kind: Any = Frozen) -> Schedules:
    """A frozen one of that share of the compute; 1 is all but the head."""

    def schedule(task: FineTask, plan: LayerPlan, warm: int) -> Any:
        first = len(plan.layers) - 1 if until == 1 else until
        return kind(task.total_steps, until=first, warmup_steps=warm)

    return schedule


def gradual(task: FineTask, plan: LayerPlan, warm: int) -> Any:
    every = max(1, task.total_steps // (2 * len(plan.layers)))
    return GradualUnfreezing(task.total_steps, unfreeze_every=every, warmup_steps=warm)


def freezeout(task: FineTask, plan: LayerPlan, warm: int) -> Any:
    return FreezeOut(task.total_steps, t_0=0.5, scale_lr=False, warmup_steps=warm)


def ours(
    task: FineTask, *, schedule: Schedules, kept: bool = True, directory: Path | None = None
) -> Training:
    """fastfreeze's optimizer and trimmed network; what is frozen is kept, if that is asked for.

    It is kept in memory, or in a directory for the next training.
    """
    model = task.build()
    plan = fastfreeze.split(model, task.arguments(task.batch(0)[0][:2]))
    plan = replace(plan, schedule=schedule(task, plan, task.warm), lr=task.lr)
    optimizer = task.ours(plan.param_groups(), task.lr, schedule=plan.schedule)
    network: Any = fastfreeze.trim(model)
    training = Training(model, task.calls(network), optimizer, layout=task.layout)
    if kept:
        keep(training, task, network, directory)
    return training


def keep(
    training: Training,
    task: FineTask,
    network: fastfreeze.TrimmedModel,
    directory: Path | None = None,
) -> None:
    """Keep the values of what is frozen; after the last step others may use the directory."""
    cache = fastfreeze.FeatureCache(network, directory=directory, enabled=True)
    anneal = training.after_step

    def after_step(taken: int) -> None:
        anneal(taken)
        if taken == task.total_steps:
            cache.close()

    def cached(x: Tensor, ids: Tensor) -> Tensor:
        return task.logits(cache(*task.arguments(x), samples=ids))

    def notes() -> dict:
        stats = cache.stats()
        counts = {"hits": stats.hits, "misses": stats.misses, "advanced": stats.advanced}
        return {**counts, "reason": cache.reason}

    training.network, training.notes, training.after_step = cached, notes, after_step


LONG = (4, 16, 64)  # epochs for what costs next to nothing


def methods(lrs: tuple[float, ...]) -> dict[str, Method]:
    """All of them, with one grid of learning rates."""

    def rival(make: Callable[[FineTask], Training], epochs: tuple[int, ...] = ()) -> Method:
        return Method(make, lrs, epochs=epochs)

    def own(make: Callable[..., Training], epochs: tuple[int, ...] = (), **options: Any) -> Method:
        return Method(partial(make, **options), lrs, ours=True, epochs=epochs)

    return {
        "everything trains": rival(by_hand),
        "half frozen, kept": own(ours, schedule=prefix(0.5)),
        "three quarters frozen, kept": own(ours, schedule=prefix(0.75)),
        "half frozen, kept, layer-wise rate decay": own(
            ours, schedule=prefix(0.5, partial(Frozen, layer_decay=0.5))
        ),
        "LoRA above half, kept": own(lora, kept=True),
        "fastai's fine_tune above half, kept": own(fine_tune, kept=True),
        "all but the head frozen, kept": own(ours, LONG, schedule=prefix(1)),
        "head on stored features": rival(head_on_stored_features, LONG),
        "LoRA": rival(lora),
        "layer-wise rate decay": rival(lambda task: by_hand(task, rate=task.annealed(0.8))),
        "fastai's fine_tune": rival(fine_tune),
        "half frozen by hand": Method(half_by_hand, lrs, by_hand=True),
        "half frozen, kept, then all thawed": own(ours, schedule=prefix(0.5, ThenThawed)),
        "all, then half frozen, kept": own(ours, schedule=prefix(0.5, ThenFrozen)),
        "head, then last block": rival(head_then_last_block),
        "gradual unfreezing by hand": rival(gradually_by_hand),
        "Lightning's BackboneFinetuning": rival(backbone_finetuning),
        "head only": rival(head_alone),
        "half frozen, trimmed": own(ours, schedule=prefix(0.5), kept=False),
        "gradual unfreezing, trimmed": own(ours, schedule=gradual, kept=False),
        "FreezeOut, not scaled, kept": own(ours, schedule=freezeout),
    }
