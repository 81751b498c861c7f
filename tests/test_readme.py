"""The README: its code runs as it stands there, and it stays short enough to be read."""

from __future__ import annotations

import re

import pytest
import torch

from tests import snippets
from tests.snippets import ROOT

README = ROOT / "README.md"
pytestmark = [
    pytest.mark.skipif(not README.exists(), reason="tests run outside the source tree"),
    pytest.mark.usefixtures("one_thread"),
]


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = snippets.run(README, snippets.names)
    assert len(names["store"]) == 5
    torch.testing.assert_close(names["probabilities"].sum(1), torch.ones(4))
    assert [s.not_run for s in snippets.snippets(README)] == [""] * 3


def test_the_first_lines_are_the_two_line_change_and_freezing():
    drop_in, freezing, _ = (s.code for s in snippets.snippets(README))
    assert len(re.findall(r"^(?!#|import)\S", drop_in, re.MULTILINE)) == 1
    assert "fastfreeze.trim(model)" in freezing


def test_it_can_be_finished():
    assert len(README.read_text().splitlines()) <= 220


def test_the_command_that_ci_runs_is_there():
    marked = README.read_text().split("<!-- test command -->\n```\n")[1].split("\n```")[0]
    assert marked.startswith("python3 -m venv .venv && ")
    assert marked.endswith("pytest -n 2")
