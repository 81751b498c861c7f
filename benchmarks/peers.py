"""python -m benchmarks.peers: snapshot ensembles by this library and by others, in one table.

fastfreeze trains without freezing (SnapshotCycles) and with each composition of FreezeOutCycles.
torchensemble, if it is installed, trains by its own fit(). All start from the same weights, see the
same batches of MNIST digits, and use the same SGD. Plain torch then predicts from fastfreeze's
snapshots too, in a loop and by vmap, as user code would. Who predicts other probabilities than a
loop in float64 over its own snapshots is told of, and gets no numbers.

Trainings run one after the other, once each, and count everything from the optimizer's making to
the last saved file. Predictions of the test images are timed in turns: medians and quartiles. Their
memory is what the process grows by, at the highest, while it predicts a batch; the system tells it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import inspect
import itertools
import os
import pickle
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import interleave, machine
from benchmarks.memory import PeakMemory, release
from benchmarks.predict import Run, State, loop_of, vmap_of
from benchmarks.results import write_json
from fastfreeze import SnapshotEnsemble, SnapshotStore
from fastfreeze.ensemble import prediction_scores
from fastfreeze.recipes.data import ImageData, load_data
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.images import Images, MemoryImages
from fastfreeze.recipes.models import build_model
from fastfreeze.recipes.training import EVALUATION_BATCH, plain_sgd, set_up, train_epoch
from fastfreeze.schedule import Cosine, FreezeOutCycles, SnapshotCycles

TOLERANCE = 1e-6
CPU = torch.device("cpu")
TORCHENSEMBLE = "torchensemble"
LAST_K = 2  # cycles at the end that freeze


@dataclass(frozen=True)
class Task:
    """What all train on, from the same weights and batches."""

    model: str
    data: ImageData
    epochs: int
    members: int
    batch_size: int
    lr: float
    t_0: float
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.data.steps_per_epoch(self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        data = self.data
        return build_model(self.model, num_classes=data.num_classes, in_channels=data.in_channels)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.train_batches(self.seed, epoch, self.batch_size, CPU)


@dataclass
class Peer:
    """A row of the table.

    Attributes:
        trained_by, predicted_by: whom its first columns name.
        wrong: why it has no numbers; empty if it has.
        states: its snapshots.
        predict: from images to probabilities.
        facts: numbers by name.
        answers: to yes-or-no questions, by name, each with how that is known.
    """

    trained_by: str
    predicted_by: str
    wrong: str = ""
    states: Sequence[State] = ()
    predict: Run | None = None
    facts: dict[str, float] = field(default_factory=dict)
    answers: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.trained_by}: {self.predicted_by}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    command = shlex.join(
        ["python", "-m", "benchmarks.peers", *(sys.argv[1:] if argv is None else argv)]
    )
    facts = {"machine": machine(), "command": command}
    print(f"{facts['machine']}\n{command}\n", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        peers = compare(arguments.task, Path(directory), arguments.rounds)
    facts["peers"] = [_entry(peer) for peer in peers]
    print(table(peers))
    if arguments.out:
        write_json(arguments.out, facts)
    return int(any(peer.wrong for peer in peers if peer.trained_by != TORCHENSEMBLE))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny-resnet20")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--t-0", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="at most so many for training, and for the test")
    parser.add_argument("--rounds", type=int, default=9, help="of predicting the test images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args(argv)
    for name, least in (("epochs", 1), ("members", 2), ("batch_size", 1), ("rounds", 2)):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if arguments.epochs % arguments.members:
        parser.error(
            f"--epochs must be a multiple of --members, as torchensemble wants it, got "
            f"{arguments.epochs} and {arguments.members}"
        )
    try:
        arguments.task = _task(arguments)
        arguments.task.build()
        _schedules(arguments.task)
    except (RecipeError, ValueError) as error:
        parser.error(str(error))
    return arguments


def _task(arguments: argparse.Namespace) -> Task:
    data = load_data("mnist5k")
    if arguments.images is not None:
        train, test = (_some(images, arguments.images) for images in (data.train, data.test))
        data = replace(data, train=train, test=test)
    return Task(
        arguments.model,
        data,
        arguments.epochs,
        arguments.members,
        arguments.batch_size,
        arguments.lr,
        arguments.t_0,
        arguments.seed,
    )


def _some(images: Images, count: int) -> MemoryImages:
    """So many of them or all, evenly spaced: they are sorted by label."""
    if count < 1:
        raise ValueError(f"--images must be at least 1, got {count}")
    total = len(images.labels)
    return MemoryImages(*images[(torch.arange(min(count, total)) * total // count).tolist()])


def _schedules(task: Task) -> dict[str, SnapshotCycles]:
    steps, cycles = task.total_steps, task.members
    freezing = partial(FreezeOutCycles, steps, num_cycles=cycles, t_0=task.t_0)
    return {
        "fastfreeze, no freezing": SnapshotCycles(steps, num_cycles=cycles),
        "fastfreeze, sticky": freezing(composition="sticky"),
        f"fastfreeze, last_k={LAST_K}": freezing(composition="last_k", k=LAST_K),
        "fastfreeze, thaw": freezing(composition="thaw"),
    }


def compare(task: Task, directory: Path, rounds: int) -> list[Peer]:
    """All rows, with their numbers; files go to the directory."""
    plain = plain_sgd(task.build(), Cosine(task.total_steps), task.lr)
    train_epoch(plain, itertools.islice(task.batches(0), 3), CPU, lambda: None)  # first calls
    peers = []
    for i, (name, schedule) in enumerate(_schedules(task).items()):
        own = by_fastfreeze(task, name, schedule, directory / f"store-{i}")
        peers += [own, *by_hand(task, own, directory / f"files-{i}")]
    peers.append(by_torchensemble(task, directory / TORCHENSEMBLE))
    judge(task, peers, rounds)
    return peers


def by_fastfreeze(task: Task, name: str, schedule: SnapshotCycles, directory: Path) -> Peer:
    model = task.build()
    store = SnapshotStore(directory)
    steps = itertools.count(1)
    start = time.perf_counter()
    setup = set_up(model, schedule, task.lr, task.data.example(CPU))

    def after_step() -> None:
        step = next(steps)
        if step in schedule.cycle_ends:
            cycle = schedule.cycle_ends.index(step)
            store.save(model, step=step, cycle=cycle, schedule=schedule, wait=False)

    for epoch in range(task.epochs):
        train_epoch(setup, task.batches(epoch), CPU, after_step)
    store.flush()
    seconds = time.perf_counter() - start
    return Peer(
        name,
        "fastfreeze",
        states=[store.load(snapshot) for snapshot in store],
        predict=SnapshotEnsemble.from_store(model, store),
        facts={"training_seconds": seconds, "bytes_on_disk": store.bytes_on_disk},
        answers={
            "resumes": ("yes", "from the state dicts of model and optimizer, and the store"),
            "weights_only": ("yes", "safetensors and JSON: there is no pickle"),
        },
    )


def by_hand(task: Task, own: Peer, directory: Path) -> list[Peer]:
    """What a user would write for the same snapshots, each saved by torch.save."""
    directory.mkdir()
    paths = [directory / f"{i}.pt" for i in range(len(own.states))]
    for path, state in zip(paths, own.states, strict=True):
        torch.save(state, path)
    model = task.build()
    predict = {"torch loop": loop_of, "torch.func vmap": vmap_of}
    return [
        Peer(
            own.trained_by,
            name,
            states=own.states,
            predict=make(model, own.states),
            facts={"bytes_on_disk": sum(path.stat().st_size for path in paths)},
            answers={"weights_only": _loads_weights_only(paths)},
        )
        for name, make in predict.items()
    ]


class Loader:
    """The task's batches, an epoch each time, as torchensemble asks for them."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._epochs = itertools.count()
        self.dataset = self  # of which it asks for the classes; else it would read all to count
        self.classes = range(task.data.num_classes)

    def __len__(self) -> int:
        return self._task.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._task.batches(next(self._epochs))


