"""What is trained, and one training of it: a method with a seed, resumable at each epoch's end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
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
from fastfreeze.recipes.networks import build_network, check_network, is_own, layers_of, outline
from fastfreeze.recipes.rundir import Line, RunDir, run_name
from fastfreeze.recipes.training import EVALUATION_BATCH, Method, predict, train_epoch
from fastfreeze.recipes.weights import load_weights
from fastfreeze.schedule import SnapshotCycles
from fastfreeze.snapshots import SnapshotStore


@dataclass(frozen=True)
class Experiment:
    """What to train, and for how long.

    Attributes:
        methods: in the order in which they run; their names differ.
        model, stem_stride: as in :func:`fastfreeze.recipes.networks.build_network`.
        epochs, batch_size: length of each training, and images in a step; >= 1.
        device: "cpu" or "cuda:<n>".
        weights: the file that all but the head's come from; None: they are drawn.
        validation: share of each class's training images that is held out; of the weights at each
            epoch's end those count that err least on them. 0: the last weights count.
    """

    methods: tuple[Method, ...]
    model: str
    epochs: int
    batch_size: int
    device: str
    stem_stride: int = 1
    weights: str | None = None
    validation: float = 0.0

    def total_steps(self, data: ImageData) -> int:
        """Optimizer steps in each training."""
        return self.epochs * data.steps_per_epoch(self.batch_size)

    def build(self, data: ImageData) -> torch.nn.Module:
        """A new network; what no file has the weights of, the global generator draws."""
        network = build_network(self.model, **self._sizes(data))
        if self.weights is not None:
            load_weights(network, self.weights)
        return network

    def parted(self, data: ImageData) -> ImageData:
        """What a training reads: the data, or those with the held out images as its tests."""
        return data.held_out(self.validation) if self.validation else data

    def check(self, data: ImageData) -> None:
        """See that all can be trained, before the first step.

        Raises:
            ValueError: values that are fine alone do not fit together.
            RecipeError: a network cannot be built, trained on these images, or split.
        """
        data = self.parted(data)
        schedules = [method.schedule(self.total_steps(data)) for method in self.methods]
        device = torch.device(self.device if is_own(self.model) else "meta")
        network = outline(self.model, **self._sizes(data)).to(device)
        images = data.example(device)
        smallest = len(data.train.labels) % self.batch_size or self.batch_size
        check_network(self.model, network, images[:smallest], data.num_classes)
        if any(schedule.needs_layers for schedule in schedules):
            plan, _ = layers_of(self.model, network, images)
            for schedule in schedules:
                replace(plan, schedule=schedule)
        if self.weights is not None:
            load_weights(network, self.weights)

    def _sizes(self, data: ImageData) -> dict[str, int]:
        return {
            "num_classes": data.num_classes,
            "in_channels": data.in_channels,
            "stem_stride": self.stem_stride,
        }


@dataclass
class _Totals:
    """What a run adds up, over all its parts.

    Attributes:
        epoch, step: how many are done.
        seconds: training time.
        cpu_seconds: CPU time meanwhile, of all threads and of loader processes that have ended.
        removed: sum over the steps of the share of the backward that was removed.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    removed: float = 0.0


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
        data: ImageData,
        run_dir: RunDir,
        say: Callable[[str], None],
    ) -> None:
        self.method, self.seed, self.experiment = method, seed, experiment
        self.data, self.tested = experiment.parted(data), data
        self.error_name = "validation_error" if experiment.validation else "test_error"
        self.run_dir, self.say = run_dir, say
        self.name = run_name(method.name, seed)
        self.device = torch.device(experiment.device)
        torch.manual_seed(seed)
        model = experiment.build(data).to(self.device)
        schedule = method.schedule(experiment.total_steps(self.data))
        example = data.example(self.device)
        self.setup = method.set_up(model, schedule, method.lr, example)
        self.store: SnapshotStore | None = None
        if isinstance(schedule, SnapshotCycles):
            self.store = SnapshotStore(run_dir.snapshots(self.name))
        self.totals = _Totals()
        self._best: Line | None = None  # epoch, error and weights
        self._restore()
        if self.setup.plan is not None:
            report = FreezeReport(model, self.setup.optimizer, self.setup.plan, example)
            self.setup.report = report
        self._set_frozen(self.setup.frozen_layers)

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
                    said = f"{self.error_name.replace('_', ' ')} {100 * error:.2f}%"
                    self.say(f"{self.name}: epoch {epoch} of {epochs}, {said}")
            result = self._result()
        cache, report = self.setup.cache, self.setup.report
        if report is not None and report.rows:
            self._write("freezing", f"{report}\n")
        self.run_dir.add_result(result)
        self.say(f"{self.name}: error {100 * result['error']:.2f}%, {result['seconds']:.1f} s")
        if cache is not None:
            self.say(f"{self.name}: {_told_of(cache)}")
            cache.close()
        if report is not None and report.rows:
            self.say(f"{self.name}: {report.summary}")

    def _epoch(self, advance: Callable[[], Any]) -> float:
        """Train for an epoch; the error behind it, of the test or the held out images."""
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
        error = prediction_scores(self._predict(self.data), self.data.test.labels).error
        self._log(
            "epoch",
            epoch=totals.epoch,
            lr=self.setup.rates,
            frozen_layers=list(self._frozen),
            train_loss=sum(losses) / len(losses),
            **{self.error_name: error},
            seconds=totals.seconds,
            step_losses=[round(loss, 6) for loss in losses],
            step_seconds=[round(s, 6) for s in seconds],
        )
        if self.experiment.validation and (self._best is None or error < self._best["error"]):
            weights = self.setup.model.state_dict()
            copies = {key: value.to("cpu", copy=True) for key, value in weights.items()}
            self._best = {"epoch": totals.epoch, "error": error, "weights": copies}
        self._save()
        return error

    def _after_step(self) -> None:
        setup, totals = self.setup, self.totals
        totals.step += 1
        totals.removed += self._removed
        before, frozen = self._frozen, setup.frozen_layers
        if frozen != before:
            for event, layers in (
                ("freeze", set(frozen) - set(before)),
                ("thaw", set(before) - set(frozen)),
            ):
                if layers:
                    self._log(event, layers=sorted(layers))
            self._set_frozen(frozen)
        if self.store is not None and totals.step in setup.schedule.cycle_ends:
            cycle = setup.schedule.cycle_ends.index(totals.step)
            self.store.save(setup.model, step=totals.step, cycle=cycle)
            self._log("snapshot", cycle=cycle)

    def _set_frozen(self, frozen: tuple[int, ...]) -> None:
        self._frozen = frozen
        self._removed = self.setup.backward_removed()

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
            f"{self.name}: {what} at step {step}: a learning rate of {self.method.lr:g} is too high"
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
            try:
                self._load(state)
            except Exception as error:  # of the many kinds that odd values provoke
                raise self.run_dir.damaged(self.name, error) from error
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
        totals, labels = self.totals, self.tested.test.labels
        if self._best is not None:
            self.setup.model.load_state_dict(self._best["weights"])
            self.run_dir.save_best(self.name, self._best["weights"])
        last = self._predict(self.tested)
        ensemble = None if self.store is None else self._evaluate_members(self.store)
        own = prediction_scores(last, labels)
        return {
            "method": self.method.name,
            "seed": self.seed,
            "error": own.error,
            "ensemble_error": ensemble and ensemble.error,
            "nll": (ensemble or own).nll,
            "ece": (ensemble or own).ece,
            "seconds": totals.seconds,
            "cpu_seconds": totals.cpu_seconds,
            "backward_removed": totals.removed / totals.step,
            "validation_error": self._best and self._best["error"],
            "best_epoch": self._best and self._best["epoch"],
        }

    def _evaluate_members(self, store: SnapshotStore) -> PredictionScores:
        """Write what each member is worth on the test images; the ensemble's scores."""
        ensemble = SnapshotEnsemble.from_store(self.setup.model, store)
        evaluation = evaluate(ensemble, self.tested.test_batches(EVALUATION_BATCH, self.device))
        self._write("ensemble", f"{evaluation}\n\n{ensemble.how_it_ran}\n")
        return evaluation.ensemble


def _told_of(cache: FeatureCache) -> str:
    counts = cache.stats()
    if not counts.hits:
        return f"no image came from the feature cache{': ' * bool(cache.reason)}{cache.reason}"
    share = counts.hits / (counts.hits + counts.misses)
    return f"{share:.0%} of the images came from the feature cache, {counts.bytes / 1e6:.0f} MB"
