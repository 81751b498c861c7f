"""The callback for Hugging Face's Trainer, against the real one, on models made from a config."""

from __future__ import annotations

import importlib
import sys
from functools import partial

import pytest
import torch
from torch import nn

import fastfreeze
from fastfreeze.trimming import TrimmedModel
from tests.integrations.same import assert_same_bits, assert_same_snapshots
from tests.nets import tiny_bert

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fastfreeze.integrations.transformers import (  # noqa: E402
    FastfreezeCallback,
    IdleScheduler,
    Logits,
    total_steps,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES, BATCH, EPOCHS, CYCLES = 12, 4, 6, 3
STEPS = EPOCHS * SAMPLES // BATCH


def bert():
    return tiny_bert(max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.1)


def vit():
    encoder = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    encoder |= {"intermediate_size": 32, "hidden_dropout_prob": 0.1}
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=2, num_labels=3, **encoder
    )
    return transformers.ViTForImageClassification(config)


def resnet():
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 2]}
    config = transformers.ResNetConfig(num_channels=2, num_labels=3, layer_type="basic", **sizes)
    return transformers.ResNetForImageClassification(config)


def texts():
    mask = torch.ones(SAMPLES, 8, dtype=torch.long)
    mask[::3, 5:] = 0
    return {"input_ids": torch.randint(1, 50, (SAMPLES, 8)), "attention_mask": mask}


def images():
    return {"pixel_values": torch.randn(SAMPLES, 2, 8, 8)}


BERT, VIT, RESNET = (
    pytest.param(make, inputs, id=make.__name__)
    for make, inputs in ((bert, texts), (vit, images), (resnet, images))
)
LAYERS = {
    bert: ["embeddings", "layer.0", "layer.1", "layer.2", "pooler", "classifier"],
    vit: ["embeddings", "layer", "layer", "layer", "classifier"],
    resnet: [
        "embedder",
        *(f"stages.{stage}.layers.{layer}" for stage in (0, 1) for layer in (0, 1)),
        "classifier",
    ],
}


def samples(inputs):
    labels = torch.arange(SAMPLES) % 3
    return [
        {name: values[i] for name, values in inputs.items()} | {"labels": labels[i]}
        for i in range(SAMPLES)
    ]


def example_of(data):
    return tuple(v[None] for name, v in data[0].items() if name != "labels")


def trainer(model, data, directory, store=None, measured=False, **options):
    """A Trainer with its optimizer, its idle scheduler and the callback."""
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(directory),
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": EPOCHS,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
        }
        | options
    )
    run = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    schedule = fastfreeze.FreezeOutCycles(total_steps(run), num_cycles=CYCLES, t_0=0.5)
    example = example_of(data)
    plan = fastfreeze.split(model, example, schedule=schedule, lr=0.05)
    optimizer = fastfreeze.SGD(plan.param_groups(), 0.05, momentum=0.9, schedule=schedule)
    run.optimizer, run.lr_scheduler = optimizer, IdleScheduler(optimizer)
    report = {"plan": plan, "example_inputs": example} if measured else {}
    callback = FastfreezeCallback(model.base_model_prefix, store=store, **report)
    run.add_callback(callback)
    return run, optimizer, callback


@pytest.mark.parametrize(("make", "inputs"), [BERT, VIT, RESNET])
def test_embeddings_and_encoder_layers_are_layers(make, inputs):
    model = make()
    example = tuple(values[:2] for values in inputs().values())
    names = [layer.name for layer in fastfreeze.split(model, example).layers]
    assert len(names) == len(LAYERS[make])
    assert all(expected in name for name, expected in zip(names, LAYERS[make], strict=True))


