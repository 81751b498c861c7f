"""What the tests of commands and trainings share: the call, tiny images, tiny trainings."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from PIL import Image

from fastfreeze.cli import main
from fastfreeze.recipes.data import ImageData
from fastfreeze.recipes.images import MemoryImages
from fastfreeze.recipes.names import METHOD_NAMES
from fastfreeze.recipes.rundir import RunDir
from tests.killed import untimed

# Of a training on images of two classes that takes a moment: the arguments of its config.
TINY = {
    "methods": METHOD_NAMES,
    "data": "mnist5k",
    "image_size": 8,
    "model": "resnet8-w4",
    "epochs": 4,
    "batch_size": 8,
    "lr": 0.05,
    "t_0": 0.5,
    "how_scale": "cubic",
    "cycles": 3,
    "composition": "sticky",
    "last_k": 1,
    "seed": 3,
    "seeds": 1,
    "device": "cpu",
    "threads": 1,
}


class Killed(BaseException):
    """Nothing may catch this."""


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def printed(*arguments):
    """What a command that ends well prints as JSON."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def why(result, exit_code=1):
    """What a command that fails says, which is one line and no traceback."""
    assert result.exit_code == exit_code, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def write_pictures(root, train=8, test=4):
    """Pictures of two classes, one of them darker: so many of each, no two alike."""
    for split, count in (("train", train), ("test", test)):
        for k, kind in enumerate(("dark", "light")):
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (8, 8), (40 + 90 * k + 5 * i, 60 + 90 * k, 10 * i + count))
                image.save(root / split / kind / f"{i}.png")
    return root


def assert_drawn(path):
    """A picture holds something."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 500
        assert len(picture.convert("RGB").getcolors(2**24)) > 100


def work_in(directory, monkeypatch, **modules):
    """Start the command in a directory with these modules, as it is started from a shell."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name, text in modules.items():
        Path(f"{name}.py").write_text(text)
        sys.modules.pop(name, None)  # of an earlier directory


def bright(count, num_classes=2):
    """Images [count, 1, 8, 8]; of each class other columns are bright, which is soon learnt."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 100, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % num_classes
    columns = torch.arange(8) * num_classes // 8 == labels[:, None]
    return MemoryImages(pixels + 100 * columns[:, None, None, :].to(torch.uint8), labels)


def tiny_data(train, test, num_classes=2):
    """So many images to train on and to test on."""
    images = (bright(count, num_classes) for count in (train, test))
    half = torch.tensor([0.4])
    return ImageData(*images, half, half, num_classes, pad=1, flip=False)


def ran(path, data, config, command="train", say=lambda line: None):
    """Begins a run, or goes on with it; gives its directory, table and values."""
    if (path / "config.json").exists():
        run = RunDir.open(path)
    else:
        run = RunDir.create(path, command, dataclasses.asdict(config), None)
    return run, *config.run(data, run, say, quiet=True)


def assert_same_lines(found, expected):
    """Two runs agree in their metrics and results, apart from times and memory."""
    for lines in (RunDir.results, RunDir.metrics):
        assert untimed(lines(found)) == untimed(lines(expected))
