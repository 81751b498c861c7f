"""benchmarks.gpu without a GPU: dry runs, its time limits, its gates, and what it writes."""

from __future__ import annotations

import json
import os
import re
import select
import sys
import time
from pathlib import Path

import pytest
import torch

gpu = pytest.importorskip("benchmarks.gpu", reason="tests run outside the source tree")
from benchmarks import gpu_bench, gpu_cases, gpu_smoke, gpu_steps, gpu_tests, jobs  # noqa: E402
from benchmarks.clock import CpuClock, measure, measure_loop  # noqa: E402
from benchmarks.gpu_bench import Bench  # noqa: E402
from benchmarks.results import read_json, write_json  # noqa: E402
from benchmarks.shapes import Shapes, shapes_of  # noqa: E402
from tests.conftest import HAS_GPU, needs_cpu_kernels  # noqa: E402

TINY = Shapes([(7, 5), (64,), (3, 3, 3)], num_groups=2)
WORK = gpu_steps.Work("resnet8-w4", 4, 8, "cpu")
BENCH = Bench("cpu", ["cpu"], CpuClock(), 1e9)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        gpu.main([f"--out={tmp_path / 'results'}"])
    assert exit_info.value.code == 2
    assert "torch sees no CUDA device; --device cpu makes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_cpu_kernels