@pytest.mark.parametrize(("make", "inputs"), [BERT, VIT, RESNET])
def test_a_training_freezes_evaluates_and_takes_snapshots(make, inputs, tmp_path):
    model, batch = make(), inputs()
    network = model.base_model
    store = fastfreeze.SnapshotStore(tmp_path / "snapshots")
    run, optimizer, _ = trainer(model, samples(batch), tmp_path, store, eval_strategy="epoch")
    seen = {True: set(), False: set()}
    model.register_forward_pre_hook(
        lambda m, *_: seen[m.training].add(type(getattr(m, m.base_model_prefix)))
    )
    run.train()
    assert optimizer.current_step == run.state.global_step == STEPS
    assert seen == {True: {TrimmedModel}, False: {type(network)}}
    assert model.base_model is network
    assert [(s.step, s.cycle) for s in store] == [(6, 0), (12, 1), (18, 2)]
    before, after = (store.load(s) for s in store.last(2))
    same = {name for name in before if torch.equal(before[name], after[name])}
    first = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert same >= {n for n, p in Logits(model).named_parameters() if id(p) in first}
    assert len(same) < len(before)

    ensemble = fastfreeze.SnapshotEnsemble.from_store(Logits(model), store)
    with torch.no_grad():
        members = [member.model(**batch).logits.softmax(1) for member in ensemble.members]
    torch.testing.assert_close(ensemble(**batch), sum(members) / 3, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("make", "inputs"), [BERT, RESNET])
def test_a_checkpoint_resumes_bit_for_bit(make, inputs, options, tmp_path):
    data, start = samples(inputs()), make().state_dict()
    half = 6 if "gradient_accumulation_steps" in options else 9
    kept = {"save_strategy": "steps", "save_steps": half}

    def train(name, checkpoint=None):
        model = make()
        model.load_state_dict(start)
        store = fastfreeze.SnapshotStore(tmp_path / f"snapshots-{name}")
        run, optimizer, _ = trainer(model, data, tmp_path / name, store, **kept, **options)
        run.train(resume_from_checkpoint=checkpoint)
        return model, store, optimizer

    whole, snapshots, optimizer = train("whole")
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{half}")
    resumed, late, again = train("resumed", checkpoint)
    assert again.current_step == optimizer.current_step == 2 * half
    assert again.frozen_layers == optimizer.frozen_layers != ()
    assert_same_bits(resumed.state_dict(), whole.state_dict())
    assert [s.cycle for s in snapshots] == [0, 1, 2]
    assert_same_snapshots(late, list(snapshots)[1:])


def test_what_is_frozen_is_kept_for_each_sample(tmp_path):
    inputs, start, trained = texts(), bert().state_dict(), []
    for name in (None, "index"):
        model = bert()
        model.load_state_dict(start)
        data = [row | {"index": torch.tensor(i)} for i, row in enumerate(samples(inputs))]
        options = {"remove_unused_columns": name is None, "eval_strategy": "epoch"}
        run, _, callback = trainer(model, samples(inputs), tmp_path, **options)
        run.train_dataset = data
        run.remove_callback(callback)
        make_cache = partial(fastfreeze.FeatureCache, enabled=True)
        callback = FastfreezeCallback("bert", samples=name, make_cache=make_cache)
        run.add_callback(callback)
        run.train()
        trained.append(model.state_dict())
        assert not model._forward_pre_hooks
    assert_same_bits(*trained)
    assert callback.cache.stats().hits > 0
    assert callback.cache.reason == "it is closed"


def test_another_optimizer_freezes_by_a_scheduler(tmp_path):
    data, start, half = samples(texts()), bert().state_dict(), 6

    def train(name, checkpoint=None):
        model = bert()
        model.load_state_dict(start)
        options = {"save_strategy": "steps", "save_steps": half, "gradient_accumulation_steps": 2}
        store = fastfreeze.MemorySnapshots()
        run, _, _ = trainer(model, data, tmp_path / name, store, **options)
        schedule = fastfreeze.FreezeOutCycles(total_steps(run), num_cycles=2, scale_lr=False)
        groups = fastfreeze.split(model, example_of(data)).param_groups(no_decay=True)
        run.optimizer = torch.optim.AdamW(groups, lr=0.01)
        run.lr_scheduler = scheduler = fastfreeze.FreezeScheduler(run.optimizer, schedule)
        run.train(resume_from_checkpoint=checkpoint)
        return model, scheduler, [snapshot.step for snapshot in store]

    model, scheduler, snapshots = train("whole")
    assert snapshots == [half, 2 * half]
    assert scheduler.current_step == 2 * half
    assert scheduler.frozen_layers == tuple(range(len(scheduler.frozen_layers))) != ()
    again, resumed, late = train("resumed", str(tmp_path / "whole" / f"checkpoint-{half}"))
    assert late == [2 * half]
    assert resumed.current_step == scheduler.current_step
    assert resumed.frozen_layers == scheduler.frozen_layers
    assert_same_bits(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param({}, 18, id="epochs"),
        pytest.param({"num_train_epochs": 1.5}, 5, id="half an epoch"),
        pytest.param({"gradient_accumulation_steps": 2}, 12, id="accumulation"),
        pytest.param({"per_device_train_batch_size": 5}, 18, id="a smaller last batch"),
        pytest.param({"max_steps": 7}, 7, id="max_steps"),
    ],
)
def test_total_steps_are_those_that_the_trainer_takes(options, steps, tmp_path):
    run, optimizer, _ = trainer(bert(), samples(texts()), tmp_path, **options)
    assert total_steps(run) == steps
    run.train()
    assert optimizer.current_step == run.state.max_steps == steps


