"""Question: from scratch, does freezing give a model as good at a lower cost?

Its fair rival is a shorter training: a schedule of its own for each budget of epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastfreeze
from benchmarks.training_rivals import BEST_TORCH, FREEZING, HYPERS, NOT_FREEZING, Task, Training
from benchmarks.training_rivals import FLAGS as FLAGS_NAME
from benchmarks.worth import fashion
from benchmarks.worth.converging import GradientNorms, Movement, converging
from benchmarks.worth.question import Method, Question, Run
from benchmarks.worth.training import record
from fastfreeze.schedule import Schedule

TRAIN = 12_000
RATES = (0.05, 0.1, 0.2)
BUDGETS, FEW, LONGER = (5, 8, 12, 18), (8, 12, 18), (12, 18, 27)


def torch_alone(task: Task) -> Training:
    """One cosine; nothing freezes."""
    return NOT_FREEZING[BEST_TORCH](task, 1.0)


def composer(task: Task) -> Training:
    """Composer's layer freezing with its defaults, at each epoch's end.

    From half of the run on a growing share of the modules with parameters, from the input on, is
    taken out of the optimizer: all but the last when it ends. Norms stay in training mode.
    """
    training = torch_alone(task)
    leaves = [
        m
        for m in training.model.modules()
        if next(m.parameters(), None) is not None and next(m.children(), None) is None
    ]
    anneal = training.after_step

    def after_step(taken: int) -> None:
        anneal(taken)
        if taken % task.steps_per_epoch:
            return
        share = max(0.0, 2 * taken / task.total_steps - 1)
        for leaf in leaves[: int(share * (len(leaves) - 1))]:
            leaf.requires_grad_(False)
        (group,) = training.optimizer.param_groups
        group["params"] = [p for p in group["params"] if p.requires_grad]

    training.after_step = after_step
    return training


def following(
    task: Task, schedule: Schedule, start: Mapping[str, torch.Tensor] | None = None
) -> Training:
    """fastfreeze's SGD and trimmed network, in channels_last, from the weights ``start``."""
    model = task.build()
    plan = fastfreeze.split(model, task.images[:2], schedule=schedule, lr=task.lr)
    model.load_state_dict({} if start is None else start, strict=False)
    model.to(memory_format=torch.channels_last)
    follows = plan.schedule or schedule
    optimizer = fastfreeze.SGD(plan.param_groups(), task.lr, **HYPERS, schedule=follows)
    network = fastfreeze.trim(model)
    return Training(
        model, lambda images, ids: network(images), optimizer, layout=torch.channels_last
    )


def freezeout(task: Task, **options: Any) -> Training:
    return following(task, fastfreeze.FreezeOut(task.total_steps, **options))


def _ours(make: Any, epochs: tuple[int, ...] = FEW, **options: Any) -> Method:
    return Method(partial(make, **options), RATES, ours=True, epochs=epochs)


def _flags(t_0: float, epochs: tuple[int, ...]) -> Method:
    make = FREEZING[f"{FLAGS_NAME} channels_last fused"]
    return Method(partial(make, t_0=t_0), RATES, by_hand=True, epochs=epochs)


METHODS = {
    "torch": Method(torch_alone, RATES),
    "FreezeOut, t_0=0.8": _ours(freezeout, t_0=0.8),
    "FreezeOut, t_0=0.8, unscaled": _ours(freezeout, t_0=0.8, scale_lr=False),
    "FreezeOut, t_0=0.5, unscaled": _ours(freezeout, LONGER, t_0=0.5, scale_lr=False),
    "Composer's rule": Method(composer, RATES, epochs=FEW),
    "FreezeOut by flags, t_0=0.8": _flags(0.8, FEW),
    "FreezeOut by flags, t_0=0.5": _flags(0.5, LONGER),
    "FreezeOut, t_0=0.5": _ours(freezeout, LONGER, t_0=0.5),
    "FreezeOut, t_0=0.3, unscaled": _ours(freezeout, LONGER, t_0=0.3, scale_lr=False),
    "FreezeOut, t_0=0.3": _ours(freezeout, LONGER, t_0=0.3),
    "FreezeOut, t_0=0.8, unscaled, 3 stages": _ours(freezeout, t_0=0.8, scale_lr=False, stages=3),
    "FreezeOut, linear, t_0=0.5, unscaled": _ours(
        freezeout, t_0=0.5, how_scale="linear", scale_lr=False
    ),
    "AutoFreeze's rule": Method(
        partial(converging, rule=GradientNorms, anneal_epochs=0, trimmed=False), RATES, epochs=FEW
    ),
    "layers that move little": _ours(
        converging, rule=partial(Movement, share=0.2), anneal_epochs=1, trimmed=True
    ),
}


def run(asked: Run, folder: Path, counted: bool) -> dict:
    data = fashion.read(folder, TRAIN)
    task = data.task(asked.task, asked.epochs, asked.seed, asked.lr)
    return record(METHODS[asked.method], task, counted, data.sets)


QUESTION = Question(
    "From scratch: Fashion-MNIST, 12,000 training images",
    dict.fromkeys(("tiny-resnet20", "resnet20", "wrn16-2", "densenet-bc-40"), BUDGETS),
    METHODS,
    run,
    fashion.fetch,
)
