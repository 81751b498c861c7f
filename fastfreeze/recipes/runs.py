"""A whole run: every method and seed after one another, resumable at each epoch's end."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastfreeze._version import __version__
from fastfreeze.ensemble import (
    SnapshotEnsemble,
    SnapshotStore,
    error_rate,
    evaluate,
    expected_calibration_error,
    nll,
)
from fastfreeze.files import write_atomic
from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.errors import RecipeError, optional_package
from fastfreeze.recipes.memory import PeakMemory, release
from fastfreeze.recipes.models import build_model
from fastfreeze.recipes.plot import plot_ensemble
from fastfreeze.recipes.report import markdown_table, text_table
from fastfreeze.recipes.rundir import Line, RunDir, run_name
from fastfreeze.recipes.training import EVALUATION_BATCH, predict, set_up, train_epoch
from fastfreeze.schedule import (
    Composition,
    Cosine,
    FreezeOut,
    FreezeOutCycles,
    HowScale,
    Schedule,
    SnapshotCycles,
)

METHOD_NAMES = ("sgd", "freezeout", "snapshot", "both")


@dataclass(frozen=True)
class TrainConfig:
    """What a run is asked to do.

    Attributes:
        methods: some of :data:`METHOD_NAMES`, in the order in which they run.
        data, image_size: as in :func:`fastfreeze.recipes.data.load_data`.
        model: as in :func:`fastfreeze.recipes.models.build_model`.
        epochs, batch_size: length of the run, and images in a step; >= 1.
        lr: learning rate at the start, > 0.
        t_0, how_scale: FreezeOut's parameters, for "freezeout" and "both".
        cycles: snapshots, for "snapshot" and "both".
        composition, last_k: how "both" freezes; ``last_k`` counts for "last_k" alone.
        seed, seeds: the first seed, and how many from there on.
        device: "cpu" or "cuda:<n>".
        threads: torch's threads.
    """

    methods: tuple[str, ...]
    data: str
    image_size: int
    model: str
    epochs: int
    batch_size: int
    lr: float
    t_0: float
    how_scale: HowScale
    cycles: int
    composition: Composition
    last_k: int
    seed: int
    seeds: int
    device: str
    threads: int

    def schedule(self, method: str, total_steps: int) -> Schedule:
        """The schedule of a method.

        Raises:
            ValueError: the configuration and the number of steps do not fit together.
        """
        if method == "sgd":
            return Cosine(total_steps)
        if method == "freezeout":
            return FreezeOut(total_steps, t_0=self.t_0, how_scale=self.how_scale)
        if method == "snapshot":
            return SnapshotCycles(total_steps, num_cycles=self.cycles)
        return FreezeOutCycles(
            total_steps,
            num_cycles=self.cycles,
            t_0=self.t_0,
            how_scale=self.how_scale,
            composition=self.composition,
            k=self.last_k if self.composition == "last_k" else None,
        )

    def check(self, data: ImageData) -> None:
        """Raise ValueError where values that are fine alone do not fit together."""
        for method in self.methods:
            self.schedule(method, self.epochs * data.steps_per_epoch(self.batch_size))
        with torch.device("meta"):
            build_model(self.model, num_classes=data.num_classes, in_channels=data.in_channels)


def describe(config: TrainConfig) -> Line:
    """What config.json holds."""
    return {
        "fastfreeze": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "arguments": asdict(config),
    }


def run_all(
    config: TrainConfig, data: ImageData, run_dir: RunDir, say: Callable[[str], None], quiet: bool
) -> list[Line]:
    """Train every method that has not finished, from where it stopped, and write the tables.

    Args:
        config: what to do; the one of the run directory.
        data: the images.
        run_dir: where everything is written.
        say: takes a line for each method that finishes.
        quiet: no progress bars.

    Returns:
        The results, an entry per method and seed.

    Raises:
        RecipeError: a loss is not finite, a file cannot be read, or a package is not installed.
    """
    if {"snapshot", "both"} & set(config.methods):
        optional_package("matplotlib")  # before the training that its picture is of
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)
    run_dir.rewind()
    for seed in range(config.seed, config.seed + config.seeds):
        for method in config.methods:
            if any(r["method"] == method and r["seed"] == seed for r in run_dir.results()):
                continue
            run = _Run(method, seed, config, data, run_dir)
            result = run.finish(quiet)
            run_dir.add_result(result)
            say(f"{run.name}: error {100 * result['error']:.2f}%, {result['seconds']:.1f} s")
            if run.setup.report is not None and run.setup.report.rows:
                text = f"{run.setup.report}\n"
                write_atomic(run_dir.path / f"freezing-{run.name}.txt", text.encode())
                say(f"{run.name}: {run.setup.report.summary}")
    results = run_dir.results()
    write_atomic(run_dir.path / "table.txt", (text_table(results) + "\n").encode())
    write_atomic(run_dir.path / "table.md", (markdown_table(results) + "\n").encode())
    return results


@dataclass
class _Totals:
    """What a run adds up, over all its parts.

    Attributes:
        epoch, step: how many are done.
        seconds: training time.
        removed: sum over the steps of the share of the backward that was removed.
        peak_mb: highest use of memory while training.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    removed: float = 0.0
    peak_mb: float | None = None


