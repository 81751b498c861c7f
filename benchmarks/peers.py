"""python -m benchmarks.peers: snapshot ensembles by this library and by torchensemble.

fastfreeze trains without freezing (SnapshotCycles) and with each composition of FreezeOutCycles.
torchensemble, if it is installed, trains by its own fit(). All start from the same weights, see the
same batches of MNIST digits, and use the same SGD. Plain torch then predicts from fastfreeze's
snapshots too, in a loop and by vmap, as user code would. Who predicts other probabilities than a
loop in float64 over its own snapshots gets no numbers.

Trainings run one after the other, once each, and count everything from the optimizer's making to
the last saved file. Predictions of the test images are timed in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import ensemble_cases as predicting
from benchmarks.case import OURS, Case, why
from benchmarks.clock import Times, machine, measured
from benchmarks.results import add, at_least, begun, parser
from fastfreeze import SnapshotEnsemble, SnapshotStore
from fastfreeze.ensemble import prediction_scores
from fastfreeze.recipes.data import ImageData, load_data
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.models import build_model
from fastfreeze.recipes.training import EVALUATION_BATCH, plain_sgd, set_up, train_epoch
from fastfreeze.schedule import Cosine, FreezeOutCycles, SnapshotCycles

CPU = torch.device("cpu")
TORCHENSEMBLE = "torchensemble"
SEED, LR, T_0 = 0, 0.1, 0.5
LAST_K = 2  # cycles at the end that freeze
SECONDS = 60  # for the predictions of an ensemble, about


@dataclass(frozen=True)
class Task:
    """What all train on, from the same weights and batches."""

    data: ImageData
    epochs: int
    members: int = 5
    batch_size: int = 64
    model: str = "tiny-resnet20"

    @property
    def total_steps(self) -> int:
        return self.epochs * self.data.steps_per_epoch(self.batch_size)

    def build(self) -> nn.Module:
        torch.manual_seed(SEED)
        data = self.data
        return build_model(self.model, num_classes=data.num_classes, in_channels=data.in_channels)

    @cached_property
    def x(self) -> list[Tensor]:
        """Test images, in batches."""
        return [x for x, _ in self.data.test_batches(EVALUATION_BATCH, CPU)]

    @property
    def labels(self) -> Tensor:
        """Of the test images."""
        return self.data.test.labels

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.train_batches(SEED, epoch, self.batch_size, CPU)

    def schedules(self) -> dict[str, SnapshotCycles]:
        steps, cycles = self.total_steps, self.members
        freezing = partial(FreezeOutCycles, steps, num_cycles=cycles, t_0=T_0)
        return {
            f"{OURS}, no freezing": SnapshotCycles(steps, num_cycles=cycles),
            f"{OURS}, sticky": freezing(composition="sticky"),
            f"{OURS}, last_k={LAST_K}": freezing(composition="last_k", k=LAST_K),
            f"{OURS}, thaw": freezing(composition="thaw"),
        }


class Trained(NamedTuple):
    """An ensemble: its snapshots, how it predicts, seconds of the training, and bytes on disk."""

    states: Sequence[predicting.State]
    predict: predicting.Predict
    seconds: float
    bytes_on_disk: int


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    results = begun(machine(), "benchmarks.peers", argv)
    for key, entry in entries(arguments.task, arguments.rounds):
        add(results, key, entry, arguments.out)
    return int(any(not entry["seconds"] for entry in results["results"].values()))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("benchmarks.peers", __doc__)
    made.add_argument("--epochs", type=at_least(1), default=15)
    made.add_argument("--images", type=at_least(1), help="train on so many, and test on them")
    made.add_argument("--rounds", type=at_least(2), default=9, help="of predictions, at most")
    made.add_argument("--threads", type=at_least(1), default=2)
    arguments = made.parse_args(argv)
    try:
        data = load_data("mnist5k")
    except RecipeError as error:
        made.error(str(error))
    if arguments.images is not None:
        data = data.part(min(arguments.images, len(data.train.labels)))
        data = replace(data, test=data.train)
    arguments.task = Task(data, arguments.epochs)
    if arguments.epochs % arguments.task.members:  # torchensemble wants it so
        made.error(f"--epochs must be a multiple of 5, got {arguments.epochs}")
    return arguments


def entries(task: Task, rounds: int) -> Iterator[tuple[str, dict]]:
    """Of the results: the trainings, and each ensemble's predictions."""
    plain = plain_sgd(task.build(), Cosine(task.total_steps), LR)
    train_epoch(plain, itertools.islice(task.batches(0), 3), CPU, lambda: None)  # first calls
    found, left_out = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, schedule) in enumerate(task.schedules().items()):
            found[name] = by_fastfreeze(task, schedule, Path(folder, str(i)))
        try:
            found[TORCHENSEMBLE] = by_torchensemble(task, Path(folder, TORCHENSEMBLE))
        except Exception as error:  # of whatever kind: it is not ours to mend
            left_out[TORCHENSEMBLE] = why(error)
    entry = {"name": "training", "left_out": left_out}
    entry["seconds"] = {n: asdict(Times(*[peer.seconds] * 3)) for n, peer in found.items()}
    entry["facts"] = {name: facts(task, peer) for name, peer in found.items()}
    yield "peers-training", entry
    for name in task.schedules():
        key = name.removeprefix(f"{OURS}, ").replace(" ", "-").replace("=", "-")
        yield f"peers-{key}", predictions(task, name, found, rounds)