def by_torchensemble(task: Task, directory: Path) -> Peer:
    """A row that says why, if it is not installed or cannot do it."""
    peer = Peer(TORCHENSEMBLE, TORCHENSEMBLE)
    try:
        from torchensemble import SnapshotEnsembleClassifier
    except ImportError as error:
        return replace(peer, wrong=f"not installed ({error})")

    class Estimator:  # a class, as it documents: an object would be saved as one more member
        def __new__(cls) -> nn.Module:
            return task.build()

    ensemble = SnapshotEnsembleClassifier(
        estimator=Estimator, n_estimators=task.members, cuda=False
    )
    plain = plain_sgd(task.build(), Cosine(task.total_steps), task.lr)
    ensemble.set_optimizer("SGD", **plain.optimizer.defaults)
    start = time.perf_counter()
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            ensemble.fit(Loader(task), epochs=task.epochs, save_dir=str(directory))
    except Exception as error:  # of whatever kind: it is not ours to mend
        return replace(peer, wrong=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    (path,) = directory.iterdir()
    fit = ", ".join(inspect.signature(ensemble.fit).parameters)
    saved = ", ".join(torch.load(path, weights_only=False))  # this process has written it
    return replace(
        peer,
        predicted_by=f"{TORCHENSEMBLE} {importlib.metadata.version(TORCHENSEMBLE)}",
        states=[member.state_dict() for member in ensemble.estimators_],
        predict=ensemble.predict,
        facts={"training_seconds": seconds, "bytes_on_disk": path.stat().st_size},
        answers={
            "resumes": (
                "no",
                f"its code makes model, optimizer and scheduler anew inside fit({fit}), "
                f"and its file, written at the end, holds {saved}",
            ),
            "weights_only": _loads_weights_only([path]),
        },
    )


def _loads_weights_only(paths: Sequence[Path]) -> tuple[str, str]:
    try:
        for path in paths:
            torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        reasons = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        return "no", f"tried: {(reasons or [str(error)])[0]}"
    return "yes", "tried"


@torch.no_grad()
def judge(task: Task, peers: Sequence[Peer], rounds: int) -> None:
    """Compare each with the loop in float64 over its snapshots; give the right ones numbers."""
    pairs = list(task.data.test_batches(EVALUATION_BATCH, CPU))
    batches, labels = [x for x, _ in pairs], torch.cat([y for _, y in pairs])
    truths: dict[str, Tensor] = {}
    runs: dict[str, Callable[[], Tensor]] = {}
    for peer in [peer for peer in peers if not peer.wrong]:
        if peer.trained_by not in truths:
            exact = loop_of(task.build().double(), peer.states)
            truths[peer.trained_by] = _all(exact, [x.double() for x in batches])
        probabilities = _all(peer.predict, batches)
        error = (probabilities.double() - truths[peer.trained_by]).abs().max().item()
        peer.facts["deviation"] = error
        if not error <= TOLERANCE:
            peer.wrong = f"{error:.1e} from the loop in float64"
            continue
        runs[peer.name] = partial(_all, peer.predict, batches)
        grown = grown_mb(partial(peer.predict, batches[0]))
        peer.facts |= {} if grown is None else {"predict_mb": grown}
        scores = prediction_scores(probabilities, labels)
        peer.facts |= {"error": scores.error, "nll": scores.nll, "ece": scores.ece}
    times = interleave(runs, rounds, burst=1) if runs else {}
    for peer in [peer for peer in peers if peer.name in times]:
        peer.facts |= {f"predict_{k}": v for k, v in asdict(times[peer.name]).items()}


def grown_mb(call: Callable[[], object]) -> float | None:
    """By how much the process grows during the call, in 10**6 bytes; None if nobody tells."""
    release(CPU)
    memory = PeakMemory(CPU)
    before = memory.mb()
    call()
    after = memory.mb()
    return None if before is None or after is None else after - before


def _entry(peer: Peer) -> dict:
    """What is written of a row."""
    return {
        "trained_by": peer.trained_by,
        "predicted_by": peer.predicted_by,
        "wrong": peer.wrong,
        "facts": peer.facts,
        "answers": {
            question: {"answer": answer, "how_known": how}
            for question, (answer, how) in peer.answers.items()
        },
    }


# Title, fact, factor, digits.
COLUMNS = (
    ("error %", "error", 100, 2),
    ("NLL", "nll", 1, 4),
    ("ECE", "ece", 1, 4),
    ("training s", "training_seconds", 1, 1),
    ("predict ms", "predict_median", 1e3, 1),
    ("low", "predict_low", 1e3, 1),
    ("high", "predict_high", 1e3, 1),
    ("MB to predict", "predict_mb", 1, 1),
    ("MB on disk", "bytes_on_disk", 1e-6, 3),
)
QUESTIONS = ("resumes", "weights_only")


def table(peers: Sequence[Peer]) -> str:
    """Markdown, and below it how the answers are known."""
    titles = ["trained by", "predicted by", *(title for title, *_ in COLUMNS), *QUESTIONS]
    rows = [titles, ["---"] * len(titles), *(_cells(peer) for peer in peers)]
    notes = {
        f"{peer.predicted_by}, {question}: {answer} ({how})": None
        for peer in peers
        for question, (answer, how) in peer.answers.items()
    }
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *notes])


def _cells(peer: Peer) -> list[str]:
    names = [peer.trained_by, peer.predicted_by]
    if peer.wrong:
        return [*names, f"no numbers: {peer.wrong}", *[""] * (len(COLUMNS) + len(QUESTIONS) - 1)]
    numbers = [
        f"{factor * peer.facts[key]:.{digits}f}" if key in peer.facts else "-"
        for _, key, factor, digits in COLUMNS
    ]
    return [*names, *numbers, *(peer.answers.get(q, ("-", ""))[0] for q in QUESTIONS)]


def _all(predict: Run, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([predict(x) for x in batches])


if __name__ == "__main__":
    sys.exit(main())