class _Run:
    """One method with one seed, continued from its checkpoint if it has one."""

    def __init__(
        self, method: str, seed: int, config: TrainConfig, data: ImageData, run_dir: RunDir
    ) -> None:
        self.method, self.seed, self.config, self.data = method, seed, config, data
        self.run_dir = run_dir
        self.name = run_name(method, seed)
        self.device = torch.device(config.device)
        torch.manual_seed(seed)
        model = build_model(
            config.model, num_classes=data.num_classes, in_channels=data.in_channels
        ).to(self.device)
        total_steps = config.epochs * data.steps_per_epoch(config.batch_size)
        schedule = config.schedule(method, total_steps)
        self.setup = set_up(method, model, schedule, config.lr, data.example(self.device))
        self.store: SnapshotStore | None = None
        if isinstance(schedule, SnapshotCycles):
            self.store = SnapshotStore(run_dir.snapshots(self.name))
        self.totals = _Totals()
        self._restore()
        self.setup.measure(data.example(self.device))
        self._set_frozen(self.setup.frozen_layers)

    def finish(self, quiet: bool) -> Line:
        """Train to the end, and evaluate."""
        config, totals = self.config, self.totals
        bar = optional_package("tqdm").tqdm(
            total=self.setup.schedule.total_steps,
            initial=totals.step,
            desc=self.name,
            unit="step",
            leave=False,
            disable=True if quiet else None,  # None: shown on a terminal
        )
        with bar:
            while totals.epoch < config.epochs:
                self._epoch(bar.update)
        return self._result()

    def _epoch(self, advance: Callable[[], Any]) -> None:
        config, totals = self.config, self.totals
        release(self.device)
        memory = PeakMemory(self.device)
        batches = self.data.train_batches(self.seed, totals.epoch, config.batch_size, self.device)

        def after_step() -> None:
            self._after_step()
            advance()

        first = totals.step
        losses, seconds = train_epoch(self.setup, batches, self.device, after_step)
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", step)
        totals.epoch += 1
        totals.seconds += sum(seconds)
        peak = memory.mb()
        if peak is not None:
            totals.peak_mb = max(totals.peak_mb or 0.0, peak)
        self._log(
            "epoch",
            epoch=totals.epoch,
            lr=[group["lr"] for group in self.setup.optimizer.param_groups],
            frozen_layers=list(self._frozen),
            train_loss=sum(losses) / len(losses),
            test_error=error_rate(self._predict(), self.data.test.labels),
            seconds=totals.seconds,
            peak_memory_mb=peak,
            step_losses=[round(loss, 6) for loss in losses],
            step_seconds=[round(s, 6) for s in seconds],
        )
        self._save()

    def _after_step(self) -> None:
        setup, totals = self.setup, self.totals
        totals.step += 1
        totals.removed += self._removed
        frozen = setup.frozen_layers
        if frozen != self._frozen:
            for event, layers in (
                ("freeze", set(frozen) - set(self._frozen)),
                ("thaw", set(self._frozen) - set(frozen)),
            ):
                if layers:
                    self._log(event, layers=sorted(layers))
            self._set_frozen(frozen)
        if self.store is not None and totals.step in setup.schedule.cycle_ends:
            cycle = setup.schedule.cycle_ends.index(totals.step)
            self.store.save(setup.model, step=totals.step, cycle=cycle, schedule=setup.schedule)
            self._log("snapshot", cycle=cycle)

    def _set_frozen(self, frozen: tuple[int, ...]) -> None:
        self._frozen = frozen
        self._removed = self.setup.backward_removed()

    def _log(self, event: str, **values: Any) -> None:
        line = {"event": event, "method": self.method, "seed": self.seed, "step": self.totals.step}
        self.run_dir.log({**line, **values})

    def _predict(self) -> Tensor:
        """Probabilities of the test images by the present weights."""
        logits = predict(self.setup.model, self.data, self.device)
        if not logits.isfinite().all():
            raise self._diverged("the model's output is not finite", self.totals.step)
        return logits.softmax(1)

    def _diverged(self, what: str, step: int) -> RecipeError:
        return RecipeError(
            f"{self.name}: {what} at step {step}: try a lower --lr than {self.config.lr:g}"
        )

    def _save(self) -> None:
        setup = self.setup
        state = {
            **asdict(self.totals),
            "model": setup.model.state_dict(),
            "optimizer": setup.optimizer.state_dict(),
            "scheduler": setup.scheduler and setup.scheduler.state_dict(),
            "random_state": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_random_state"] = torch.cuda.get_rng_state(self.device)
        self.run_dir.save_checkpoint(self.name, state)

    def _restore(self) -> None:
        """Go on from the checkpoint; without one, note what starts."""
        setup = self.setup
        state = self.run_dir.load_checkpoint(self.name)
        if state is None:
            self._log(
                "start",
                schedule=setup.schedule.config(),
                lr=self.config.lr,
                layers=[] if setup.plan is None else [layer.name for layer in setup.plan.layers],
            )
            return
        self.totals = _Totals(**{field.name: state[field.name] for field in fields(_Totals)})
        setup.model.load_state_dict(state["model"])
        setup.optimizer.load_state_dict(state["optimizer"])
        if setup.scheduler is not None:
            setup.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random_state"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random_state"], self.device)

    def _result(self) -> Line:
        config, totals = self.config, self.totals
        labels = self.data.test.labels
        last = self._predict()
        ensemble = None
        if self.store is not None:
            members = SnapshotEnsemble.from_store(self.setup.model, self.store)
            ensemble = predict(members, self.data, self.device)
            self._write_evaluation(members, ensemble)
        best = last if ensemble is None else ensemble
        return {
            "method": self.method,
            "seed": self.seed,
            "error": error_rate(last, labels),
            "ensemble_error": None if ensemble is None else error_rate(ensemble, labels),
            "nll": nll(best, labels),
            "ece": expected_calibration_error(best, labels),
            "seconds": totals.seconds,
            "seconds_per_epoch": totals.seconds / config.epochs,
            "backward_removed": totals.removed / totals.step,
            "peak_memory_mb": totals.peak_mb,
        }

    def _write_evaluation(self, members: SnapshotEnsemble, probabilities: Tensor) -> None:
        """What each member is worth, in words and as a picture."""
        batches = self.data.test_batches(EVALUATION_BATCH, self.device)
        evaluation = evaluate(members, batches)
        text, path = f"{evaluation}\n\n{members.plan}\n", self.run_dir.path
        write_atomic(path / f"ensemble-{self.name}.txt", text.encode())
        picture = plot_ensemble(evaluation, probabilities, self.data.test.labels)
        write_atomic(path / f"ensemble-{self.name}.png", picture)
