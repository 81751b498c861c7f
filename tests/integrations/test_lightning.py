"""The callback for Lightning, against the real Trainer."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastfreeze
from fastfreeze.errors import FastfreezeWarning
from fastfreeze.trimming import TrimmedModel

lightning = pytest.importorskip("lightning.pytorch")
from fastfreeze.integrations.lightning import FastfreezeCallback, total_steps  # noqa: E402
from tests.integrations.same import assert_same_bits, assert_same_snapshots  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS, BATCHES, CYCLES = 6, 3, 3
STEPS = EPOCHS * BATCHES
HYPERS = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}


def network():
    def block(channels):
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.1),
        )

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(block(2), block(4), block(4), head)


def schedule_of(steps):
    return fastfreeze.FreezeOutCycles(steps, num_cycles=CYCLES, t_0=0.3, scale_lr=False)


def module_of(lightning):
    class Module(lightning.LightningModule):
        """Seeds each batch, as Lightning's checkpoints keep no random state."""

        def __init__(self, model, steps=None):
            super().__init__()
            self.model, self.steps = model, steps
            self.seen = {"train": set(), "valid": set()}

        def loss(self, batch, index):
            torch.manual_seed(1000 * self.current_epoch + index)
            self.seen["train"].add(type(self.model))
            images, labels = batch
            return F.cross_entropy(self.model(images).float(), labels)

        def training_step(self, batch, index):
            return self.loss(batch, index)

        def validation_step(self, batch, index):
            self.seen["valid"].add(type(self.model))
            self.model(batch[0])

        def configure_optimizers(self):
            schedule = schedule_of(self.steps or total_steps(self.trainer))
            example = torch.zeros(1, 2, 6, 6)
            self.plan = fastfreeze.split(self.model, example, schedule=schedule, lr=0.1)
            return fastfreeze.SGD(self.plan.param_groups(), 0.1, **HYPERS, schedule=schedule)

    class Manual(Module):
        """Takes two steps in each batch."""

        def __init__(self, model, steps=2 * STEPS):
            super().__init__(model, steps)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch, index))
                optimizer.step()

    return Module, Manual


Module, Manual = module_of(lightning)


class WithAdamW(Module):
    """Another optimizer, and a scheduler that freezes."""

    def configure_optimizers(self):
        self.plan, optimizer, scheduler = adamw(self.model)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def adamw(model, **options):
    plan = fastfreeze.split(model, torch.zeros(1, 2, 6, 6))
    optimizer = torch.optim.AdamW(plan.param_groups(), lr=0.01, **options)
    return plan, optimizer, fastfreeze.FreezeScheduler(optimizer, schedule_of(STEPS))


