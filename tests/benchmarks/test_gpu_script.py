"""benchmarks.gpu without a GPU: dry runs, its time limits, and what it writes."""

from __future__ import annotations

import json
import os
import re
import select
import sys
from pathlib import Path

import pytest
import torch

gpu = pytest.importorskip("benchmarks.gpu", reason="tests run outside the source tree")
from benchmarks import jobs  # noqa: E402
from benchmarks.cases import cases  # noqa: E402
from benchmarks.results import read_json, write_json  # noqa: E402
from tests.conftest import HAS_GPU, needs_cpu_kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def plan(tmp_path):
    return gpu.Plan("cpu", tmp_path, tmp_path, results={"stages": {}})


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        gpu.main([f"--out={tmp_path / 'results'}"])
    assert exit_info.value.code == 2
    assert "torch sees no CUDA device; --device cpu makes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_cpu_kernels
def test_a_dry_run(tmp_path):
    options = ["--device=cpu", "--no-build", "--stages", "smoke"]
    assert gpu.main([*options, f"--out={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "complete"
    assert results["machine"]["torch"] == torch.__version__
    assert list(results["stages"]) == ["build", "smoke"]
    found = results["stages"]["smoke"]["results"]
    assert found.keys() > {"sgd-tiny", "sgd-tiny-per-layer", "adamw-tiny", "softmax-2-33-17"}
    assert not any(entry["left_out"] or entry["seconds"] for entry in found.values())
    assert "copy_gb_per_s" in (tmp_path / "smoke.log").read_text()


@pytest.mark.slow
@needs_cpu_kernels
def test_a_dry_run_of_all(tmp_path):
    assert gpu.main(["--device=cpu", "--no-build", f"--out={tmp_path}"]) == 0
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert list(stages) == list(gpu.STAGES)
    assert stages["tests-cuda"]["counts"].keys() == {"passed"}
    assert all(entry["seconds"] for entry in stages["kernels"]["results"].values())
    assert len(list(tmp_path.iterdir())) <= 6  # few files travel more easily


def test_it_stops_after_a_failed_smoke(plan):
    def smoke(plan, stage, seconds):
        wrong = {"left_out": {"fastfreeze": "why"}, "seconds": {}}
        return {"status": "failed", "results": {"sgd-tiny": wrong}}

    gpu.run_stages(plan, {"smoke": (1, smoke), "steps": (1, smoke)}, 60)
    results = read_json(plan.out / "results.json")
    assert results == plan.results
    assert results["status"] == "stopped: the smoke failed"
    assert list(results["stages"]) == ["smoke"]
    assert gpu.failures(results) == ["smoke: failed", "  sgd-tiny: {'fastfreeze': 'why'}"]


def test_other_stages_do_not_keep_the_next_from_running(plan):
    def broken(plan, stage, seconds):
        raise RuntimeError("no")

    fine = lambda plan, stage, seconds: {"status": "ok"}  # noqa: E731
    gpu.run_stages(plan, {"kernels": (1, broken), "steps": (1, fine)}, 60)
    assert plan.results["status"] == "complete"
    assert gpu.failures(plan.results) == ["kernels: failed RuntimeError('no')"]


def test_what_a_stage_leaves_over_is_the_next_ones():
    stages = {"a": (10, None), "b": (30, None), "c": (10, None)}
    assert gpu.ends(stages, 100) == {"a": 20, "b": 80, "c": 100}
    assert max(gpu.ends(gpu.STAGES, gpu.MINUTES * 60).values()) < 580


@pytest.mark.parametrize(
    ("code", "seconds", "status", "exits"),
    [
        ("print('fine')", 60, "ok", []),
        ("raise SystemExit(1)", 60, "failed", [1]),
        ("", 0, "cut off", []),
    ],
)
def test_jobs_end(tmp_path, code, seconds, status, exits):
    log = tmp_path / "log"
    done = jobs.run_job([sys.executable, "-c", code], seconds, log)
    assert (done["status"], done.get("exit_statuses", [])) == (status, exits)
    assert (log.read_text() == "fine\n") == (status == "ok")


def test_a_job_that_is_cut_off_takes_its_children_along(tmp_path):
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    command = ["sh", "-c", "echo begun; sleep 600 > held & wait"]
    done = jobs.run_job(command, 2, tmp_path / "log", folder=tmp_path)
    assert done["status"] == "cut off"
    assert select.select([held], [], [], 20)[0], "the child still has it open"
    assert os.read(held, 1) == b""
    os.close(held)
    assert (tmp_path / "log").read_text() == "begun\n"


def test_a_job_that_dies_runs_again_while_it_gets_on(tmp_path):
    lines = tmp_path / "lines"
    code = f"open({str(lines)!r}, 'a').write('x'); import os; os.abort()"
    found = jobs.run_job(
        [sys.executable, "-c", code],
        60,
        tmp_path / "log",
        done=lambda: min(2, len(lines.read_text()) if lines.exists() else 0),
    )
    assert (found["status"], found["exit_statuses"]) == ("failed", [-6, -6, -6])


FAKE_TESTS = """
import os, pytest, signal
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="no time")
def test_left(): pass
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_error(broken): pass
def test_fatal(): os.kill(os.getpid(), signal.SIGKILL)
def test_after_it(): pass
def test_of_others(): pass
"""


def test_a_test_that_kills_its_process_does_not_keep_the_rest_from_running(plan, monkeypatch):
    pytest.importorskip("xdist")
    (plan.scratch / "tests").mkdir()
    (plan.scratch / "tests/test_fake.py").write_text(FAKE_TESTS)
    plan.device, plan.folder = "cuda", plan.scratch
    plan.environment = {"PYTHONPATH": str(gpu.ROOT)}
    monkeypatch.setattr(gpu, "TESTS", {"tests-fake": "not others"})
    monkeypatch.setattr(gpu, "files_of_a_gpu", lambda: ["tests/test_fake.py"])
    plan.results["stages"]["tests-fake"] = {}
    found = gpu.tests(plan, "tests-fake", 300)
    assert (found["status"], found["exit_statuses"]) == ("failed", [1])
    assert found["counts"] == {"passed": 2, "failed": 3, "skipped": 1}
    reasons = {test.rpartition("::")[2]: reason for test, reason in found["failures"].items()}
    assert "assert 1 == 2" in reasons["test_bad"]
    assert "no fixture" in reasons["test_error"]
    assert "crashed while running" in reasons["test_fatal"]
    assert found["skip_reasons"] == {"Skipped: no time": 1}
    written = read_json(plan.out / "results.json")["stages"]["tests-fake"]
    assert written["counts"] == found["counts"]


def test_files_with_tests_of_a_gpu_are_found():
    files = gpu.files_of_a_gpu()
    assert {"tests/kernels/test_steps.py", "tests/optim/test_optim.py"} < {*files}
    assert not {"tests/test_docs.py", "tests/cli/test_cli.py"} & {*files}


@pytest.mark.slow
def test_the_plan_counts_tests(capsys):
    assert gpu.main(["--plan"]) == 0
    text = capsys.readouterr().out
    assert "\nsteps: until " in text
    for stage in ("cuda", "triton"):
        (count,) = re.findall(rf"tests-{stage}.*?\n  (\d+)/\d+ tests collected", text, re.DOTALL)
        assert int(count) > 500


def test_the_cases_on_a_gpu():
    known = cases("cuda")
    assert known.keys() > {*gpu.KERNELS, "sgd-tiny-graph", "adamw-tiny-per-layer-graph"}
    assert {name.split("-")[0] for name in known} == {
        *("sgd", "adamw", "trim", "kept", "ensemble", "softmax", "statistics")
    }


def test_results_are_replaced_whole(tmp_path):
    path = tmp_path / "results.json"
    assert read_json(path) == {}
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_the_build_asks_no_registry_and_begins_anew(plan, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "run_job", lambda command, *a, **k: seen.append(command) or {})
    plan.source, plan.results["stages"]["build"] = gpu.ROOT, {}
    gpu.install(plan, "build", 1)
    (command,) = seen
    assert {"--no-deps", "--no-build-isolation", "--no-index", "--target"} <= set(command)
    sources = Path(command[-1])
    assert {p.name for p in sources.iterdir()} == set(gpu.SOURCES)
    assert not list(sources.rglob("*.so"))
    # What is installed is tested away from the sources.
    names = {p.name for p in plan.folder.iterdir()}
    assert names == {"tests", "benchmarks", "csrc", "pyproject.toml"}
    assert plan.environment["PYTHONPATH"].startswith(str(plan.scratch / "site"))
