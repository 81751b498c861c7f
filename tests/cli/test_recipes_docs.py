"""docs/recipes.md: every command in it is one, and prints what stands there."""

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fastfreeze.cli import main
from fastfreeze.recipes.rundir import __doc__ as run_directory
from fastfreeze.reproduction.papers import FREEZEOUT_T_0S

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="tests run outside the source tree"),
    pytest.mark.usefixtures("digits_once", "threads_restored"),
]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>.*) -->\n)?^```console\n\$ (?P<command>.*)\n(?P<output>(?:.*\n)*?)^```",
    re.MULTILINE,
)


def blocks():
    return [block.groupdict() for block in _BLOCK.finditer(PAGE.read_text())]


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block["command"])
def test_commands_are_understood(block, tmp_path, monkeypatch):
    if "timm:" in block["command"]:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    program, *arguments = shlex.split(block["command"])
    assert program == "fastfreeze"
    command = main
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    command.make_context(command.name, arguments)


@pytest.mark.parametrize(
    "block", [b for b in blocks() if b["output"]], ids=lambda block: block["command"]
)
def test_output_is_what_stands_there(block, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    if block["comment"] == "interrupted":
        pytest.importorskip("mlxtend")
        monkeypatch.setattr("fastfreeze.recipes.runs.train_epoch", interrupted)
    result = CliRunner().invoke(main, shlex.split(block["command"])[1:])
    start, *rest = block["output"].split("...")
    assert result.output.startswith(start)
    for part in rest:
        assert part.strip() in result.output


def test_what_the_page_says_of_freezeout():
    assert " and ".join(map(str, FREEZEOUT_T_0S)) == "0.8 and 0.5"
    assert "`t_0` of 0.8 and 0.5" in PAGE.read_text()


def test_files_of_a_run_directory_are_those_that_there_are():
    table = PAGE.read_text().split("## The run directory")[1]
    named = set(re.findall(r"`([\w*.-]+[./][\w]*)`", table))
    assert named >= {"config.json", "metrics.jsonl", "results.json", "checkpoints/"}
    for name in named:
        stem = re.split(r"[*/]", name)[0]
        assert stem in run_directory, name