def by_fastfreeze(task: Task, schedule: SnapshotCycles, folder: Path) -> Trained:
    """A training with saved snapshots."""
    model, store, steps = task.build(), SnapshotStore(folder), itertools.count(1)
    start = time.perf_counter()
    setup = set_up(model, schedule, LR, task.data.example(CPU))

    def after_step() -> None:
        step = next(steps)
        if step in schedule.cycle_ends:
            store.save(model, step=step, cycle=schedule.cycle_ends.index(step), wait=False)

    for epoch in range(task.epochs):
        train_epoch(setup, task.batches(epoch), CPU, after_step)
    store.flush()
    seconds = time.perf_counter() - start
    states = [store.load(snapshot) for snapshot in store]
    return Trained(states, SnapshotEnsemble(model, states), seconds, store.bytes_on_disk)


class Loader:
    """The task's batches, an epoch each time, as torchensemble asks for them."""

    def __init__(self, task: Task) -> None:
        self._task, self._epochs = task, itertools.count()
        self.dataset = self  # of which it asks for the classes; else it would read all to count
        self.classes = range(task.data.num_classes)

    def __len__(self) -> int:
        return self._task.data.steps_per_epoch(self._task.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._task.batches(next(self._epochs))


def by_torchensemble(task: Task, folder: Path) -> Trained:
    """Its own training; raises whatever it does, where it is not installed or cannot do it."""
    from torchensemble import SnapshotEnsembleClassifier

    class Estimator:  # a class, as it documents: an object would be saved as one more member
        def __new__(cls) -> nn.Module:
            return task.build()

    ensemble = SnapshotEnsembleClassifier(
        estimator=Estimator, n_estimators=task.members, cuda=False
    )
    plain = plain_sgd(task.build(), Cosine(task.total_steps), LR)
    ensemble.set_optimizer("SGD", **plain.optimizer.defaults)
    start = time.perf_counter()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        ensemble.fit(Loader(task), epochs=task.epochs, save_dir=str(folder))
    seconds = time.perf_counter() - start
    states = [member.state_dict() for member in ensemble.estimators_]
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Trained(states, ensemble.predict, seconds, size)


def facts(task: Task, peer: Trained) -> dict:
    """Errors on the test images, and bytes on disk."""
    scores = prediction_scores(torch.cat(predicting.run_of(peer.predict, task.x)()), task.labels)
    found = {name: getattr(scores, name) for name in ("error", "nll", "ece")}
    return {**found, "bytes_on_disk": peer.bytes_on_disk}


def predictions(task: Task, name: str, found: Mapping[str, Trained], rounds: int) -> dict:
    """The entry of an ensemble's predictions, beside those by hand and by torchensemble's own."""
    own, model = found[name], task.build()
    rivals = {
        OURS: (own, own.predict),
        predicting.LOOP: (own, predicting.loop_of(model, own.states)),
        predicting.VMAP: (own, predicting.vmap_of(model, own.states)),
    }
    if (theirs := found.get(TORCHENSEMBLE)) is not None:
        version = importlib.metadata.version(TORCHENSEMBLE)
        rivals[f"{TORCHENSEMBLE} {version}"] = (theirs, theirs.predict)
    case = Case(name=f"prediction, {name}")
    for rival, (peer, predict) in rivals.items():
        expected = predicting.exact(model, peer.states, task.x)
        predicting.add_prediction(case, rival, lambda predict=predict: predict, task.x, expected)
    return measured(case, rounds, SECONDS, bandwidth=1.0)


if __name__ == "__main__":
    sys.exit(main())
