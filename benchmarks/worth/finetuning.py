"""Ways to fine-tune a pretrained network: torch's and other packages', and ours.

All but the two recipes of other packages warm up for a tenth of the run and anneal by one cosine.
What a rival freezes is in eval mode, without gradients, all of it after what it reads: the best
that can be done by hand without keeping values.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fastfreeze
from benchmarks.training_rivals import Task, Training
from benchmarks.worth.question import Method
from benchmarks.worth.training import judged, trained
from fastfreeze.layers.split import LayerPlan
from fastfreeze.schedule import FreezeOut, Frozen, GradualUnfreezing, Schedule, Segment

WARM = 0.1  # of a run


class Network(Protocol):
    """A pretrained network, and how it is trained.

    Attributes:
        layout: memory format of inputs and weights.
        half: how many stages have half of the compute, at most.
        last_block: how many stages a head and the last block are.
        optimizer, ours: torch's, at its fastest, and fastfreeze's, of groups and a learning rate.
    """

    layout: torch.memory_format
    half: int
    last_block: int
    optimizer: Callable[..., Optimizer]
    ours: Callable[..., Optimizer]

    def build(self) -> nn.Module:
        """With pretrained weights and a new head, in training mode."""

    def stages(self, model: nn.Module) -> list[nn.Module]:
        """What freezes together, from the input to the head."""

    def arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the model is called with."""

    def logits(self, output: Any) -> Tensor:
        """Of what the model gives."""

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the head reads."""

    def head(self, model: nn.Module, features: Tensor) -> Tensor:
        """Logits."""

    def with_lora(self, model: nn.Module, first: int) -> nn.Module:
        """The model with adapters in its stages from ``first`` on; they and the head train."""


@dataclass(frozen=True)
class FineTask(Task):
    """What is fine-tuned.

    Attributes:
        network: which, and how.
        epochs: the budget.
    """

    network: Network = field(kw_only=True)
    epochs: int = field(kw_only=True)

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return self.network.build().to(memory_format=self.network.layout)

    @property
    def steps_per_epoch(self) -> int:
        return self.total_steps // self.epochs

    def arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.network.arguments(x.contiguous(memory_format=self.network.layout))

    def calls(self, network: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """Logits of a batch and its ids, by a network that does not ask for the ids."""
        return lambda x, ids: self.network.logits(network(*self.arguments(x)))


Rate = Callable[[int, int, int, FineTask], float]  # step, stage, stages, task: times the task's
First = Callable[[int, int, FineTask], int]  # step, stages, task: the first stage that trains


def cosine(step: int, stage: int, stages: int, task: FineTask, *, decay: float = 1.0) -> float:
    """Annealed, and smaller by ``decay`` for each stage that lies between it and the head."""
    done = step / task.total_steps
    warm = min(1.0, (step + 1) / (WARM * task.total_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * done)) * decay ** (stages - 1 - stage)


def nothing_frozen(step: int, stages: int, task: FineTask) -> int:
    return 0


def by_hand(task: FineTask, *, first: First = nothing_frozen, rate: Rate = cosine) -> Training:
    """torch's optimizer, one group for each stage; the stages before ``first`` are frozen."""
    model = task.build()
    stages = task.network.stages(model)
    groups = [{"params": list(stage.parameters())} for stage in stages]
    optimizer = task.network.optimizer(groups, task.lr)
    rates = [partial(rate, stage=i, stages=len(stages), task=task) for i in range(len(stages))]
    scheduler = LambdaLR(optimizer, rates)
    taken, trains = 0, 0

    def freeze() -> None:
        nonlocal trains
        now = first(taken, len(stages), task)
        if now != trains:
            for i, stage in enumerate(stages):
                stage.requires_grad_(i >= now).train(i >= now)
            trains = now

    def follow() -> None:
        nonlocal taken
        scheduler.step()
        taken += 1
        freeze()

    freeze()
    return Training(model, task.calls(model), optimizer, follow, task.network.layout)


def from_stage(step: int, stages: int, task: FineTask, *, stage: int) -> int:
    """A fixed prefix; a negative stage counts from the end."""
    return stage % stages


def half_by_hand(task: FineTask) -> Training:
    return by_hand(task, first=partial(from_stage, stage=task.network.half))


def head_then_last_block(task: FineTask) -> Training:
    """The last block joins the head for the second half of the run."""

    def first(step: int, stages: int, task: FineTask) -> int:
        return stages - (1 if 2 * step < task.total_steps else task.network.last_block)

    return by_hand(task, first=first)


