"""The code in docs/integrations.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastfreeze
from tests.nets import tiny_bert

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="tests run outside the source tree"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the Python of a section, in a directory of its own, and returns the names."""
    monkeypatch.chdir(tmp_path)

    def run(title, **names):
        section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
        (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        names |= {"fastfreeze": fastfreeze, "__name__": "docs"}
        exec(code, names)
        return names

    return run


def test_lightning(run, capsys):
    pytest.importorskip("lightning")
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    images = torch.randn(6, 4)
    loader = DataLoader(TensorDataset(images, torch.arange(6) % 3), batch_size=2)
    names = run(
        "Lightning", model=model, images=images, loader=loader, loss_function=nn.CrossEntropyLoss()
    )
    assert [s.step for s in names["store"]] == [9, 18, 27]
    assert "frozen layers" in capsys.readouterr().out
    assert names["ensemble"](images).shape == (6, 3)


def test_the_trainer(run):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    input_ids = torch.randint(20, (8, 5))
    attention_mask = torch.ones_like(input_ids)
    dataset = [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 3)}
        for i, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True))
    ]
    names = run(
        "Hugging Face Trainer",
        model=tiny_bert(num_labels=3),
        arguments=transformers.TrainingArguments(
            "run", num_train_epochs=6, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        dataset=dataset,
        input_ids=input_ids,
        attention_mask=attention_mask,
    )
    assert [s.step for s in names["store"]] == [2, 4, 6]
    assert names["optimizer"].current_step == 6
    assert not hasattr(names["trainer"].optimizer, "current_step")  # as the page says
    torch.testing.assert_close(names["probabilities"].sum(1), torch.ones(8))


def test_timm(run):
    timm = pytest.importorskip("timm")
    names = run("timm", timm=timm, images=torch.randn(2, 3, 32, 32), total_steps=10)
    assert isinstance(names["network"], fastfreeze.TrimmedModel)


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tests.integrations.test_tensorboard import training

    _, optimizer, report, train = training()
    run("TensorBoard", optimizer=optimizer, report=report, train=train)
    assert list((tmp_path / "runs" / "freezeout").iterdir())