@pytest.fixture
def loader():
    images, labels = torch.randn(4 * BATCHES, 2, 6, 6), torch.randint(3, (4 * BATCHES,))
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def trainer(directory, *callbacks, framework=lightning, **options):
    return framework.Trainer(
        **{
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "default_root_dir": directory,
            "callbacks": list(callbacks),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        | options
    )


def steps_by_hand(network, optimizer, loader):
    """Takes the steps of a training; yields after each."""
    for epoch in range(EPOCHS):
        for index, (images, labels) in enumerate(loader):
            torch.manual_seed(1000 * epoch + index)
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            yield


class Numbered(Module):
    """Batches say which samples are in them."""

    def loss(self, batch, index):
        return super().loss(batch[:2], index)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_what_is_frozen_is_kept_for_each_sample(loader, tmp_path):
    tensors = (*loader.dataset.tensors, torch.arange(4 * BATCHES))
    numbered, start, trained = DataLoader(TensorDataset(*tensors), batch_size=4), network(), []
    for samples in (None, lambda batch: batch[2]):
        module = Numbered(copy.deepcopy(start))
        make_cache = partial(fastfreeze.FeatureCache, enabled=True)
        callback = FastfreezeCallback(samples=samples, make_cache=make_cache)
        trainer(tmp_path, callback, gradient_clip_val=0.1).fit(module, numbered)
        trained.append(module.model.state_dict())
    assert_same_bits(*trained)
    assert callback.cache.stats().hits > 0


def test_another_optimizer_freezes_by_a_scheduler(loader, tmp_path):
    expected = network()
    module = WithAdamW(copy.deepcopy(expected))
    store, snapshots = fastfreeze.MemorySnapshots(), fastfreeze.MemorySnapshots()
    example = torch.zeros(1, 2, 6, 6)
    callback = FastfreezeCallback(store=store, plan="plan", example_inputs=example)
    run = trainer(tmp_path, callback)
    run.fit(module, loader)
    _, optimizer, scheduler = adamw(expected)
    for _ in steps_by_hand(fastfreeze.trim(expected), optimizer, loader):
        scheduler.step()
        if scheduler.current_step in scheduler.schedule.cycle_ends:
            snapshots.save(expected, step=scheduler.current_step, cycle=len(snapshots))
    (found,) = [config.scheduler for config in run.lr_scheduler_configs]
    assert found.current_step == STEPS
    assert found.frozen_layers == scheduler.frozen_layers == (0, 1, 2)
    assert_same_bits(module.model.state_dict(), expected.state_dict())
    assert module.seen["train"] == {TrimmedModel}
    assert callback.report.rows[-1].frozen == (0, 1, 2)
    assert_same_snapshots(store, snapshots)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_fit_gives_the_bits_and_snapshots_of_a_loop_by_hand(package, loader, tmp_path):
    framework = pytest.importorskip(package)
    by_hand = network()
    module = module_of(framework)[0](network())
    module.model.load_state_dict(by_hand.state_dict())
    schedule, expected = schedule_of(STEPS), fastfreeze.SnapshotStore(tmp_path / "by_hand")
    plan = fastfreeze.split(by_hand, torch.zeros(1, 2, 6, 6), schedule=schedule, lr=0.1)
    optimizer = fastfreeze.SGD(plan.param_groups(), 0.1, **HYPERS, schedule=schedule)
    for _ in steps_by_hand(fastfreeze.trim(by_hand), optimizer, loader):
        if optimizer.current_step in schedule.cycle_ends:
            expected.save(by_hand, step=optimizer.current_step, cycle=len(expected))

    store = fastfreeze.SnapshotStore(tmp_path / "snapshots")
    callback = FastfreezeCallback("model", store=store)
    trainer(tmp_path, callback, framework=framework).fit(module, loader, loader)

    assert module.seen == {"train": {TrimmedModel}, "valid": {nn.Sequential}}
    assert_same_bits(module.model.state_dict(), by_hand.state_dict())
    assert_same_snapshots(store, expected)
    ensemble = fastfreeze.SnapshotEnsemble.from_store(module.model, store)
    torch.testing.assert_close(ensemble(next(iter(loader))[0]).sum(1), torch.ones(4))


@pytest.mark.parametrize(
    ("kind", "steps", "options"),
    [
        pytest.param(Module, 18, {}, id="plain"),
        pytest.param(Module, 12, {"accumulate_grad_batches": 2}, id="accumulation"),
        pytest.param(Module, 18, {"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param(Module, 18, {"gradient_clip_val": 0.5}, id="clipping"),
        pytest.param(Manual, 36, {}, id="manual, two steps a batch"),
    ],
)
def test_a_checkpoint_resumes_bit_for_bit(kind, steps, options, loader, tmp_path):
    start = network().state_dict()

    def fit(directory, checkpoint=None, **more):
        module = kind(network())
        module.model.load_state_dict(start)
        store = fastfreeze.SnapshotStore(directory)
        run = trainer(tmp_path, FastfreezeCallback(store=store), *more.pop("callbacks", ()), **more)
        run.fit(module, loader, ckpt_path=checkpoint)
        return module, store

    keep = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, snapshots = fit(tmp_path / "a", callbacks=[keep], enable_checkpointing=True, **options)
    half = tmp_path / f"epoch={EPOCHS // 2 - 1}.ckpt"
    resumed, late = fit(tmp_path / "b", half, **options)

    optimizer, again = whole.optimizers().optimizer, resumed.optimizers().optimizer
    assert optimizer.current_step == again.current_step == steps
    assert optimizer.schedule.total_steps == steps
    assert optimizer.frozen_layers == again.frozen_layers == (0, 1, 2)
    assert_same_bits(resumed.state_dict(), whole.state_dict())
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in whole.parameters())
    assert [s.cycle for s in snapshots] == [0, 1, 2]
    assert_same_snapshots(late, list(snapshots)[1:])


def test_what_freezing_saves_is_reported(loader, tmp_path):
    module = Module(network())
    callback = FastfreezeCallback(plan="plan", example_inputs=torch.zeros(1, 2, 6, 6))
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(module, loader)
    events = [step for step, _ in module.plan.schedule.frozen_layers(4)[1:]]
    assert [row.step for row in callback.report.rows] == events
    assert "the layers' times" in str(callback.report)


def test_a_report_of_several_steps_a_batch_is_refused(loader, tmp_path):
    callback = FastfreezeCallback(plan="plan", example_inputs=torch.zeros(1, 2, 6, 6))
    with pytest.raises(RuntimeError, match="one optimizer step for each batch, got 2"):
        trainer(tmp_path, callback).fit(Manual(network()), loader)


def test_a_training_that_fails_leaves_the_network_in_its_place(loader, tmp_path):
    class Failing(Module):
        def training_step(self, batch, index):
            if self.current_epoch == 1 and index == 1:
                raise ArithmeticError("in the middle")
            return super().training_step(batch, index)

    module = Failing(network())
    callback = FastfreezeCallback(plan="plan", example_inputs=torch.zeros(1, 2, 6, 6))
    with pytest.raises(ArithmeticError, match="in the middle"):
        trainer(tmp_path, callback).fit(module, loader)
    assert type(module.model) is nn.Sequential
    assert not any(m._forward_hooks for m in module.modules())
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


class Pair(Module):
    """Two networks, with an optimizer and a schedule for each."""

    def __init__(self, first, second):
        super().__init__(first)
        self.other = second
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer, part in zip(self.optimizers(), (self.model, self.other), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(part(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        first = super().configure_optimizers()
        schedule = fastfreeze.SnapshotCycles(STEPS, num_cycles=2)
        return first, fastfreeze.SGD(self.other.parameters(), 0.1, schedule=schedule)


def test_each_network_has_its_own_callback(loader, tmp_path):
    module = Pair(network(), nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    stores = {name: fastfreeze.MemorySnapshots() for name in ("model", "other")}
    callbacks = [FastfreezeCallback(name, store=stores[name]) for name in stores]
    trainer(tmp_path, *callbacks).fit(module, loader)
    assert [s.step for s in stores["model"]] == [6, 12, 18]
    assert [s.step for s in stores["other"]] == [9, 18]
    for name, store in stores.items():
        last = store.load(store.last(1)[0])
        assert_same_bits(last, module.get_submodule(name).state_dict())
    frozen = [not any(p.requires_grad for p in block.parameters()) for block in module.model]
    assert frozen == [True, True, True, False]


def test_a_step_that_is_skipped_for_an_overflow_takes_no_snapshot():
    model, store = network(), fastfreeze.MemorySnapshots()
    _, optimizer, scheduler = adamw(model, fused=True)
    callback, where = FastfreezeCallback(store=store), nn.ModuleDict({"model": model})
    known = {"total_steps": None, "saved": model, "plan": None, "example_inputs": None}
    callback._start(where, [optimizer], [scheduler], **known)
    for _ in range(STEPS // CYCLES):
        model(torch.randn(4, 2, 6, 6)).sum().backward()
        optimizer.step()
        scheduler.step()
    before = store.load(*store)
    model(torch.randn(4, 2, 6, 6)).sum().backward()  # the norms see another batch
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert_same_bits(store.load(*store), before)


class WithoutSchedule(Module):
    def configure_optimizers(self):
        return fastfreeze.SGD(self.parameters(), 0.1)


class WithAdam(Module):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


MISTAKES = {  # the module, its schedule's steps, options of the callback and of the trainer
    "no end": (Module, None, {}, {"max_epochs": -1}, "max_steps or max_epochs"),
    "network": (Module, None, {"network": "net"}, {}, r"of Module \(model\), got 'net'"),
    "optimizer": (WithAdam, None, {}, {}, r"fastfreeze.SGD, .* got torch.optim.adam.Adam"),
    "no schedule": (WithoutSchedule, None, {}, {}, "AdamW with a schedule"),
    "short schedule": (Module, 17, {}, {}, "total_steps=17, the training 18"),
    "no plan": (Module, None, {"plan": "steps"}, {}, "got 'steps', which is None"),
    "plan alone": (Module, None, {"plan": "plan"}, {}, "example_inputs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_anything_trains(mistake, loader, tmp_path):
    kind, steps, callback, options, message = MISTAKES[mistake]
    module = kind(network(), steps)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, FastfreezeCallback(**callback), **options).fit(module, loader)
    assert not module.seen["train"]


def test_a_training_that_ends_before_its_schedule_is_announced(loader, tmp_path):
    run = trainer(tmp_path, FastfreezeCallback())
    with pytest.warns(FastfreezeWarning, match="total_steps=30, the training 18"):
        run.fit(Module(network(), 30), loader)


def test_a_second_fit_of_a_module_trains_all_of_it_again(loader, tmp_path):
    module = Module(network())
    trained = []
    for again in (False, True, False):
        told = pytest.warns(FastfreezeWarning, match="do not train")
        with told if again else contextlib.nullcontext():
            trainer(tmp_path, FastfreezeCallback()).fit(module, loader)
        trained.append(len(module.plan.param_groups()))
        if len(trained) > 1:
            module.model.requires_grad_(True)
    assert trained == [4, 1, 4]


def test_the_absence_of_lightning_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    name = "fastfreeze.integrations.lightning"
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module(name)