def test_what_freezing_saves_is_reported_and_the_first_layers_rate_is_logged(tmp_path):
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 12}
    run, optimizer, callback = trainer(bert(), samples(texts()), tmp_path, measured=True, **options)
    run.train()
    num_layers = optimizer.param_groups[0]["num_layers"]
    events = [step for step, _ in optimizer.schedule.frozen_layers(num_layers)[1:]]
    assert [row.step for row in callback.report.rows] == events
    assert "the layers' times" in str(callback.report)
    logged = {row["step"]: row["learning_rate"] for row in run.state.log_history if "loss" in row}
    rates = {n: optimizer.schedule.lr(n - 1, 0.05, 0, num_layers) for n in logged}
    assert logged == pytest.approx(rates)


def test_a_training_that_failed_can_be_done_again(tmp_path):
    class Failing(transformers.TrainerCallback):
        def on_substep_end(self, *_, **__):
            raise ArithmeticError("in the middle")

    model = bert()
    network = model.bert
    run, optimizer, _ = trainer(model, samples(texts()), tmp_path, gradient_accumulation_steps=2)
    failing = Failing()
    run.add_callback(failing)
    with pytest.raises(ArithmeticError, match="in the middle"):
        run.train()
    run.remove_callback(failing)
    run.train()
    assert model.bert is network
    assert not optimizer._optimizer_step_post_hooks


def without_scheduler(run, _):
    run.lr_scheduler = None


def other_optimizer(run, model):
    run.optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run.lr_scheduler = IdleScheduler(run.optimizer)


def more_epochs(run, _):
    run.args.num_train_epochs = EPOCHS + 1


def unknown_part(run, _):
    run.callback_handler.callbacks[-1]._network = "vit"


def unknown_samples(run, _):
    run.callback_handler.callbacks[-1]._samples = "index"


MISTAKES = {
    without_scheduler: "must be an IdleScheduler, or a FreezeScheduler for an .* got LambdaLR",
    other_optimizer: "the schedulers, over parameters that train, got torch.optim.sgd.SGD",
    more_epochs: "total_steps=18, the training 21",
    unknown_part: r"BertForSequenceClassification \(bert, dropout, classifier\), got 'vit'",
    unknown_samples: "samples must be the name of an input, got 'index'",
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.items())
def test_mistakes_are_named_before_anything_trains(mistake, message, tmp_path):
    model = bert()
    run, optimizer, _ = trainer(model, samples(texts()), tmp_path)
    mistake(run, model)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert optimizer.current_step == 0


def test_data_without_a_length_need_max_steps(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(samples(texts()))

    run, _, _ = trainer(bert(), samples(texts()), tmp_path, max_steps=5)
    run.train_dataset = Stream()
    assert total_steps(run) == 5
    run.args.max_steps = -1
    with pytest.raises(ValueError, match="max_steps must be > 0"):
        total_steps(run)


def test_an_idle_scheduler_changes_nothing():
    optimizer = fastfreeze.SGD(nn.Linear(2, 2).parameters(), 0.1, total_steps=4)
    scheduler = IdleScheduler(optimizer)
    for step in range(4):
        assert scheduler.get_last_lr() == [optimizer.schedule.lr(step, 0.1)]
        optimizer.step()
        scheduler.step()
    other = IdleScheduler(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.5))
    other.load_state_dict(scheduler.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.5


def test_the_absence_of_transformers_is_a_clear_error(monkeypatch):
    name = "fastfreeze.integrations.transformers"
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install \"transformers\[torch\]\""):
        importlib.import_module(name)
