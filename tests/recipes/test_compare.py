"""compare: its numbers against a computation by hand, and a whole comparison."""

import math

import pytest
import torch

from fastfreeze.recipes.tables import compare, comparison_table, spread
from fastfreeze.recipes.train import CompareConfig
from tests.commands import TINY, ran, tiny_data
from tests.recipes.test_training import result_of

pytest.importorskip("scipy", reason="which compare takes Student's t from")
pytestmark = pytest.mark.usefixtures("one_thread")

# Two-sided 95% quantiles of Student's t, from printed tables: degrees of freedom, value.
STUDENT = {2: 4.303, 4: 2.776, 9: 2.262, 29: 2.045}


RESULTS = [
    result_of("sgd", 0, 10.0, 0.010, nll=0.50),
    result_of("both", 0, 5.0, 0.900, 0.012, nll=0.60),
    result_of("both", 2, 8.0, 0.900, 0.016, nll=0.70),  # not in order
    result_of("sgd", 1, 20.0, 0.020, nll=0.40),
    result_of("both", 1, 15.0, 0.900, 0.024, nll=0.30),
    result_of("sgd", 2, 10.0, 0.015, nll=0.60),
]


def test_numbers_are_those_by_hand():
    plain, both = compare(RESULTS, "sgd")
    assert [(c["method"], c["n"]) for c in (plain, both)] == [("sgd", 3), ("both", 3)]
    assert plain["error"]["mean"] == pytest.approx(0.015)
    assert plain["error"]["sd"] == pytest.approx(0.005)
    assert plain["error_difference"] is plain["nll_difference"] is plain["time_saved"] is None
    assert both["error"]["mean"] == pytest.approx((0.012 + 0.024 + 0.016) / 3)
    # differences: 0.002, 0.004, 0.001
    mean, sd = 0.007 / 3, math.sqrt(((1 / 3) ** 2 + (5 / 3) ** 2 + (4 / 3) ** 2) / 2) * 1e-3
    half = STUDENT[2] * sd / math.sqrt(3)
    found = both["error_difference"]
    assert (found["mean"], found["sd"]) == (pytest.approx(mean), pytest.approx(sd))
    assert (found["low"], found["high"]) == pytest.approx((mean - half, mean + half), rel=1e-3)
    assert both["nll_difference"]["values"] == pytest.approx([0.1, -0.1, 0.1])
    assert both["time_saved"]["values"] == pytest.approx([0.5, 0.25, 0.2])
    assert both["seconds"]["mean"] == pytest.approx(28 / 3)
    assert both["cpu_seconds"]["mean"] == pytest.approx(56 / 3)


@pytest.mark.parametrize("freedom", STUDENT)
def test_interval_is_students(freedom):
    values = torch.randn(freedom + 1, dtype=torch.float64).tolist()
    found = spread(values)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(
        STUDENT[freedom] * torch.tensor(values).std().item() / math.sqrt(freedom + 1), rel=1e-3
    )
    assert found["low"] + found["high"] == pytest.approx(2 * found["mean"])


def test_table_says_the_same():
    table = comparison_table(compare(RESULTS, "sgd"))
    assert table.rows == [
        ["error %", "plain SGD", "1.50 ± 0.50", "-", "-"],
        ["error %", "FreezeOut + Snapshot", "1.73 ± 0.61", "+0.23 ± 0.15", "-0.15 .. +0.61"],
        ["NLL", "plain SGD", "0.5000 ± 0.1000", "-", "-"],
        [
            *("NLL", "FreezeOut + Snapshot", "0.5333 ± 0.2082"),
            *("+0.0333 ± 0.1155", "-0.2535 .. +0.3202"),
        ],
        ["time s", "plain SGD", "13.3 ± 5.8", "-", "-"],
        ["time s", "FreezeOut + Snapshot", "9.3 ± 5.1", "-", "-"],
        ["CPU s", "plain SGD", "26.7 ± 11.5", "-", "-"],
        ["CPU s", "FreezeOut + Snapshot", "18.7 ± 10.3", "-", "-"],
        ["time saved %", "FreezeOut + Snapshot", "31.7 ± 16.1", "-", "-8.3 .. +71.6"],
    ]
    assert table.note.startswith("3 seeds. difference")
    assert "to plain SGD with the same seed" in table.note
    assert "(degrees of freedom: 2)" in table.note


CONFIG = CompareConfig(
    **TINY
    | {"methods": ("snapshot", "sgd", "freezeout"), "epochs": 2, "cycles": 2, "seeds": 2}
    | {"baseline": "freezeout"}
)


@pytest.fixture(scope="module")
def data():
    return tiny_data(24, 24)


def test_a_comparison_trains_the_baseline_first_and_each_method_once(data, tmp_path):
    run_dir, table, shown = ran(tmp_path / "run", data, CONFIG, "compare")
    methods = ["freezeout", "snapshot", "sgd"]
    assert [r["method"] for r in run_dir.results()] == methods * 2
    assert [c["method"] for c in shown["comparison"]] == methods
    assert shown["baseline"] == "freezeout"
    for entry, method in zip(shown["comparison"], methods, strict=True):
        own = {r["seed"]: r for r in run_dir.results() if r["method"] == method}
        assert entry["nll"]["mean"] == pytest.approx((own[3]["nll"] + own[4]["nll"]) / 2)
        assert (entry["nll_difference"] is None) == (method == "freezeout")
    firsts = {}
    for line in run_dir.metrics():
        if line.get("epoch") == 1:
            firsts.setdefault(line["seed"], []).append(line["step_losses"][0])
    for losses in firsts.values():  # the same weights and batches
        assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert firsts[3] != firsts[4]
    assert (run_dir.path / "table.txt").read_text() == f"{table}\n"
