"""What a command is asked to train, and how it is trained: resumable at each epoch's end."""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfreeze.cache import FeatureCache
from fastfreeze.clock import cpu_seconds
from fastfreeze.ensemble import PredictionScores, SnapshotEnsemble, evaluate, prediction_scores
from fastfreeze.files import write_atomic
from fastfreeze.layers.report import FreezeReport
from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.errors import RecipeError, optional_package
from fastfreeze.recipes.networks import (
    build_network,
    check_network,
    is_own,
    layers_of,
    load_weights,
    outline,
)
from fastfreeze.recipes.rundir import Line, RunDir, run_name
from fastfreeze.recipes.tables import Table
from fastfreeze.recipes.training import EVALUATION_BATCH, Method, predict, train_epoch
from fastfreeze.schedule import SnapshotCycles
from fastfreeze.snapshots import SnapshotStore


@dataclass(frozen=True)
class Experiment:
    """What to train on what, and for how long.

    Attributes:
        methods: in the order in which they run; their names differ.
        model, stem_stride: as in :func:`fastfreeze.recipes.networks.build_network`.
        data: what is trained, and tested in the end.
        epochs, batch_size: length of each training, and images in a step; >= 1.
        device: "cpu" or "cuda:<n>".
        weights: the file that all but the head's come from; None: they are drawn.
        validation: share of each class's training images that is held out; the weights of the
            epoch with the lowest error on them count, of ties the lowest NLL. 0: the last weights.
    """

    methods: tuple[Method, ...]
    model: str
    data: ImageData
    epochs: int
    batch_size: int
    device: str
    stem_stride: int = 1
    weights: str | None = None
    validation: float = 0.0

    @cached_property
    def read(self) -> ImageData:
        """The data that a training reads: images that are held out are its test images."""
        return self.data.held_out(self.validation) if self.validation else self.data

    @property
    def total_steps(self) -> int:
        """Optimizer steps in each training."""
        return self.epochs * self.read.steps_per_epoch(self.batch_size)

    @property
    def sizes(self) -> dict[str, int]:
        """What the network is built for."""
        sizes = {"num_classes": self.data.num_classes, "in_channels": self.data.in_channels}
        return {**sizes, "stem_stride": self.stem_stride}

    def build(self) -> torch.nn.Module:
        """A new network; the global generator draws the weights that no file has."""
        network = build_network(self.model, **self.sizes)
        if self.weights is not None:
            load_weights(network, self.weights)
        return network

    def outlined(self) -> tuple[torch.nn.Module, Tensor]:
        """The network, without values unless it is a user's own, and two images for it."""
        device = torch.device(self.device if is_own(self.model) else "meta")
        return outline(self.model, **self.sizes).to(device), self.read.example(device)

    def check(self) -> None:
        """Raise unless all of it can be trained.

        Raises:
            ValueError: values that are fine alone do not fit together.
            RecipeError: a network cannot be built, trained on these images, or split.
        """
        schedules = [method.schedule(self.total_steps) for method in self.methods]
        network, images = self.outlined()
        smallest = len(self.read.train.labels) % self.batch_size or self.batch_size
        check_network(self.model, network, images[:smallest], self.data.num_classes)
        if any(schedule.needs_layers for schedule in schedules):
            plan, _ = layers_of(self.model, network, images)
            for schedule in schedules:
                replace(plan, schedule=schedule)
        if self.weights is not None:
            load_weights(network, self.weights)


