"""Rows of the papers: what they say, how much of them is run, and what a run of one tells."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastfreeze.recipes.models import build_model
from fastfreeze.recipes.names import DATA_NAMES, EMBEDDED
from fastfreeze.recipes.tables import METHOD_TITLES
from fastfreeze.reproduction.papers import SNAPSHOT_COLUMNS, Row, freezeout_rows, snapshot_rows
from fastfreeze.reproduction.reproduce import FreezeOutConfig, SnapshotConfig, scaled
from fastfreeze.schedule import SnapshotCycles, StepDecay, from_config
from tests.commands import ran, tiny_data

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = (*snapshot_rows(), *freezeout_rows())


def config(kind, model="small", data=EMBEDDED, **changes):
    fixed = {"scale": 1.0, "test_images": None, "seed": 0, "seeds": 1, "device": "cpu"}
    return kind(model=model, data=data, threads=1, **{**fixed, **changes})


@pytest.fixture(scope="module")
def data():
    return tiny_data(80, 24, num_classes=4)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.title}-{row.data}")
def test_rows_are_consistent(row):
    assert row.data in DATA_NAMES
    assert row.epochs % row.cycles == 0, "every cycle has as many epochs"
    assert row.stem_stride == (2 if row.data == "tinyimagenet" else 1)
    with torch.device("meta"):
        build_model(row.network, num_classes=200, stem_stride=row.stem_stride)
    if row.errors:
        assert tuple(row.errors) == SNAPSHOT_COLUMNS
        assert all(0.01 < error < 0.5 for error in row.errors.values())
        assert min(row.errors, key=row.errors.get).startswith("snapshot"), "the paper's point"
    assert row.in_paper == any(x is not None for x in (row.errors, row.time_saved))


def test_rows_are_those_of_the_papers():
    found = {(row.model, row.data): row for row in snapshot_rows()}
    assert len(found) == len(snapshot_rows()) == 18
    row = found["densenet100-24", "cifar100"]
    assert list(row.errors.values()) == [0.1925, 0.1930, 0.1812, 0.1741]
    assert (row.epochs, row.cycles, row.batch_size) == (300, 6, 64)
    row = found["resnet110", "tinyimagenet"]
    assert (row.epochs, row.cycles, row.batch_size) == (150, 6, 128)
    assert row.errors["snapshot-0.2"] == 0.394
    row = found["resnet32-w64", "svhn-extra"]
    assert (row.epochs, row.cycles, row.batch_size) == (40, 5, 64)
    assert ("densenet100-24", "svhn-extra") not in found
    budgets = {(row.epochs, row.batch_size) for row in freezeout_rows()}
    assert (budgets, len(freezeout_rows())) == ({(100, 50)}, 9)


def budget_of(row, scale, num_images, num_classes=10):
    return scaled(row, scale, num_images, num_classes, 1000, 1000)


CIFAR = snapshot_rows()[0]


@pytest.mark.parametrize(
    ("scale", "epochs", "num_images"),
    [
        (1, 200, 50_000),
        (0.5, 100, 50_000),
        (0.15, 30, 50_000),
        (0.1, 20, 50_000),
        (0.17, 35, 48_571),  # 34 epochs do not make 5 cycles
        (0.01, 5, 20_000),
        (0.001, 5, 2000),
        (1e-9, 5, 10),
    ],
)
def test_scale_takes_epochs_first_then_images(scale, epochs, num_images):
    budget = budget_of(CIFAR, scale, 50_000)
    assert (budget.epochs, budget.images) == (epochs, num_images)
    assert budget.share == pytest.approx(scale, rel=1e-4) or scale == 1e-9
    assert budget.comparable == (scale == 1)


@given(st.sampled_from(ROWS), st.floats(1e-6, 1), st.integers(100, 100_000), st.integers(2, 50))
def test_any_scale_gives_a_budget_that_trains(row, scale, num_images, num_classes):
    budget = budget_of(row, scale, num_images, num_classes)
    assert budget.epochs % row.cycles == 0
    assert row.cycles <= budget.epochs <= row.epochs
    assert num_classes <= budget.images <= num_images
    if num_images % row.batch_size != 1:
        assert budget.images % row.batch_size != 1 or budget.images <= row.batch_size
    steps = budget.epochs * math.ceil(budget.images / row.batch_size)
    assert len(SnapshotCycles(steps, num_cycles=row.cycles).cycle_ends) == row.cycles
    if budget.images > num_classes:  # never more than was asked for, but for rounding
        assert budget.share <= scale + (budget.epochs + 1) / (row.epochs * num_images)


def test_budgets_are_said_in_words():
    row = next(row for row in snapshot_rows() if row.model == "densenet40")
    assert str(budget_of(row, 1, 50_000)) == "the paper's budget: 300 epochs of 50,000 images"
    small = scaled(row, 0.001, 50_000, 10, 100, 10_000)
    assert str(small) == (
        "0.1% of the paper's budget: 6 epochs of 2,500 images; tested on 100 of 10,000 images; "
        "not comparable"
    )
    embedded = dataclasses.replace(row, data=EMBEDDED)
    assert str(budget_of(embedded, 1, 4000)).endswith(
        "; the paper has no such data; not comparable"
    )
    assert small.values()["words"] == str(small)
    assert small.values()["share"] == pytest.approx(0.001)
    freezeout = scaled(freezeout_rows()[0], 0.001, 50_000, 10, 10_000, 10_000)
    assert "1 epoch of 5,000 images" in str(freezeout)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 40])
def test_step_decay_is_torchs(total_steps):
    schedule = StepDecay(total_steps, num_cycles=1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, schedule.milestones)
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(schedule.lr(range(total_steps), 0.1), found, rtol=1e-12)
    assert from_config(schedule.config()) == schedule
    assert StepDecay(600, num_cycles=6).cycle_ends == (100, 200, 300, 400, 500, 600)


SMALL = {
    SnapshotConfig: Row("small", "Small", "resnet8-w4", EMBEDDED, 3, 16, 3),
    FreezeOutConfig: Row("small", "Small", "resnet8-w4", EMBEDDED, 2, 16, 1),
}


@pytest.fixture(autouse=True)
def _small_rows(monkeypatch):
    for kind, row in SMALL.items():
        monkeypatch.setattr(kind, "rows", (*kind.rows, row))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        for kind, row in SMALL.items():
            patch.setattr(kind, "rows", (row,))
            path = tmp_path_factory.mktemp("runs") / kind.__name__
            found[kind] = ran(path, data, config(kind, seeds=2), "reproduce")
    return found


def test_snapshot_row(finished):
    run_dir, table, values = finished[SnapshotConfig]
    results = run_dir.results()
    assert [(r["method"], r["seed"]) for r in results] == [
        (method, seed) for seed in (0, 1) for method in ("single", "snapshot-0.1", "snapshot-0.2")
    ]
    sources = {
        "single model": ("single", "error", "0.1"),
        "NoCycle": ("single", "ensemble_error", "0.1"),
        "Snapshot, lr 0.1": ("snapshot-0.1", "ensemble_error", "0.1"),
        "Snapshot, lr 0.2": ("snapshot-0.2", "ensemble_error", "0.2"),
    }
    for row, (title, (method, key, lr)) in zip(table.rows, sources.items(), strict=True):
        error = 100 * np.mean([r[key] for r in results if r["method"] == method])
        assert [row[0], row[1].split(" ± ")[0], *row[2:4]] == [title, f"{error:.2f}", "-", lr]
    told = "Small on mnist5k: the paper's budget: 3 epochs of 80 images; the paper has no"
    assert table.note.startswith(told)
    assert (run_dir.path / "table.txt").read_text() == f"{table}\n"
    assert values["budget"]["comparable"] is False
    json.dumps(values)
    lines = [line for line in run_dir.metrics() if (line["method"], line["seed"]) == ("single", 0)]
    assert from_config(lines[0]["schedule"]) == StepDecay(15, num_cycles=3)
    snapshots = [line["step"] for line in lines if line["event"] == "snapshot"]
    assert snapshots == [5, 10, 15]


def test_freezeout_row(finished):
    run_dir, table, _ = finished[FreezeOutConfig]
    results = {(r["method"], r["seed"]): r for r in run_dir.results()}
    assert {method for method, _ in results} == {"sgd", "freezeout-0.8", "freezeout-0.5"}
    for t_0, row in zip((0.8, 0.5), table.rows[1:], strict=True):
        pairs = [(results[f"freezeout-{t_0}", seed], results["sgd", seed]) for seed in (0, 1)]
        saved = [100 * (1 - own["seconds"] / plain["seconds"]) for own, plain in pairs]
        lost = [100 * (1 - (1 - own["error"]) / (1 - plain["error"])) for own, plain in pairs]
        assert float(row[6].split(" ± ")[0]) == pytest.approx(np.mean(saved), abs=0.051)
        assert float(row[2].split(" ± ")[0]) == pytest.approx(np.mean(lost), abs=0.051)
    removed = [results[f"freezeout-{t_0}", 0]["backward_removed"] for t_0 in (0.8, 0.5)]
    assert removed == sorted(removed)
    lines = run_dir.metrics()
    schedule = next(line["schedule"] for line in lines if line["method"] == "freezeout-0.5")
    assert (schedule["t_0"], schedule["how_scale"], schedule["scale_lr"]) == (0.5, "cubic", True)
    assert (run_dir.path / "freezing-freezeout-0.5-seed0.txt").exists()


def table_of(kind, model, data):
    """The table of a row on invented results: errors 25, 28, 31% after 10, 8, 6 s."""
    asked = config(kind, model, data)
    assert {method.name for method in asked.methods()} <= METHOD_TITLES.keys()  # for plots
    common = {"seed": 0, "ensemble_error": 0.2, "cpu_seconds": 12.5}
    results = [
        {**common, "method": method.name, "error": 0.25 + 0.03 * i, "seconds": 10.0 - 2 * i}
        for i, method in enumerate(asked.methods())
    ]
    return asked.table(results, "")


def test_ours_stands_beside_the_papers():
    table = table_of(SnapshotConfig, "densenet40", "cifar100")
    assert [row[1] for row in table.rows] == ["25.00", "20.00", "20.00", "20.00"]
    assert [row[2] for row in table.rows] == ["24.42", "24.63", "23.34", "21.93"]
    table = table_of(FreezeOutConfig, "densenet-bc-76", "cifar10")
    assert table.rows[0][2:] == ["-", "-", "10.0", "12.5", "-", "-"]
    assert table.rows[1][2:] == ["4.0", "3", "8.0", "12.5", "20.0", "20"]
    assert "The paper: up to 20% of the time saved, with a loss of 3% in accuracy." in table.note
    table = table_of(FreezeOutConfig, "vgg16", "cifar10")
    assert table.rows[2][3:] == ["-", "6.0", "12.5", "40.0", "0"]


def test_parts_are_balanced_and_the_network_is_the_papers(data):
    asked = config(SnapshotConfig, "densenet40", "cifar100", scale=0.01, test_images=8)
    budget, found = asked.budget(data), asked.experiment(data)
    assert (budget.images, budget.tested, budget.all_tested) == (40, 8, 24)
    assert found.data.train.labels.bincount().tolist() == [10] * 4
    assert found.data.test.labels.bincount().tolist() == [2] * 4
    assert (found.model, found.batch_size, found.epochs) == ("densenet40", 64, 6)


# DenseNet-100 and ResNet-110 are left out: they are the code of smaller ones.
@pytest.mark.train
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        *((SnapshotConfig, model) for model in ("resnet32-w64", "densenet40")),
        *((FreezeOutConfig, model) for model in ("vgg16", "densenet-bc-76", "wrn40-4")),
    ],
)
def test_every_network_runs_to_a_table(data, tmp_path, kind, model):
    asked = config(kind, model, scale=1e-9, test_images=10)
    asked.experiment(data).check()
    run_dir, table, _ = ran(tmp_path / "run", data, asked, "reproduce")
    assert len(table.rows) == (4 if kind is SnapshotConfig else 3)
    assert f"{asked.row.title} on mnist5k: " in table.note
    assert all(0 <= r["error"] <= 1 for r in run_dir.results())
    assert (run_dir.path / "table.txt").exists()