def test_a_dry_run(tmp_path):
    options = ["--device=cpu", "--no-build", "--stages", "smoke", "tools"]
    assert gpu.main([*options, f"--out={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "complete"
    assert results["machine"]["torch"] == torch.__version__
    stages = results["stages"]
    assert list(stages) == ["build", "smoke", "tools"]
    assert stages["smoke"]["backends"]["reference"] == "plain PyTorch, every device"
    assert {check["status"] for check in stages["smoke"]["checks"].values()} == {"ok"}
    assert "reference: graph, sgd" in (tmp_path / "smoke.log").read_text()


@needs_cpu_kernels
def test_a_part_is_written_with_what_it_is_to_be_seen_beside(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rest.json"
    monkeypatch.setattr(sys, "argv", ["gpu_bench", "rest", "--device=cpu", f"--out={out}"])
    gpu_bench.main()
    results = json.loads(out.read_text())
    assert results["nothing"].keys() == {"empty kernel"}
    assert results["copy_bytes_per_s"] > 0
    assert {case["status"] for case in results["cases"].values()} == {"measured"}
    assert "softmax, bf16 measured" in capsys.readouterr().out


def test_few_files_are_written(tmp_path):
    run = gpu.Run("cpu", gpu.Report(tmp_path / "results.json", {"stages": {}}), tmp_path)
    assert len({run.report.path, *(run.log(name) for name, _, _ in gpu.PLAN)}) <= 8


def test_it_stops_after_a_failed_smoke(tmp_path):
    def smoke(run, seconds):
        return {"status": "failed", "checks": {"cuda: sgd": {"status": "failed", "reason": "why"}}}

    report = gpu.Report(tmp_path / "results.json", {"stages": {}})
    gpu.run_plan(gpu.Run("cpu", report, tmp_path), [("smoke", 1, smoke), ("steps", 1, smoke)], 60)
    results = read_json(report.path)
    assert results["status"] == "stopped: the smoke failed"
    assert list(results["stages"]) == ["smoke"]
    assert gpu.failures(results) == ["smoke: failed", "  cuda: sgd: why"]


def test_other_stages_do_not_keep_the_next_from_running(tmp_path):
    def broken(run, seconds):
        raise RuntimeError("no")

    report = gpu.Report(tmp_path / "results.json", {"stages": {}})
    fine = ("steps", 1, lambda run, seconds: {"status": "ok"})
    gpu.run_plan(gpu.Run("cpu", report, tmp_path), [("kernels", 1, broken), fine], 60)
    assert report.results["status"] == "complete"
    assert gpu.failures(report.results) == ["kernels: failed RuntimeError('no')"]


def test_what_a_stage_leaves_over_is_the_next_ones():
    plan = [("a", 10, None), ("b", 30, None), ("c", 10, None)]
    assert gpu.ends(plan, 100) == {"a": 20, "b": 80, "c": 100}
    assert max(gpu.ends(gpu.PLAN, gpu.MINUTES * 60).values()) < 580


@pytest.mark.parametrize(
    ("code", "seconds", "status"),
    [("print('fine')", 60, "ok"), ("raise SystemExit(3)", 60, "failed"), ("", 0, "cut off")],
)
def test_jobs_end(tmp_path, code, seconds, status):
    log = tmp_path / "log"
    done = jobs.run_jobs([jobs.Job("a", [sys.executable, "-c", code])], seconds, log)
    assert (done["status"], done["jobs"]["a"]["status"]) == (status, status)
    assert (log.exists() and log.read_text() == "--- a\nfine\n") == (status == "ok")


def test_a_job_that_is_cut_off_takes_its_children_along(tmp_path):
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    command = ["sh", "-c", "echo begun; sleep 600 > held & wait"]
    job = jobs.Job("held", command, folder=tmp_path)
    assert jobs.run_jobs([job], 2, tmp_path / "log")["status"] == "cut off"
    assert select.select([held], [], [], 20)[0], "the child still has it open"
    assert os.read(held, 1) == b""
    os.close(held)
    assert (tmp_path / "log").read_text() == "--- held\nbegun\n"


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


def test_a_test_that_kills_its_process_does_not_keep_the_rest_from_running(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_fake.py").write_text(FAKE_TESTS)
    selection = gpu_tests.Selection("not others", {"test_fake.py": 1})
    environment, seen = {"PYTHONPATH": str(gpu.ROOT)}, []
    found = gpu_tests.run_tests(
        selection, 300, tmp_path, environment, tmp_path / "log", tmp_path / "scratch", seen.append
    )
    assert found["status"] == "failed"
    assert found["jobs"]["test_fake.py"]["exit_statuses"] == [-9]
    counts = {"passed": 2, "failed": 1, "skipped": 1, "error": 1, "begun": 1}
    assert found["counts"] == counts
    assert list(found["failures"]) == [
        "tests/test_fake.py::test_bad",
        "tests/test_fake.py::test_error",
    ]
    assert "assert 1 == 2" in found["failures"]["tests/test_fake.py::test_bad"]
    assert found["not_ended"] == ["tests/test_fake.py::test_fatal"]
    assert found["skip_reasons"] == {"Skipped: no time": 1}
    assert seen[-1]["counts"] == counts


def test_processes_share_a_files_tests(tmp_path):
    selection = gpu_tests.Selection("", {"test_fake.py": 3}, share=2)
    found = gpu_tests.jobs_of(selection, tmp_path, {}, tmp_path).values()
    shares = [job.environment["FASTFREEZE_SHARE"] for job in found]
    assert shares == ["0/6", "1/6", "2/6"]
    assert len({job.environment["FASTFREEZE_OUTCOMES"] for job in found}) == 3


OF_A_GPU = re.compile(
    r"\bHAS_GPU\b|kernels\(\)|\bbackend_and_device\b|cuda\.is_available|\bkernel\(\"(cuda|triton)\""
)


def test_every_file_with_tests_of_a_gpu_is_run():
    folder = Path(__file__).parents[1]
    named = {file for selection in gpu_tests.SELECTIONS.values() for file in selection.files}
    found = {p for p in folder.rglob("test_*.py") if OF_A_GPU.search(p.read_text())}
    assert found - {Path(__file__)} <= {folder / name for name in named}
    assert all((folder / name).exists() for name in named)


@pytest.mark.slow
def test_the_plan_counts_tests(capsys):
    assert gpu.main(["--plan"]) == 0
    text = capsys.readouterr().out
    assert "\nsteps: until " in text
    for stage, least in (("cuda", 500), ("triton", 500)):
        (count,) = re.findall(rf"tests-{stage}.*?\n  (\d+) tests\n", text, re.DOTALL)
        assert int(count) > least


def test_cases_after_the_deadline_are_named(tmp_path):
    def never(bench):
        raise AssertionError

    out = tmp_path / "out.json"
    results = gpu_bench.run_all({"late": never}, BENCH, {}, out, time.monotonic() - 1)
    assert results["cases"]["late"]["status"] == "no time left"
    assert read_json(out) == results


def test_a_case_that_breaks_the_context_is_not_measured_again(tmp_path, monkeypatch):
    out, deadline = tmp_path / "out.json", time.monotonic() + 60
    cases = dict.fromkeys(["fatal", "next"], lambda bench: {"status": "measured"})
    monkeypatch.setattr(gpu_bench, "context_is_broken", lambda: True)
    with pytest.raises(SystemExit, match="fatal has broken the CUDA context"):
        gpu_bench.run_all(cases, BENCH, {}, out, deadline)
    monkeypatch.undo()
    cases["fatal"] = None
    results = gpu_bench.run_all(cases, BENCH, {}, out, deadline)["cases"]
    assert [results[name]["status"] for name in cases] == ["measured", "measured"]


def test_a_job_runs_again_while_it_gets_on(tmp_path):
    lines = tmp_path / "lines"
    code = f"open({str(lines)!r}, 'a').write('x'); raise SystemExit(3)"
    again = jobs.while_it_gets_on(lambda: min(2, len(lines.read_text())))
    job = jobs.Job("a", [sys.executable, "-c", code], again=again)
    done = jobs.run_jobs([job], 60, tmp_path / "log")["jobs"]["a"]
    assert (done["status"], done["exit_statuses"]) == ("failed", [3, 3, 3])


@needs_cpu_kernels
@pytest.mark.parametrize("name", gpu_bench.cases_on_cpu()["kernels"])
def test_kernel_cases(name):
    case = gpu_bench.measured(gpu_bench.cases_on_cpu()["kernels"][name], BENCH)
    assert (case["status"], case["left_out"]) == ("measured", {})
    for times in case["runs"].values():
        kinds = ["host_s", "wall_s", *(["cold_s", "warm_s"] if name != "freezing" else [])]
        for kind in kinds:
            assert 0 < times[kind]["low"] <= times[kind]["median"] <= times[kind]["high"]
    if name == "sgd, bf16, momentum fp32":
        sizes = {run: times["bytes"] for run, times in case["runs"].items()}
        total = 7 * 5 + 64 + 27
        assert sizes["fastfreeze cpu"] == sizes["torch foreach"] == 14 * total
        assert sizes["torch fused, weights also in fp32"] == 32 * total


@needs_cpu_kernels
@pytest.mark.parametrize("name", gpu_bench.cases_on_cpu()["steps"])
def test_step_cases(name):
    case = gpu_bench.measured(gpu_bench.cases_on_cpu()["steps"][name], BENCH)
    assert (case["status"], case["left_out"]) == ("measured", {})
    assert all(times["loop_s"]["median"] > 0 for times in case["runs"].values())
    assert any("fastfreeze" in run for run in case["runs"])
    assert any("torch" in run for run in case["runs"])


@needs_cpu_kernels
@pytest.mark.parametrize("kind", ["sgd", "adamw", "softmax", "statistics"])
def test_wrong_results_are_refused(monkeypatch, kind):
    make = getattr(gpu_cases, f"{kind}_case")
    steps = kind in ("sgd", "adamw")
    entry = gpu_bench.kernel(make, *([TINY] if steps else [3, 8, 10]))
    if steps:
        ours = gpu_cases._ours
        monkeypatch.setattr(
            gpu_cases, "_ours", lambda g, *a, **k: ours([{**x, "lr": 0.11} for x in g], *a, **k)
        )
    else:
        name = f"ensemble_{kind}"
        function = getattr(gpu_cases, name)
        monkeypatch.setattr(
            gpu_cases,
            name,
            lambda members, *a, **k: function([z * 1.01 for z in members], *a, **k),
        )
    wrong = gpu_bench.measured(entry, BENCH)
    assert wrong["status"] == "refused"
    assert "from fp64" in wrong["left_out"]["fastfreeze cpu"]
    assert wrong["runs"]
    assert not any(name.startswith("fastfreeze") for name in wrong["runs"])


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        pytest.param(lambda t: None, None, id="the same"),
        pytest.param(
            lambda t: t.optimizer.param_groups[0].update(momentum=0.5), "another", id="momentum"
        ),
        pytest.param(lambda t: t.model.requires_grad_(False), "RuntimeError", id="no gradient"),
        pytest.param(lambda t: t.model.eval(), "another ", id="norms in eval mode"),
        pytest.param(lambda t: t.model.stem.requires_grad_(False), "another", id="frozen weights"),
    ],
)
def test_a_training_that_does_something_else_gets_no_numbers(monkeypatch, change, wrong):
    make = gpu_steps.Side.make

    class Changed(gpu_steps.Side):
        name = "torch, changed"

        def make(self, work, start):
            training = make(self, work, start)
            change(training)
            return training

    case = gpu_steps.training_case(WORK, sides=[Changed(False)])
    if wrong is None:
        assert case.runs
    else:
        assert wrong in case.left_out["torch, changed"]


def test_rivals_that_do_not_run_are_named(monkeypatch):
    monkeypatch.setattr(torch, "stack", lambda members: members[99])
    case = gpu_cases.softmax_case(3, 8, 10, "cpu", ["reference"])
    assert list(case.runs) == ["fastfreeze reference", "eager loop"]
    assert "IndexError" in case.left_out["stack, softmax, mean"]
    assert not case.refused


def test_a_case_that_fails_is_an_entry():
    broken = gpu_bench.measured(lambda bench: 1 / 0, BENCH)
    assert broken["status"] == "failed"
    assert "ZeroDivisionError" in broken["reason"]


def test_rivals_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = measure(CpuClock(), runs, rounds=3)
    assert "".join(order[6:]) == "aaabbbbbbaaaaaabbb"
    assert times["a"]["rounds"] == 3
    order.clear()
    measure_loop(CpuClock(), runs, repeats=2, rounds=3)
    assert "".join(order) == "aabbbbaaaabb"
    assert measure(CpuClock(), runs, rounds=99, seconds=0)["a"]["rounds"] == 3


@pytest.mark.parametrize(
    ("model", "num_groups", "millions"),
    [("resnet110", 110, 1.7), ("resnet50", 1, 25.6)],
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
    pytest.importorskip("torchvision")
    parts = gpu_bench.cases_on_gpu()
    assert parts.keys() == set(gpu_bench.PARTS)
    names = [name for part in parts.values() for name in part]
    for wanted in (
        "sgd resnet110",
        "sgd resnet50",
        "adamw resnet50",
        "training resnet50",
        "ensemble",
        "freezing",
    ):
        assert any(name.startswith(wanted) for name in names)
    compiling = [name for name in names if "torch.compile" in name]
    assert list(parts["rest"])[-len(compiling) :] == compiling  # the longest, last


def test_the_smoke_tries_every_backend_on_every_operator():
    names = set(gpu_smoke.checks("cuda"))
    for backend in ("cuda", "triton"):
        for rule in ("sgd", "adamw"):
            assert {f"{backend}: {rule}", f"{backend}: graph, {rule}"} <= names
        assert {f"{backend}: softmax (5, 33, 1000)", f"{backend}: statistics (3, 5, 10)"} <= names


def test_results_are_replaced_whole(tmp_path):
    path = tmp_path / "results.json"
    assert read_json(path) == {}
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_is_installed_is_tested_away_from_the_sources(tmp_path):
    names = {p.name for p in gpu.outside_the_sources(tmp_path).iterdir()}
    assert names == {"tests", "benchmarks", "csrc", "pyproject.toml"}


def test_the_build_asks_no_registry_and_begins_anew(tmp_path):
    command = gpu.pip_command(tmp_path / "site", "fastfreeze.whl")
    assert {"--no-deps", "--no-build-isolation", "--no-index", "--target"} <= set(command)
    assert command[-1] == "fastfreeze.whl"
    copy = gpu.copy_of_sources(tmp_path)
    assert {p.name for p in copy.iterdir()} == set(gpu.SOURCES)
    assert not list(copy.rglob("*.so"))
