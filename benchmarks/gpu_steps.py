"""Whole training steps for ``python -m benchmarks.gpu``: forward, loss, backward and update.

Random images that are on the device already; the same batch again and again. Each rival starts from
the same weights, and its losses and weights after a few steps must be those of torch's plain step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fastfreeze
from benchmarks.case import OURS, Rivals, Run
from benchmarks.clock import Clock, captured, peak_memory
from benchmarks.measure import quartiles
from benchmarks.optimizer_cases import SGD_VALUES, TOTAL_STEPS
from benchmarks.shapes import Shapes, network
from benchmarks.training_rivals import HYPERS, LR
from fastfreeze.ensemble import SnapshotEnsemble

WARM_UPS = 3  # eager steps; in graphs, those before the capture
GATE_STEPS = WARM_UPS + 2
# Of what the gate's steps change: in all weights together, and in each tensor that has a part in
# it. Rounding to bf16 elsewhere makes 0.02; momentum that is forgotten 0.5, a missing update 1.
TOLERANCE_OF_ALL, TOLERANCE_OF_EACH = 0.1, 0.5
LOSS_TOLERANCE = 0.02


@dataclass(kw_only=True)
class StepCase(Rivals):
    """Rivals for a training step, or another run that is measured in a loop.

    Attributes:
        peak_bytes: of each rival's first steps, beyond what was held before.
    """

    peak_bytes: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """A model, some of it frozen and in eval mode, and what it is trained on."""

    model: nn.Module
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Work:
    """What all rivals train.

    Attributes:
        model: a name of :func:`benchmarks.shapes.network`.
        batch_size, image_size: of the images.
        device: where all is.
        bf16: under autocast.
        channels_last: the layout of weights and images.
    """

    model: str
    batch_size: int
    image_size: int
    device: str
    bf16: bool = False
    channels_last: bool = False

    def start(self, frozen: int = 0) -> Start:
        """What each rival gets a copy of; ``frozen``: percent of the layers."""
        torch.manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        with torch.device(self.device):  # where random numbers are quicker
            images = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
            labels = torch.randint(10, (self.batch_size,))
            model = network(self.model)
        images, model = images.to(memory_format=layout), model.to(memory_format=layout)
        if frozen:
            with torch.no_grad():  # or norms in eval mode would let what they norm grow
                update_bn([images[:64]], model)
            layers = fastfreeze.split(model, images[:2]).layers
            for layer in layers[: round(frozen / 100 * len(layers))]:
                for parameter in layer.trainable:
                    parameter.requires_grad_(False)
                for name in layer.modules:
                    model.get_submodule(name).eval()
        return Start(model, images, labels)

    def autocast(self) -> AbstractContextManager:
        # Its cache of casts would outlive the graph in which they are made.
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16, cache_enabled=False)


@dataclass
class Training:
    """A run: one more step; in ``loss`` what it computed."""

    work: Work
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    loss: Tensor | None = None
    taken: int = 0
    replay: Run | None = None

    def __call__(self) -> None:
        self.taken += 1
        if self.replay is not None:
            self.replay()
        else:
            self.optimizer.zero_grad()
            self._step()

    def _step(self) -> None:
        with self.work.autocast():
            loss = F.cross_entropy(self.forward(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()

    def capture(self) -> None:
        """Steps on a stream of their own, as captures want them, then the step as a graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad()
        self.replay = captured(self._step, self.work.device)


@dataclass(frozen=True)
class Side:
    """One rival: whose SGD, and how the forward and the step run.

    Attributes:
        ours: our SGD with its schedule, else torch's fused one at a constant rate.
        trim: the trimmed network; else frozen parameters need no gradient, that is all.
        cache: which finds each batch.
        graph: the step as a CUDA graph; in a dry run on a CPU as it is.
    """

    ours: bool
    trim: bool = False
    cache: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        parts = [OURS if self.ours else "torch fused"]
        parts += [part for part in ("trim", "cache", "graph") if getattr(self, part)]
        return ", ".join(parts)

    def make(self, work: Work, start: Start) -> Training:
        model, images, labels = copy.deepcopy(start.model), start.images, start.labels
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.ours:
            schedule = fastfreeze.Cosine(TOTAL_STEPS)
            optimizer: torch.optim.Optimizer = fastfreeze.SGD(
                trained, LR, **HYPERS, schedule=schedule
            )
        else:
            optimizer = torch.optim.SGD(trained, LR, **HYPERS, fused=True)
        trimmed = fastfreeze.trim(model)
        forward = trimmed if self.trim else model
        training = Training(work, model, forward, optimizer, images, labels)
        if self.cache:
            features = fastfreeze.FeatureCache(trimmed, enabled=True)
            samples = torch.arange(len(labels))
            training.forward = lambda x: features(x, samples=samples)
        if self.graph and work.device == "cuda":
            training.capture()
        return training


PLAIN = [Side(False), Side(True), Side(False, graph=True), Side(True, graph=True)]
FROZEN = [
    Side(False),
    Side(True, trim=True),
    Side(True, trim=True, cache=True),
    Side(False, graph=True),
    Side(True, trim=True, graph=True),
]


