"""benchmarks.gpu without a GPU: a dry run, its time limits, its gate, and what it writes."""

from __future__ import annotations

import json
import os
import select
import sys
import time

import pytest
import torch

gpu = pytest.importorskip("benchmarks.gpu", reason="tests run outside the source tree")
from benchmarks import gpu_bench, gpu_cases, outcomes  # noqa: E402
from benchmarks.clock import CpuClock, measure  # noqa: E402
from benchmarks.results import read_json, write_json  # noqa: E402
from benchmarks.shapes import Shapes, shapes_of  # noqa: E402
from tests.conftest import HAS_GPU, needs_cpu_kernels  # noqa: E402

TINY = Shapes([(7, 5), (64,), (3, 3, 3)], num_groups=2)


def dry_run(tmp_path, *more):
    out = tmp_path / "results.json"
    options = ["--device=cpu", "--no-build", "--rounds=2", f"--out={out}"]
    return gpu.main([*options, *more]), json.loads(out.read_text())


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        gpu.main([f"--out={tmp_path / 'results.json'}"])
    assert exit_info.value.code == 2
    assert "torch sees no CUDA device; --device cpu makes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_cpu_kernels
def test_a_dry_run_measures_every_kind_of_case(tmp_path):
    code, results = dry_run(tmp_path, "--no-tests")
    assert (code, results["status"]) == (0, "complete"), results
    assert results["machine"]["torch"] == torch.__version__
    assert results["benchmarks"]["backends"]["reference"] == "plain PyTorch, every device"
    cases = results["benchmarks"]["cases"]
    assert list(cases) == ["sgd", "sgd bf16, momentum fp32", "softmax", "statistics"]
    for case in cases.values():
        assert (case["status"], case["left_out"]) == ("measured", {})
        for times in case["runs"].values():
            for kind in ("wall_s", "device_s"):
                assert 0 < times[kind]["low"] <= times[kind]["median"] <= times[kind]["high"]
            assert times["share_of_copy_bandwidth"] > 0
    assert {"fastfreeze cpu", "fastfreeze reference", "torch fused", "torch foreach"} <= set(
        cases["sgd"]["runs"]
    )


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
"""


def test_tests_are_counted_up_to_where_pytest_dies(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_fake.py").write_text(FAKE_TESTS)
    log = tmp_path / "outcomes.jsonl"
    environment = {**gpu.test_environment(1, log), "PYTHONPATH": str(gpu.ROOT)}
    seen = []
    stage = gpu.run_stage(
        gpu.test_command(1), 300, tmp_path, environment, lambda: seen.append(outcomes.summary(log))
    )
    assert stage["status"] == "failed"
    assert seen[-1]["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert list(seen[-1]["failures"]) == [
        "tests/test_fake.py::test_bad",
        "tests/test_fake.py::test_error",
    ]
    assert "assert 1 == 2" in seen[-1]["failures"]["tests/test_fake.py::test_bad"]
    assert seen[-1]["skip_reasons"] == {"Skipped: no time": 1}


@pytest.mark.parametrize(
    ("code", "seconds", "status"),
    [("print('fine')", 60, "ok"), ("raise SystemExit(3)", 60, "failed"), ("", 0, "cut off")],
)
def test_stages_end(tmp_path, code, seconds, status):
    stage = gpu.run_stage([sys.executable, "-c", code], seconds, tmp_path, {})
    assert stage["status"] == status
    assert ("fine" in stage["output"]) == (status == "ok")


def test_a_stage_that_is_cut_off_takes_its_children_along(tmp_path):
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    command = ["sh", "-c", "sleep 600 > held & wait"]
    assert gpu.run_stage(command, 2, tmp_path, {})["status"] == "cut off"
    assert select.select([held], [], [], 20)[0], "the child still has it open"
    assert os.read(held, 1) == b""
    os.close(held)


def test_budget():
    clock = iter([0.0, 10.0, 80.0, 95.0, 130.0]).__next__
    budget = gpu.Budget(100, clock)
    assert budget.left() == 90
    assert budget.stage(limit=50, reserve=0) == 20
    assert budget.stage(limit=50, reserve=10) == 0
    assert budget.left() == 0


def test_cases_after_the_deadline_are_named(tmp_path):
    def never():
        raise AssertionError

    out = tmp_path / "out.json"
    results = gpu_bench.run_all({"late": never}, CpuClock(), 1e9, 2, out, time.monotonic() - 1)
    assert results["cases"] == {"late": {"status": "no time left"}}
    assert read_json(out) == results


@needs_cpu_kernels
@pytest.mark.parametrize("kind", ["sgd", "softmax", "statistics"])
def test_wrong_results_are_refused(monkeypatch, kind):
    make = {
        "sgd": lambda: gpu_cases.sgd_case(TINY, "cpu", ["cpu"]),
        "softmax": lambda: gpu_cases.softmax_case(3, 8, 10, "cpu", ["cpu"], compiled=False),
        "statistics": lambda: gpu_cases.statistics_case(3, 8, 10, "cpu", ["cpu"], compiled=False),
    }[kind]
    right = gpu_bench.entry(make, CpuClock(), 1e9, rounds=2)
    assert right["status"] == "measured"
    if kind == "sgd":
        ours = gpu_cases._ours
        monkeypatch.setattr(
            gpu_cases, "_ours", lambda g, *rest: ours([{**x, "lr": 0.11} for x in g], *rest)
        )
    else:
        name = f"ensemble_{kind}"
        function = getattr(gpu_cases, name)
        monkeypatch.setattr(
            gpu_cases,
            name,
            lambda members, *a, **k: function([z * 1.01 for z in members], *a, **k),
        )
    wrong = gpu_bench.entry(make, CpuClock(), 1e9, rounds=2)
    assert (wrong["status"], wrong["runs"]) == ("refused", {})
    assert "from fp64" in wrong["left_out"]["fastfreeze cpu"]


def test_rivals_that_do_not_run_are_named(monkeypatch):
    monkeypatch.setattr(torch, "stack", lambda members: members[99])
    case = gpu_cases.softmax_case(3, 8, 10, "cpu", ["reference"], compiled=False)
    assert list(case.runs) == ["fastfreeze reference", "eager loop"]
    assert "IndexError" in case.left_out["stack, softmax, mean"]
    assert not case.refused


def test_a_case_that_fails_is_an_entry():
    broken = gpu_bench.entry(lambda: 1 / 0, CpuClock(), 1e9, rounds=2)
    assert broken["status"] == "failed"
    assert "ZeroDivisionError" in broken["reason"]


def test_rivals_take_turns():
    order = []
    measure(CpuClock(), {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert "".join(order[6:]) == "aabbbbaa"


def test_failures_are_told():
    results = {
        "build": {"status": "ok"},
        "tests": {"status": "cut off"},
        "benchmarks": {"cases": {"a": {"status": "measured"}, "b": {"status": "refused"}}},
    }
    assert gpu.failures(results) == ["tests: cut off", "b: refused"]


@pytest.mark.parametrize(
    ("model", "num_groups", "millions"),
    [("resnet110", 110, 1.7), ("wrn40-4", 40, 8.9), ("vgg16", 1, 14.7), ("resnet50", 1, 25.6)],
)
def test_shapes(model, num_groups, millions):
    if model == "resnet50":
        pytest.importorskip("torchvision")
    shapes = shapes_of(model)
    groups = Shapes(shapes, num_groups).groups("cpu", torch.bfloat16)
    assert len(groups) == num_groups
    assert all(g["params"] for g in groups)
    numel = sum(p.numel() for g in groups for p in g["params"])
    assert round(numel / 1e6, 1) == millions


def test_the_cases_on_a_gpu():
    names = set(gpu_bench.cases_on_gpu(["cuda", "triton"]))
    shapes = ["(5, 4096, 1000)", "(5, 256, 10)", "(5, 1024, 100)", "(6, 4096, 1000)"]
    for shape in [*shapes, "(10, 64, 50257)"]:
        assert {f"softmax {shape}", f"statistics {shape}"} <= names
    for model in ("resnet110", "wrn40-4", "vgg16", "resnet50", "flat 100M"):
        assert any(name.startswith(f"sgd {model}") for name in names)


def test_results_are_replaced_whole(tmp_path):
    path = tmp_path / "results.json"
    assert read_json(path) == {}
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_is_installed_is_tested_away_from_the_sources(tmp_path):
    gpu.outside_the_sources(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"tests", "benchmarks", "pyproject.toml"}


@pytest.mark.parametrize("wheel", [None, "fastfreeze.whl"])
def test_the_build_asks_no_registry(tmp_path, wheel):
    command = gpu.build_command(None if wheel is None else tmp_path / wheel)
    assert {"--no-deps", "--no-build-isolation", "--no-index"} <= set(command)
    assert command[-1] == (str(tmp_path / wheel) if wheel else ".")
