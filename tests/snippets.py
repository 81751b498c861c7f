"""The code of the Markdown pages: found, and run as it stands there.

Blocks of a page run one after the other with the same names. An HTML comment in front of a block
says otherwise: ``<!-- anew -->`` starts again with the names that the page begins with, and
``<!-- not run: why -->`` leaves it out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastfreeze

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """A Python block: its code, and what the comment in front of it says."""

    code: str
    line: int
    anew: bool
    not_run: str


def snippets(page):
    """The Python blocks of a page, in order."""
    text = page.read_text()
    found = []
    for block in _BLOCK.finditer(text):
        if block["language"] != "python":
            continue
        comment = block["comment"] or ""
        reason = comment.removeprefix("not run: ") if comment.startswith("not run: ") else ""
        line = text.count("\n", 0, block.start("code")) + 1
        found.append(Snippet(block["code"], line, comment == "anew", reason))
    return found


def run(page, begin, replace=()):
    """Run a page's blocks, each of ``replace``'s pairs of texts exchanged; return the names.

    An error shows the page's own line.
    """
    names = begin()
    for snippet in snippets(page):
        if snippet.anew:
            names = begin()
        if snippet.not_run:
            continue
        code = snippet.code
        for old, new in replace:
            code = code.replace(old, new)
        exec(compile("\n" * (snippet.line - 1) + code, str(page), "exec"), names)
    return names


def stage(in_channels, channels):
    """A convolution, its norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
    )


def names():
    """A small network and its data, under the names that the pages use for the reader's own."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    dataset = TensorDataset(images.repeat(5, 1, 1, 1), labels.repeat(5))
    loader = DataLoader(dataset, batch_size=4)
    return {
        "__name__": "page",
        "fastfreeze": fastfreeze,
        "DataLoader": DataLoader,
        "model": nn.Sequential(stage(3, 4), stage(4, 4), stage(4, 4), head),
        "images": images,
        "labels": labels,
        "dataset": dataset,
        "loader": loader,
        "loss_function": nn.CrossEntropyLoss(),
        "total_steps": len(loader),
        "num_epochs": 2,
        "x_valid": images,
        "y_valid": labels,
    }