def training_case(work: Work, frozen: int = 0, sides: list[Side] | None = None) -> StepCase:
    """Training steps with so many percent of the layers frozen, by the sides that agree."""
    case, start = StepCase(), work.start(frozen)
    before = start.model.state_dict()
    truth = Side(False).make(work, start)
    for _ in range(GATE_STEPS):
        truth()
    for side in sides or (FROZEN if frozen else PLAIN):
        with peak_memory(work.device) as peak:
            case.add(
                side.name,
                lambda side=side: side.make(work, start),
                lambda run: difference_of_trainings(run, truth, before),
            )
            if side.name in case.runs:
                case.peak_bytes[side.name] = peak()
    return case


def difference_of_trainings(
    found: Training, truth: Training, start: dict[str, Tensor]
) -> str | None:
    """What keeps a training from being the true one after as many steps; None if nothing does."""
    while found.taken < truth.taken:
        found()
    assert found.loss is not None
    assert truth.loss is not None
    loss, true_loss = found.loss.item(), truth.loss.item()
    if not abs(loss - true_loss) <= LOSS_TOLERANCE * abs(true_loss):
        return f"another loss: {loss:.4f}, torch's {true_loss:.4f}"
    trained = {name for name, _ in truth.model.named_parameters()}
    state, names, errors, changes = found.model.state_dict(), [], [], []
    for name, true in truth.model.state_dict().items():
        names.append(name)
        errors.append((state[name].double() - true.double()).norm().item())
        changes.append((true.double() - start[name].double()).norm().item())
    of_all = math.hypot(*(c for n, c in zip(names, changes, strict=True) if n in trained))
    beyond = math.hypot(*(e for n, e in zip(names, errors, strict=True) if n in trained))
    if not beyond <= TOLERANCE_OF_ALL * of_all:
        return f"another result: weights are {beyond / of_all:.1e} of their change from torch's"
    for name, error, change in zip(names, errors, changes, strict=True):
        part = 0.02 * TOLERANCE_OF_ALL * of_all if name in trained and change else 0.0
        if not error <= TOLERANCE_OF_EACH * change + part:
            return f"another result: {name}, which changed by {change:.1e}, is {error:.1e} off"
    return None


def ensemble_case(work: Work, num_members: int) -> StepCase:
    """The mean of members' probabilities for a batch, against a loop over the models."""
    case, start = StepCase(), work.start()
    models, images = [], start.images
    for seed in range(num_members):
        model = copy.deepcopy(start.model)
        torch.manual_seed(seed)
        models.append(model.eval().requires_grad_(False))
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))

    def loop() -> Tensor:
        total = torch.softmax(models[0](images), -1)
        for model in models[1:]:
            total += torch.softmax(model(images), -1)
        return total.div_(num_members)

    truth = loop()
    case.add("torch, loop", lambda: loop, lambda run: None)
    states = [model.state_dict() for model in models]
    ensembles = {how: SnapshotEnsemble(models[0], states, how=how) for how in ("loop", "shared")}
    ways = {how: lambda e=e: lambda: e(images) for how, e in ensembles.items()}
    if work.device == "cuda":
        ways["shared, graph"] = lambda: _graphed(ensembles["shared"], images)
    for how, start_run in ways.items():
        with peak_memory(work.device) as peak:
            case.add(f"{OURS} {how}", start_run, lambda run: _other_probabilities(run(), truth))
            case.peak_bytes[f"{OURS} {how}"] = peak()
    return case


def _graphed(ensemble: SnapshotEnsemble, images: Tensor) -> Run:
    module = ensemble.as_module(images)
    graphed = torch.cuda.make_graphed_callables(module, (images.clone(),))
    return lambda: graphed(images)


def _other_probabilities(found: Tensor, truth: Tensor) -> str | None:
    worst = (found - truth).abs().max().item()
    return None if worst <= 5e-3 else f"probabilities are off by up to {worst:.1e}"


def freeze_events(shapes: Shapes, clock: Clock, device: str, backend: str, steps: int) -> dict:
    """What the step in which a layer freezes costs, and the one after it, beside the others.

    About each seventh step freezes a layer; frozen weights are looked at in the end.
    """
    groups = shapes.groups(device, torch.float32)
    num_layers = len(groups)
    schedule = fastfreeze.FreezeOut(7 * num_layers, t_0=1 / num_layers, how_scale="linear")
    optimizer = fastfreeze.SGD(groups, schedule=schedule, backend=backend, **SGD_VALUES)
    kinds = ("another step", "a step that freezes", "the step after")
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    kept: dict[int, list[Tensor]] = {}
    frozen = 0
    for i in range(min(steps, 7 * num_layers - 1)):
        kind = kinds[2] if len(optimizer.frozen_layers) > frozen else kinds[0]
        frozen = len(optimizer.frozen_layers)
        seconds = clock.host(optimizer.step)
        if len(optimizer.frozen_layers) > frozen:
            kind = kinds[1]
        for layer in set(optimizer.frozen_layers) - set(kept):
            kept[layer] = [p.detach().clone() for p in groups[layer]["params"]]
        if i >= 3:
            times[kind].append(seconds)
    moved = [
        layer
        for layer, values in kept.items()
        if not all(torch.equal(p, v) for p, v in zip(groups[layer]["params"], values, strict=True))
    ]
    wrong = {f"{OURS} {backend}": f"frozen layers {moved} have moved"} if moved else {}
    runs = {
        kind: {
            "host_s": vars(quartiles([host for host, _ in seconds])),
            "wall_s": vars(quartiles([wall for _, wall in seconds])),
            "rounds": len(seconds),
        }
        for kind, seconds in times.items()
    }
    return {"status": "refused" if moved else "measured", "runs": runs, "left_out": wrong}