@dataclass
class _Totals:
    """Sums over a run, resumed or not."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0  # of training
    cpu_seconds: float = 0.0  # meanwhile, of all threads and of loader processes that have ended


class Run:
    """One method with one seed, continued from its checkpoint if it has one.

    Raises, here and in :meth:`finish`:
        RecipeError: a loss is not finite, a file cannot be read, or a package is not installed.
    """

    def __init__(
        self,
        method: Method,
        seed: int,
        experiment: Experiment,
        run_dir: RunDir,
        say: Callable[[str], None],
    ) -> None:
        self.method, self.seed, self.experiment = method, seed, experiment
        self.data = experiment.read
        self.error_name = "validation_error" if experiment.validation else "test_error"
        self.run_dir, self.say = run_dir, say
        self.name = run_name(method.name, seed)
        self.device = torch.device(experiment.device)
        torch.manual_seed(seed)
        model = experiment.build().to(self.device)
        schedule = method.schedule(experiment.total_steps)
        example = self.data.example(self.device)
        self.setup = method.set_up(model, schedule, method.lr, example)
        self.store: SnapshotStore | None = None
        if isinstance(schedule, SnapshotCycles):
            self.store = SnapshotStore(run_dir.snapshots(self.name))
        self.totals = _Totals()
        self._best: Line | None = None  # epoch, error, NLL and weights
        self._restore()
        if (plan := self.setup.plan) is not None:
            self.setup.report = FreezeReport(model, self.setup.optimizer, plan, example)
        self._frozen = self.setup.frozen_layers

    def finish(self, quiet: bool) -> None:
        """Train to the end, evaluate, and write the result down."""
        bar = optional_package("tqdm").tqdm(
            total=self.setup.schedule.total_steps,
            initial=self.totals.step,
            desc=self.name,
            unit="step",
            leave=False,
            disable=True if quiet else None,  # None: shown on a terminal
        )
        epochs = self.experiment.epochs
        with bar:
            while self.totals.epoch < epochs:
                error, epoch = self._epoch(bar.update), self.totals.epoch
                is_tenth = 10 * epoch // epochs > 10 * (epoch - 1) // epochs and epoch < epochs
                if bar.disable and is_tenth:
                    what = self.error_name.replace("_", " ")
                    self.say(f"{self.name}: epoch {epoch} of {epochs}, {what} {100 * error:.2f}%")
            result = self._result()
        said = [f"error {100 * result['error']:.2f}%, {result['seconds']:.1f} s"]
        if (cache := self.setup.cache) is not None:
            said.append(_told_of(cache))
            cache.close()
        if (report := self.setup.report) is not None and report.rows:
            said.append(report.summary)
            self._write("freezing", f"{report}\n")
        self.run_dir.add_result(result)
        for line in said:
            self.say(f"{self.name}: {line}")

    def _epoch(self, advance: Callable[[], Any]) -> float:
        """Train for an epoch; the error after it, on the images held out or else the test's."""
        totals, batch_size = self.totals, self.experiment.batch_size
        cpu_start, first = cpu_seconds(), totals.step
        batches = self.data.train_batches(self.seed, totals.epoch, batch_size, self.device)
        samples = self.data.train_order(self.seed, totals.epoch).split(batch_size)

        def after_step() -> None:
            self._after_step()
            advance()

        losses, seconds = train_epoch(self.setup, batches, self.device, after_step, samples)
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", step)
        totals.epoch += 1
        totals.seconds += sum(seconds)
        totals.cpu_seconds += cpu_seconds() - cpu_start
        scores = prediction_scores(self._predict(self.data), self.data.test.labels)
        self._log(
            "epoch",
            epoch=totals.epoch,
            lr=self.setup.rates,
            frozen_layers=list(self._frozen),
            train_loss=sum(losses) / len(losses),
            **{self.error_name: scores.error, self.error_name.replace("error", "nll"): scores.nll},
            seconds=totals.seconds,
            step_losses=[round(loss, 6) for loss in losses],
            step_seconds=[round(s, 6) for s in seconds],
        )
        if self.experiment.validation and self._is_best(scores):
            weights = self.setup.model.state_dict()
            copies = {key: value.to("cpu", copy=True) for key, value in weights.items()}
            own = {"epoch": totals.epoch, "error": scores.error, "nll": scores.nll}
            self._best = {**own, "weights": copies}
        self._save()
        return scores.error

    def _is_best(self, scores: PredictionScores) -> bool:
        """Whether an epoch has the lowest error so far; of ties, which few images give, the NLL."""
        best = self._best
        return best is None or (scores.error, scores.nll) < (best["error"], best["nll"])

    def _after_step(self) -> None:
        setup, totals = self.setup, self.totals
        totals.step += 1
        before, frozen = self._frozen, setup.frozen_layers
        if frozen != before:
            if new := set(frozen) - set(before):
                self._log("freeze", layers=sorted(new))
            if old := set(before) - set(frozen):
                self._log("thaw", layers=sorted(old))
            self._frozen = frozen
        if self.store is not None and totals.step in setup.schedule.cycle_ends:
            cycle = setup.schedule.cycle_ends.index(totals.step)
            self.store.save(setup.model, step=totals.step, cycle=cycle)
            self._log("snapshot", cycle=cycle)

    def _log(self, event: str, **values: Any) -> None:
        line = {"event": event, "method": self.method.name, "seed": self.seed}
        self.run_dir.log(line | {"step": self.totals.step, **values})

    def _write(self, what: str, text: str) -> None:
        write_atomic(self.run_dir.path / f"{what}-{self.name}.txt", text.encode())

    def _predict(self, data: ImageData) -> Tensor:
        """Probabilities of the data's test images by the present weights."""
        logits = predict(self.setup.model, data, self.device)
        if not logits.isfinite().all():
            raise self._diverged("the model's output is not finite", self.totals.step)
        return logits.softmax(1)

    def _diverged(self, what: str, step: int) -> RecipeError:
        return RecipeError(
            f"{self.name}: {what} at step {step}. Most likely the learning rate of "
            f"{self.method.lr:g} is too high; images or weights that are not finite do this too"
        )

    def _save(self) -> None:
        setup = self.setup
        state = {
            **asdict(self.totals),
            "model": setup.model.state_dict(),
            "optimizer": setup.optimizer.state_dict(),
            "scheduler": setup.scheduler and setup.scheduler.state_dict(),
            "random_state": torch.get_rng_state(),
            "best": self._best,
        }
        if self.device.type == "cuda":
            state["cuda_random_state"] = torch.cuda.get_rng_state(self.device)
        self.run_dir.save_checkpoint(self.name, state)

    def _restore(self) -> None:
        """Go on from the checkpoint; without one, note what starts."""
        setup = self.setup
        state = self.run_dir.load_checkpoint(self.name)
        if state is None:
            layers = [] if setup.plan is None else [layer.name for layer in setup.plan.layers]
            schedule = setup.schedule.config()
            self._log("start", schedule=schedule, lr=self.method.lr, layers=layers)
        else:
            with self.run_dir.using_checkpoint(self.name):
                self._load(state)
        if self.store is not None and any(s.step > self.totals.step for s in self.store):
            self.store.prune(keep=[s for s in self.store if s.step <= self.totals.step])

    def _load(self, state: Line) -> None:
        setup = self.setup
        self.totals = _Totals(**{field.name: state[field.name] for field in fields(_Totals)})
        self._best = state["best"]
        setup.model.load_state_dict(state["model"])
        setup.optimizer.load_state_dict(state["optimizer"])
        if setup.scheduler is not None:
            setup.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random_state"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random_state"], self.device)

    def _result(self) -> Line:
        totals, tested, plan = self.totals, self.experiment.data, self.setup.plan
        if self._best is not None:
            self.setup.model.load_state_dict(self._best["weights"])
            self.run_dir.save_best(self.name, self._best["weights"])
        own = prediction_scores(self._predict(tested), tested.test.labels)
        ensemble = None if self.store is None else self._evaluate_members(self.store)
        return {
            "method": self.method.name,
            "seed": self.seed,
            "error": own.error,
            "ensemble_error": ensemble and ensemble.error,
            "nll": (ensemble or own).nll,
            "ece": (ensemble or own).ece,
            "seconds": totals.seconds,
            "cpu_seconds": totals.cpu_seconds,
            "backward_removed": 0.0 if plan is None else plan.backward_saving or 0.0,
            "validation_error": self._best and self._best["error"],
            "best_epoch": self._best and self._best["epoch"],
        }

    def _evaluate_members(self, store: SnapshotStore) -> PredictionScores:
        """Write the members' scores on the test images; returns the ensemble's."""
        ensemble = SnapshotEnsemble.from_store(self.setup.model, store)
        batches = self.experiment.data.test_batches(EVALUATION_BATCH, self.device)
        evaluation = evaluate(ensemble, batches)
        self._write("ensemble", f"{evaluation}\n\n{ensemble.how_it_ran}\n")
        return evaluation.ensemble