def gradually(step: int, stages: int, task: FineTask) -> int:
    """The head first, then stage by stage, all for the second half of the run (ULMFiT)."""
    return max(0, stages - 1 - 2 * stages * step // task.total_steps)


def fine_tune(task: FineTask) -> Training:
    """fastai's recipe: the head for an epoch, then everything, with discriminative rates.

    A cycle each; in the second the rate is half as high and falls evenly, by logarithms, to its
    100th part at the input. In the first, norms of the body do not train, which fastai lets them.
    A run of one epoch is cut in halves.
    """
    turn = min(task.steps_per_epoch, task.total_steps // 2)

    def first(step: int, stages: int, task: FineTask) -> int:
        return stages - 1 if step < turn else 0

    def rate(step: int, stage: int, stages: int, task: FineTask) -> float:
        if step < turn:
            return _one_cycle(step / turn, rises=0.99)
        scale = 0.5 * 100 ** (stage / (stages - 1) - 1)
        return scale * _one_cycle((step - turn) / (task.total_steps - turn), rises=0.3)

    return by_hand(task, first=first, rate=rate)


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
    *body, head = task.network.stages(model)
    module = nn.Module()  # what the callback looks for in a LightningModule
    module.backbone = nn.ModuleList(body)
    callback = BackboneFinetuning(max(1, task.epochs // 2), lambda epoch: 2.0)
    callback.freeze_before_training(module)
    groups = [{"params": list(head.parameters())}]
    optimizer = task.network.optimizer(groups, task.lr)
    taken = 0

    def follow() -> None:
        nonlocal taken
        taken += 1
        if taken % task.steps_per_epoch == 0 and taken < task.total_steps:
            callback.finetune_function(module, taken // task.steps_per_epoch, optimizer)

    return Training(model, task.calls(model), optimizer, follow, task.network.layout)


def head_on_stored_features(task: FineTask) -> Training:
    """What is before the head runs once for each sample, at the start; the head trains on that."""
    model = task.build()
    *body, head = task.network.stages(model)
    for stage in body:
        stage.requires_grad_(False).eval()
    with torch.no_grad():
        found = [(ids, task.network.features(model, x)) for x, ids in _all_samples(task)]
    stored = torch.empty(len(task.labels), *found[0][1].shape[1:])
    for ids, features in found:
        stored[ids] = features
    optimizer = task.network.optimizer([{"params": list(head.parameters())}], task.lr)
    computed, taken = sum(len(ids) for ids, _ in found), 0

    def network(x: Tensor, ids: Tensor) -> Tensor:
        nonlocal taken
        taken += len(ids)
        return task.network.head(model, stored[ids])

    training = Training(model, network, optimizer, _annealed(optimizer, task), task.network.layout)
    training.notes = lambda: {"hits": max(0, taken - computed), "misses": min(taken, computed)}
    return training


def _all_samples(task: FineTask) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of inputs and ids that hold each sample that will be trained on."""
    seen: set[int] = set()
    for step in range(task.total_steps):
        x, _, ids = task.batch(step)
        if not seen.issuperset(ids.tolist()):
            seen.update(ids.tolist())
            yield x.contiguous(memory_format=task.network.layout), ids


def _annealed(optimizer: Optimizer, task: FineTask) -> Callable[[], None]:
    return LambdaLR(optimizer, partial(cosine, stage=0, stages=1, task=task)).step


def lora(task: FineTask, *, kept: bool = False) -> Training:
    """peft's adapters in all stages; if ``kept``, in the second half alone, above kept values."""
    first = task.network.half if kept else 0
    model = task.build()
    stages = task.network.stages(model)
    model = task.network.with_lora(model, first).to(memory_format=task.network.layout)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = task.network.optimizer([{"params": trainable}], task.lr)
    after_step, layout = _annealed(optimizer, task), task.network.layout
    training = Training(model, task.calls(model), optimizer, after_step, layout)
    if kept:
        for stage in stages[:first]:
            stage.eval()
        _keep(training, task, fastfreeze.trim(model))
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


def frozen(task: FineTask, plan: LayerPlan, warm: int, *, until: float, kind: Any = Frozen) -> Any:
    """A prefix of that share of the compute; 1 is all but the head."""
    first = len(plan.layers) - 1 if until == 1 else until
    return kind(task.total_steps, until=first, warmup_steps=warm)


def gradual(task: FineTask, plan: LayerPlan, warm: int) -> Schedule:
    every = max(1, task.total_steps // (2 * len(plan.layers)))
    return GradualUnfreezing(task.total_steps, unfreeze_every=every, warmup_steps=warm)


def freezeout(task: FineTask, plan: LayerPlan, warm: int) -> Schedule:
    return FreezeOut(task.total_steps, t_0=0.5, scale_lr=False, warmup_steps=warm)


def ours(
    task: FineTask, *, schedule: Callable[[FineTask, LayerPlan, int], Schedule], kept: bool = True
) -> Training:
    """fastfreeze's optimizer and trimmed network; what is frozen is kept, if that is asked for."""
    model = task.build()
    plan = fastfreeze.split(model, task.arguments(task.batch(0)[0][:2]))
    warm = math.ceil(WARM * task.total_steps)
    plan = replace(plan, schedule=schedule(task, plan, warm), lr=task.lr)
    optimizer = task.network.ours(plan.param_groups(), task.lr, schedule=plan.schedule)
    network: Any = fastfreeze.trim(model)
    training = Training(model, task.calls(network), optimizer, layout=task.network.layout)
    if kept:
        _keep(training, task, network)
    return training


def _keep(training: Training, task: FineTask, network: fastfreeze.TrimmedModel) -> None:
    """Keep the values of what is frozen."""
    cache = fastfreeze.FeatureCache(network, enabled=True)

    def cached(x: Tensor, ids: Tensor) -> Tensor:
        return task.network.logits(cache(*task.arguments(x), samples=ids))

    def notes() -> dict:
        stats = cache.stats()
        counts = {"hits": stats.hits, "misses": stats.misses, "advanced": stats.advanced}
        return {**counts, "reason": cache.reason}

    training.network, training.notes = cached, notes


def with_lora(model: nn.Module, names: Sequence[str], head: nn.Module) -> nn.Module:
    """The model with peft's adapters of rank 8 at these modules; they and the head train."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(names))
    model = inject_adapter_in_model(config, model)
    head.requires_grad_(True)
    return model


def fetch(folder: Path, names: Sequence[str], how: str) -> None:
    """Bring files into a folder if one of these is missing.

    Args:
        how: a line, and then commands for a shell, with ``{folder}`` and ``{missing}``.
    """
    if all(next(folder.rglob(name), None) for name in names):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for line in how.format(folder=shlex.quote(str(folder)), missing="").splitlines()[1:]:
        command = line.strip().replace("pip ", f"{shlex.quote(sys.executable)} -m pip ", 1)
        subprocess.run(command, shell=True, check=True, cwd=folder)


Judged = dict[str, tuple[Tensor, Tensor]]  # inputs and labels, by what their record begins with


def trained_and_judged(
    method: Method,
    task: FineTask,
    counted: bool,
    sets: Judged,
    cut: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict:
    """The record of a run: of the training, and of the errors on the sets."""
    model, record = trained(method, task, counted, task.arguments)
    logits = task.calls(model.eval())
    for begin, (x, labels) in sets.items():
        found = judged(lambda x: logits(cut(x), x), x, labels)
        record |= {f"{begin}{name}": value for name, value in found.items()}
    return record


LONG = (4, 16, 64)  # epochs for what costs next to nothing


def methods(lrs: tuple[float, ...]) -> dict[str, Method]:
    """All of them, with one grid of learning rates."""

    def rival(make: Callable[[FineTask], Training], **options: Any) -> Method:
        return Method(make, lrs, **options)

    def own(make: Callable[[FineTask], Training], **options: Any) -> Method:
        return Method(make, lrs, ours=True, **options)

    def prefix(until: float, kept: bool = True, kind: Any = Frozen) -> Any:
        return partial(ours, schedule=partial(frozen, until=until, kind=kind), kept=kept)

    head = partial(by_hand, first=partial(from_stage, stage=-1))
    return {
        "everything trains": rival(by_hand),
        "half frozen, kept": own(prefix(0.5)),
        "three quarters frozen, kept": own(prefix(0.75)),
        "LoRA above half, kept": own(partial(lora, kept=True)),
        "all but the head frozen, kept": own(prefix(1), epochs=LONG),
        "head on stored features": rival(head_on_stored_features, epochs=LONG),
        "LoRA": rival(lora),
        "layer-wise rate decay": rival(partial(by_hand, rate=partial(cosine, decay=0.8))),
        "fastai's fine_tune": rival(fine_tune),
        "half frozen by hand": rival(half_by_hand),
        "half frozen, kept, then all thawed": own(prefix(0.5, kind=ThenThawed)),
        "all, then half frozen, kept": own(prefix(0.5, kind=ThenFrozen)),
        "head, then last block": rival(head_then_last_block),
        "gradual unfreezing by hand": rival(partial(by_hand, first=gradually)),
        "Lightning's BackboneFinetuning": rival(backbone_finetuning),
        "head only": rival(head),
        "half frozen, trimmed": own(prefix(0.5, kept=False)),
        "gradual unfreezing, trimmed": own(partial(ours, schedule=gradual, kept=False)),
        "FreezeOut, not scaled, kept": own(partial(ours, schedule=freezeout)),
    }
