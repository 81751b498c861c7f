"""The README's code runs as it stands there, but without worker processes and long compiling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastfreeze

README = Path(__file__).parent.parent / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="tests run outside the source tree")


def python_blocks():
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    images = torch.randn(6, 4)
    loader = [(images, torch.tensor([0, 1, 2, 0, 1, 2]))] * 10
    names = {
        "fastfreeze": fastfreeze,
        "model": model,
        "images": images,
        "loader": loader,
        "loss_function": nn.CrossEntropyLoss(),
        "total_steps": len(loader),
    }
    sgd, freezing, cache, compiling, report, ensemble, evaluation = python_blocks()
    exec(sgd, names)
    exec(freezing, names)
    assert names["optimizer"].frozen_layers == (0,)
    model.requires_grad_(True)
    made = dict(names)
    exec(ensemble, made)
    assert len(made["store"]) == 5
    torch.testing.assert_close(made["probabilities"].sum(1), torch.ones(6))
    exec(evaluation, made | {"x_valid": images, "y_valid": loader[0][1]})
    assert "ensemble" in capsys.readouterr().out
    model.requires_grad_(True)
    exec(freezing, names)

    samples = {"dataset": TensorDataset(images, loader[0][1]), "DataLoader": DataLoader}
    cached = names | samples | {"num_epochs": 2}
    exec(cache.replace("num_workers=2", "num_workers=0"), cached)
    assert cached["cache"].stats().misses > 0

    compiled = dict(names)
    exec(compiling.replace("plan, images)", "plan, images, backend='eager')"), compiled)
    assert "frozen layers" in capsys.readouterr().out

    model.requires_grad_(True)
    exec(freezing.split("for images")[0], names)
    exec(report, names)
    assert "predicted" in capsys.readouterr().out