def _told_of(cache: FeatureCache) -> str:
    counts = cache.stats()
    if not counts.hits:
        return f"no image came from the feature cache{': ' * bool(cache.reason)}{cache.reason}"
    share = counts.hits / (counts.hits + counts.misses)
    return f"{share:.0%} of the images came from the feature cache, {counts.bytes / 1e6:.0f} MB"


@dataclass(frozen=True)
class RunConfig(ABC):
    """What a run is asked to do; the fields are the command's options."""

    model: str
    data: str
    seed: int
    seeds: int
    device: str
    threads: int

    @abstractmethod
    def load(self, data_dir: Path | None, workers: int) -> ImageData:
        """The images, from the files in ``data_dir``, read by so many processes."""

    @abstractmethod
    def experiment(self, data: ImageData) -> Experiment:
        """The trainings that this asks for.

        Raises:
            ValueError: values that are fine alone do not fit together.
            RecipeError: the network cannot be built or split, or a package is missing.
        """

    @abstractmethod
    def outcome(self, results: Sequence[Line], data: ImageData) -> tuple[Table, Line]:
        """What the trainings have come to: a table for people, values for programs."""

    def run(
        self, data: ImageData, run_dir: RunDir, say: Callable[[str], None], quiet: bool
    ) -> tuple[Table, Line]:
        """Train each method with each seed, from where it stopped, and write the table.

        ``say`` gets a line for each training, and one for each tenth of it where there is no
        progress bar; ``quiet`` shows no bar.

        Raises:
            RecipeError: see :class:`Run`, or another process writes to the directory.
        """
        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)
        experiment = self.experiment(data)
        run_dir.rewind()
        if data.class_names:
            write_atomic(run_dir.path / "classes.txt", "\n".join([*data.class_names, ""]).encode())
        finished = {(r["method"], r["seed"]) for r in run_dir.results()}
        for seed in range(self.seed, self.seed + self.seeds):
            for method in experiment.methods:
                if (method.name, seed) not in finished:
                    gc.collect()  # the last network is in a cycle of references
                    Run(method, seed, experiment, run_dir, say).finish(quiet)
        table, values = self.outcome(run_dir.results(), data)
        write_atomic(run_dir.path / "table.txt", f"{table}\n".encode())
        return table, {**values, "results": run_dir.results()}
