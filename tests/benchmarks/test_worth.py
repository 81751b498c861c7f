"""benchmarks.worth: which runs are asked for, going on, costs that count, and what is saved."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks.worth", reason="tests run outside the source tree")
from benchmarks.worth import __main__ as command
from benchmarks.worth import answer as answers
from benchmarks.worth import page, passes
from benchmarks.worth.question import Method, Part, Question, Run
from benchmarks.worth.training import Meter, judged

TRUTH = {
    ("plain", 1): 0.3,
    ("plain", 2): 0.2,
    ("plain", 4): 0.1,
    ("ours", 2): 0.1,
    ("ours", 4): 0.3,
}


def record(run: Run) -> dict:
    """The lower rate is better with "plain", the higher one with "ours"; seeds differ."""
    good = (run.lr == 0.1) == (run.method == "plain")
    error = TRUTH[run.method, run.epochs] + 0.02 * run.seed + (0 if good else 0.5)
    cost = run.epochs * (100 if run.method == "plain" else 50)
    return {
        "error": error,
        "nll": 2 * error,
        "validation_error": error,
        "validation_nll": error,
        "macs": 1e9 * cost,
        "seconds": cost,
    }


QUESTION = Question(
    "Toys",
    {"toy": (1, 2, 4)},
    {"plain": Method(None, (0.1, 1.0)), "ours": Method(None, (0.1, 1.0), ours=True, epochs=(2, 4))},
    lambda run, folder, counted: record(run),
    lambda folder: None,
)
PART = Part(QUESTION, 2, ["toy"], ["plain", "ours"])


class Toys:
    """Runs at once, in this process; ``fails`` are those that raise."""

    jobs = 2

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.begun: list[Run] = []
        self.fails = fails

    def start(self, run: Run, counted: bool) -> Future:
        self.begun.append(run)
        future = Future()
        if run.method in self.fails:
            future.set_exception(ImportError("no peft"))
        else:
            future.set_result(record(run))
        return future


@pytest.fixture
def whole(monkeypatch):
    """Results of both passes."""
    for module in (answers, page):
        monkeypatch.setattr(module, "load", lambda name: QUESTION)
    runs, costs = [], []
    passes.errors(PART, runs, Toys(), lambda: None)
    monkeypatch.setattr(passes, "share_of_others", lambda before, now: 0.0)
    passes.costs(PART, runs, costs, record, lambda: None)
    return {"worth": "finetune-text", "runs": runs, "costs": costs}


def test_rates_are_chosen_on_validation_and_every_seed_and_budget_runs_once():
    toys, runs, saves = Toys(), [], []
    assert passes.errors(PART, runs, toys, lambda: saves.append(len(runs))) == 0
    assert toys.begun[:4] == [
        Run("toy", "plain", 2, 0.1, 0),
        Run("toy", "plain", 2, 1.0, 0),
        Run("toy", "ours", 4, 0.1, 0),
        Run("toy", "ours", 4, 1.0, 0),
    ]
    assert {(r.method, r.epochs, r.lr, r.seed) for r in toys.begun[4:]} == {
        *(("plain", n, 0.1, seed) for n in (1, 2, 4) for seed in (0, 1)),
        *(("ours", n, 1.0, seed) for n in (2, 4) for seed in (0, 1)),
    } - {("plain", 2, 0.1, 0), ("ours", 4, 1.0, 0)}
    assert saves == list(range(1, len(runs) + 1))


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1, [0.5, 1, 2]),
        (4, [0.5, 1, 2, 4, 8]),
        (0.25, [0.125, 0.25, 0.5, 1, 2]),
        (16, [0.5, 1, 2, 4, 8]),
    ],
)
def test_a_grid_goes_on_past_a_best_edge(best, tried):
    method = {"plain": Method(None, (0.5, 1.0, 2.0))}
    part = Part(replace(QUESTION, methods=method, budgets={"toy": (1,)}), 1, ["toy"], ["plain"])

    class Tried(Toys):
        def start(self, run, counted):
            self.begun.append(run)
            future, error = Future(), abs(math.log2(run.lr / best)) / 10
            future.set_result({"validation_error": error, "validation_nll": error})
            return future

    toys = Tried()
    assert passes.errors(part, [], toys, lambda: None) == 0
    assert sorted(run.lr for run in toys.begun) == tried


def test_what_is_there_is_not_run_again_and_what_fails_is_told(capsys):
    toys, runs = Toys(), []
    passes.errors(PART, runs, toys, lambda: None)
    left = runs[:5]  # runs that begin at once may end in any order
    again = Toys()
    passes.errors(PART, left, again, lambda: None)
    assert {*again.begun} == {run for run in toys.begun if not any(map(run.is_of, runs[:5]))}
    assert sorted(map(str, left)) == sorted(map(str, runs))
    runs = []
    assert passes.errors(PART, runs, Toys(fails=("ours",)), lambda: None) == 2
    assert {r["method"] for r in runs} == {"plain"}
    assert "ImportError: no peft" in capsys.readouterr().out


def test_the_command_goes_on_where_its_file_ends(tmp_path, monkeypatch, capsys):
    for module in (command, answers):
        monkeypatch.setattr(module, "load", lambda name: QUESTION)
    out = tmp_path / "worth-scratch.json"
    for begun in (7, 0):  # four that choose rates, and three more budgets
        toys = Toys()
        monkeypatch.setattr(command, "Children", lambda *_, toys=toys: nullcontext(toys))
        assert command.main(["scratch", "--errors", "--seeds=1", f"--out={out}"]) == 0
        assert len(toys.begun) == begun
        assert "### toy" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert (results["worth"], len(results["runs"]), results["costs"]) == ("scratch", 7, [])


def test_costs_take_turns_and_count_only_alone(whole, capsys, monkeypatch):
    found = [(c["method"], c["epochs"], c["seed"]) for c in whole["costs"]]
    once = [("plain", n, 0) for n in (1, 2, 4)] + [("ours", n, 0) for n in (2, 4)]
    assert found == passes.ROUNDS * once
    for share, thrown in ((0.06, 15), (0.04, 0)):
        monkeypatch.setattr(passes, "share_of_others", lambda before, now, share=share: share)
        costs = []
        assert passes.costs(PART, whole["runs"], costs, record, lambda: None) == thrown
        assert len(costs) == 15 - thrown
    assert "thrown away, as others took 6%" in capsys.readouterr().out


def test_what_others_took_of_the_processors(monkeypatch):
    monkeypatch.setattr(passes.os, "sched_getaffinity", lambda pid: {0, 1})
    assert passes.share_of_others((0.0, 1.0, 10.0), (10.0, 5.0, 15.0)) == (5 - 4) / 20
    assert passes.share_of_others((0.0, 1.0, None), (10.0, 5.0, None)) == 0.0


def test_saved_is_against_the_cheapest_rival_at_the_mark(whole):
    (answer,) = answers.answers(whole)
    assert answer.in_seconds
    assert answer.mark == pytest.approx(0.11 + 0.01)
    assert [(p.run.epochs, p.seconds) for p in answer.envelope()] == [(1, 100), (2, 200), (4, 400)]
    text = "\n".join(answers.table(answer))
    assert "The mark is 12.00% error: plain in 4 epochs" in text
    assert (
        "| plain | 400 in 4 epochs | 0% | 11.00 ± 1.00 | 4 epochs | 0.220 | 400 | 400 | 0.1 | 2 |"
        in text
    )
    assert "| **ours** | 100 in 2 epochs | 75% | 11.00 ± 1.00 | 2 epochs |" in text


def test_who_freezes_by_hand_sets_no_mark(whole, monkeypatch):
    plain, ours = QUESTION.methods.values()
    by_hand = replace(ours, ours=False, by_hand=True)
    question = replace(QUESTION, methods={"plain": plain, "ours": by_hand})
    monkeypatch.setattr(answers, "load", lambda name: question)
    (answer,) = answers.answers(whole)
    assert {point.run.method for point in answer.rivals} == {"plain"}
    assert "| ours | 100 in 2 epochs | 75% |" in "\n".join(answers.table(answer))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"costs": []}, "| plain | 400 in 4 epochs |", id="no costs: MACs"),
        pytest.param({"runs": []}, "", id="no data: no table"),
    ],
)
def test_a_part_of_the_data_is_enough(whole, change, text):
    assert text in "\n".join(answers.summary({**whole, **change}))


def test_seconds_are_scaled_by_the_macs_of_the_seeds(whole):
    for r in whole["runs"]:
        r["macs"] *= 1 + r["seed"]
    assert {p.seconds / p.run.epochs for p in answers.answers(whole)[0].points} == {150.0, 75.0}


def test_the_page_has_what_there_are_data_of(whole, tmp_path, monkeypatch):
    page.write(tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())
    whole["command"] = "python -m benchmarks.worth finetune-text --out=x"
    whole["machine"] = {"cpu": "CPU", "threads": 1, "torch": "2", "python": "3", "fastfreeze": "0"}
    monkeypatch.setattr(
        page, "read_json", lambda path: whole if path == Path("worth-finetune-text.json") else {}
    )
    page.write(Path(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"worth.md", "worth-finetune-text.png"}
    assert "## Toys\n\n![error" in (tmp_path / "worth.md").read_text()


@pytest.mark.parametrize(
    ("frozen", "hits", "macs"),
    [
        # products of 2 x 3, 3 x 3 and 3 x 1: 6, 9 and 3 a sample; four samples, twice
        pytest.param([], 0, 8 * (18 + 6 + 2 * (9 + 3)), id="all"),
        pytest.param([0], 0, 8 * (18 + 9 + 2 * 3), id="first frozen"),
        pytest.param([0], 4, 4 * (18 + 9 + 6) + 4 * (12 + 9 + 6), id="first kept"),
        pytest.param([1], 0, 8 * (18 + 6 + 9 + 2 * 3), id="one in the middle"),
        pytest.param([0, 1, 2], 4, 4 * 18, id="all kept"),
    ],
)
def test_macs_of_frozen_and_kept_layers(frozen, hits, macs):
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in ((2, 3), (3, 3), (3, 1))))
    for i in frozen:
        model[i].requires_grad_(False)
    meter = Meter(model, lambda x: (x,))
    for found in (0, hits):
        meter.add(torch.zeros(4, 2))
        meter.found(hits=found)
    assert meter.macs == macs


def test_what_is_carried_on_saves_what_was_frozen_before():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    meter, costs = Meter(model, lambda x: (x,)), []
    for frozen, advanced in (([], 0), ([0], 0), ([0, 1], 1)):
        for i, layer in enumerate(model):
            layer.requires_grad_(i not in frozen)
        before = meter.macs
        meter.add(torch.zeros(1, 2))
        meter.found(advanced=advanced, reason="")
        costs.append(meter.macs - before)
    assert costs == [48, 33, 12 + 3]


def test_judged():
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = judged(lambda x: x, {"a_": (logits, torch.tensor([0, 1, 1]))}, size=2)
    assert found["a_error"] == pytest.approx(1 / 3)
    assert found["a_nll"] == pytest.approx((2 * math.log1p(math.exp(-1)) + math.log1p(math.e)) / 3)
