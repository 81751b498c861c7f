"""python -m benchmarks guard: its verdicts on invented measurements."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

guard = pytest.importorskip("benchmarks.guard", reason="tests run outside the source tree")
from benchmarks.case import Case  # noqa: E402
from benchmarks.measure import Times  # noqa: E402

MACHINE = {"cpu": "some", "threads": 1, "torch": "2.0"}


def entry(spread=0.01, **medians):
    """An entry in the results; ``spread``: of the quartiles, on each side."""
    return {
        "name": "a case",
        "seconds": {
            name.replace("_", " "): asdict(Times(t, t * (1 - spread), t * (1 + spread)))
            for name, t in medians.items()
        },
    }


BASELINE = entry(fastfreeze=1.0, torch=3.0, torch_fused=2.0)


@pytest.mark.parametrize(
    ("now", "verdict", "ratio"),
    [
        pytest.param(entry(fastfreeze=1.0, torch=3.0, torch_fused=2.0), "ok", 2, id="the same"),
        pytest.param(entry(fastfreeze=9.0, torch=27.0, torch_fused=18.0), "ok", 2, id="load"),
        pytest.param(entry(fastfreeze=1.04, torch_fused=2.0), "ok", 1.92, id="a little slower"),
        pytest.param(entry(fastfreeze=1.2, torch_fused=2.0), "worse", 1.67, id="slower"),
        pytest.param(entry(fastfreeze=0.8, torch_fused=2.0), "better", 2.5, id="faster"),
        pytest.param(
            entry(fastfreeze=1.0, torch=1.5, torch_fused=2.0), "worse", 1.5, id="a faster rival"
        ),
        pytest.param(
            entry(spread=0.1, fastfreeze=1.2, torch_fused=2.0), "ok", 1.67, id="slower in noise"
        ),
        pytest.param(
            entry(spread=0.9, fastfreeze=4.1, torch_fused=2.0), "worse", 0.49, id="half, any noise"
        ),
        pytest.param(
            entry(fastfreeze=1.0, torch_fused=2.0, rival=0.5), "ok", 2, id="not in the baseline"
        ),
    ],
)
def test_verdicts(now, verdict, ratio):
    found = guard.verdict("case", BASELINE, now)
    assert found.verdict == verdict
    assert found.before == 2
    assert found.now == pytest.approx(ratio, abs=0.01)
    assert found.failed == (verdict == "worse")


@pytest.mark.parametrize(
    "now", [entry(torch=1.0), entry(fastfreeze=1.0, stranger=2.0), {"seconds": {}}]
)
def test_a_case_that_cannot_be_compared_fails(now):
    found = guard.verdict("case", BASELINE, now)
    assert (found.verdict, found.failed) == ("refused", True)


def test_the_tolerance_follows_the_spreads_within_bounds():
    quiet, loud = Times(1.0, 1.0, 1.0), Times(1.0, 0.0, 5.0)
    assert guard.tolerance_of([quiet] * 4) == 0.05
    assert guard.tolerance_of([quiet, loud]) == 0.5
    assert guard.tolerance_of([Times(2.0, 1.9, 2.1)] * 4) == pytest.approx(0.2)


SLOW, FAST = entry(fastfreeze=2.0, torch_fused=2.0), entry(fastfreeze=1.0, torch_fused=2.0)


@pytest.mark.parametrize(
    ("measurements", "verdict"),
    [
        pytest.param([FAST], "ok", id="once is enough"),
        pytest.param([SLOW, FAST], "ok", id="worse only once"),
        pytest.param([SLOW, SLOW], "worse", id="worse twice"),
    ],
)
def test_what_is_worse_is_measured_once_more(measurements, verdict):
    left = list(measurements)
    cases = {"case": lambda: Case(name="a case")}
    (found,) = guard.compare({"case": BASELINE}, cases, lambda case: left.pop(0))
    assert found.verdict == verdict
    assert not left


def test_a_case_that_is_gone_fails():
    (found,) = guard.compare({"gone": BASELINE}, {}, lambda case: FAST)
    assert (found.verdict, found.failed) == ("no such case", True)


@pytest.fixture
def baseline(tmp_path, monkeypatch):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"machine": MACHINE, "results": {"a": BASELINE, "b": BASELINE}}))
    makes = {name: lambda name=name: Case(name=name) for name in "ab"}
    monkeypatch.setattr(guard, "ALL_CASES", makes)
    monkeypatch.setattr(guard, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(guard, "machine", lambda: MACHINE)
    return path


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("slow", "cases", "code"), [("", [], 0), ("b", [], 1), ("b", ["a"], 0), ("b", ["b"], 1)]
)
def test_the_exit_code_and_the_table(baseline, monkeypatch, capsys, slow, cases, code):
    monkeypatch.setattr(guard, "measured", lambda case, *rest: SLOW if case.name == slow else FAST)
    assert guard.main([*cases, f"--baseline={baseline}"]) == code
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["case", "best", "rival", "before", "now", "tolerance", "verdict"]
    words = {row.split()[0]: row.split()[-1] for row in rows}
    assert words == {name: "worse" if name == slow else "ok" for name in cases or ["a", "b"]}


@pytest.mark.usefixtures("one_thread")
def test_another_machine_is_told(baseline, monkeypatch, capsys):
    monkeypatch.setattr(guard, "machine", lambda: {**MACHINE, "cpu": "another"})
    monkeypatch.setattr(guard, "measured", lambda *args: FAST)
    guard.main([f"--baseline={baseline}"])
    assert "cpu: another, the baseline has some" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "argv", "message"),
    [
        pytest.param({"cases": []}, [], "must be a file of python -m benchmarks", id="kind"),
        pytest.param(
            {"machine": MACHINE, "results": {}}, ["a"], "must be in the baseline, got a", id="case"
        ),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path, capsys, content, argv, message):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        guard.main([*argv, f"--baseline={path}"])
    assert message in capsys.readouterr().err
