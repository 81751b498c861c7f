""".ci/wheels: what it compares, what it counts, and what makes it fail."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_build import ROOT

SCRIPT = ROOT / ".ci/wheels"
ABSENT = {"cuda": "^absent", "cpu": "^absent"}
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="tests run outside the source tree")


@pytest.fixture
def wheels(monkeypatch):
    loader = importlib.machinery.SourceFileLoader("ci_wheels", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("ci_wheels", loader))
    monkeypatch.setitem(sys.modules, "ci_wheels", module)  # dataclasses look there
    loader.exec_module(module)
    return module


@pytest.fixture
def installed(wheels, monkeypatch, tmp_path):
    """Environments that need no installation: this one, with what `said` tells about it."""
    said = {"calls": [], "versions": "2.10.0 None", "backends": {"cuda": "absent", "cpu": "absent"}}

    def output(command, cwd=None):
        if "backends()" in command[-1]:
            return wheels.json.dumps(said["backends"])
        return said["versions"] if "import torch" in command[-1] else "3.10.1"

    def environment(folder, python, packages):
        said["calls"].append(["made", folder.parent.name, *packages])
        if packages == ("absent",):
            raise wheels.CheckError("pip found no absent")
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/python").symlink_to(python)
        return folder / "bin/python"

    monkeypatch.setattr(wheels, "environment", environment)
    monkeypatch.setattr(wheels, "WORKERS", ())
    monkeypatch.setattr(wheels, "call", said["calls"].append)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # pytest's, for that Python
    monkeypatch.setattr(wheels, "output", output)
    clone = tmp_path / "clone"
    (clone / "tests").mkdir(parents=True)
    (clone / "docs").mkdir()
    (clone / "pyproject.toml").touch()
    said["tests"] = clone / "tests/test_few.py"
    said["tests"].write_text("def test_one(): pass\n")
    compiled = Path("compiled.whl")
    said["builder"] = SimpleNamespace(clone=clone, compiled_by=lambda *_: compiled)
    here = Path(sys.executable)
    wanted = {"old": (here, ("torch==2.10.*",)), "new": (here, ("torch",))}
    said["ready"] = wheels.Environments(tmp_path / "work", wanted)
    yield said
    said["ready"].close()


def row(wheels, name="some", file="fastfreeze-0-py3-none-any.whl", cpu_torch=False):
    return wheels.Row(name, "old", Path(file), ABSENT, ("few",), cpu_torch=cpu_torch)


def result_of(wheels, installed, **kwargs):
    (result,) = wheels.test([row(wheels, **kwargs)], installed["builder"], installed["ready"])
    return result


def test_a_row_counts_its_tests(wheels, installed):
    more = "import pytest\n@pytest.mark.skip\ndef test_two(): pass\ndef test_triton(): assert 0\n"
    installed["tests"].write_text(installed["tests"].read_text() + more)
    result = result_of(wheels, installed)
    assert (result.outcome, result.passed, result.skipped) == ("passed", 1, 1)
    assert result.cells()[:6] == ["some", "3.10.1", "2.10.0", "pure", "none", "1 (1 skipped)"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def test_one(): assert 0\ndef test_two(): pass\n", "pytest exited with 1"),
        ("def test_triton(): pass\n", "pytest exited with 5"),
        ("import pytest\n@pytest.mark.skip\ndef test_one(): pass\n", "pytest exited with 0"),
    ],
    ids=["a failure", "no tests", "all skipped"],
)
def test_a_row_without_all_tests_passed_fails(wheels, installed, text, why):
    installed["tests"].write_text(text)
    assert result_of(wheels, installed).outcome == f"FAILED: {why}"


def test_rows_share_an_environment(wheels, installed, tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "run_tests", lambda *_: None)
    todo = [row(wheels), row(wheels, file="fastfreeze-0.tar.gz"), row(wheels)]
    todo[2] = replace(todo[2], environment="new")
    results = wheels.test(todo, installed["builder"], installed["ready"])
    assert [result.outcome for result in results] == ["passed"] * 3
    assert [result.cells()[3] for result in results] == ["pure", "compiled here", "pure"]
    assert not list((tmp_path / "work").iterdir())
    made = [words for words in installed["calls"] if words[0] == "made"]
    new = [["made", "environment-old", "torch==2.10.*"], ["made", "environment-new", "torch"]]
    assert made == new
    pip = [[*map(str, words[3:])] for words in installed["calls"] if words[0] != "made"]
    files = [str(todo[0].file), "compiled.whl", str(todo[2].file)]
    uninstall = ["uninstall", "-y", "fastfreeze"]
    assert pip == [words for file in files for words in (uninstall, ["install", file])]


def test_an_environment_that_cannot_be_made_fails_its_rows(wheels, installed, tmp_path):
    wanted = {"old": (Path(sys.executable), ("absent",))}
    ready = wheels.Environments(tmp_path / "other", wanted)
    results = wheels.test([row(wheels)] * 2, installed["builder"], ready)
    assert [result.outcome for result in results] == ["FAILED: pip found no absent"] * 2


def test_a_row_whose_library_does_not_load_fails(wheels, installed):
    installed["backends"]["cpu"] = "libfastfreeze_cpu.so does not load: no such symbol"
    result = result_of(wheels, installed)
    assert re.match("FAILED: backend cpu: .*no such symbol", result.outcome)
    assert result.passed == 0


def test_a_torch_with_cuda_is_not_taken_for_one_without(wheels, installed):
    installed["versions"] = "2.13.0 13.0"
    todo = [row(wheels, cpu_torch=True), row(wheels)]
    found = [r.outcome for r in wheels.test(todo, installed["builder"], installed["ready"])]
    assert found[0].startswith(f"not tested: {wheels.CPU_TORCH} is built for CUDA 13.0")
    assert found[1] == "passed"


def test_a_failing_row_fails_the_command_after_all_ran(wheels, monkeypatch, tmp_path, capsys):
    outcomes = {"first": wheels.CheckError("broken"), "second": wheels.NotTestedError("absent")}

    def run_row(result, *_):
        if result.row.name in outcomes:
            raise outcomes[result.row.name]

    class Builder:
        seconds = {}  # noqa: RUF012

        def __init__(self, work, out, python):
            self.out = out

        def build(self):
            wheel = self.out / "fastfreeze-0-py3-none-any.whl"
            zipfile.ZipFile(wheel, "w").close()
            return [wheel]

    names = ["first", "second", "third"]
    monkeypatch.setattr(wheels, "run_row", run_row)
    monkeypatch.setattr(wheels, "Builder", Builder)
    monkeypatch.setattr(wheels, "packages", lambda _: {})
    monkeypatch.setattr(wheels, "rows", lambda *_: [row(wheels, name) for name in names])
    monkeypatch.setattr(sys, "argv", ["wheels", str(tmp_path / "out")])
    assert wheels.main() == 1
    printed = capsys.readouterr().out
    assert printed.endswith("3 rows: 1 failed, 1 not tested\n")
    assert printed.index("FAILED: broken") < printed.index("not tested: absent")
    assert re.search(r"third .*passed\n", printed)
    outcomes.pop("first")
    monkeypatch.setattr(sys, "argv", ["wheels", str(tmp_path / "again")])
    assert wheels.main() == 0


def test_a_folder_with_wheels_is_refused(tmp_path):
    (tmp_path / "fastfreeze-0-py3-none-any.whl").touch()
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"OUT must hold no fastfreeze-* yet, got {tmp_path}" in done.stderr


def archive(path, files, date=(2026, 1, 1, 0, 0, 0)):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(zipfile.ZipInfo(name, date), text)
    return path


def test_builds_that_differ_are_told(wheels, tmp_path):
    one = archive(tmp_path / "one.whl", {"a": "1", "b": "2"})
    wheels.same_bytes(one, archive(tmp_path / "same.whl", {"a": "1", "b": "2"}))
    with pytest.raises(wheels.CheckError, match=r"one.whl: two builds differ in a, c$"):
        wheels.same_bytes(one, archive(tmp_path / "other.whl", {"a": "3", "b": "2", "c": ""}))
    later = archive(tmp_path / "later.whl", {"a": "1", "b": "2"}, date=(2026, 1, 2, 0, 0, 0))
    with pytest.raises(wheels.CheckError, match="hold the same files, but differ"):
        wheels.same_bytes(one, later)


def test_wheels_are_compared_apart_from_cudas_library(wheels, tmp_path):
    info = "fastfreeze-0.dist-info"
    of_cuda = ["fastfreeze/libfastfreeze_cuda.so", f"{info}/RECORD", f"{info}/WHEEL"]
    kept = {"fastfreeze/libfastfreeze_cpu.so": "1", f"{info}/METADATA": "2"}
    wheel = archive(tmp_path / "one.whl", kept | dict.fromkeys(of_cuda, "3"))
    assert set(wheels.apart_from_cuda(wheel)) == set(kept)


def test_source_distributions_are_compared_but_for_setuptools_list(wheels, tmp_path):
    (tmp_path / "x.egg-info").mkdir()
    for name in ("SOURCES.txt", "PKG-INFO"):
        (tmp_path / "x.egg-info" / name).write_text(name)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as sdist:
        sdist.add(tmp_path / "x.egg-info", "x.egg-info")
    assert wheels.sources_in(tmp_path / "x.tar.gz") == {"x.egg-info/PKG-INFO": b"PKG-INFO"}


def test_the_rows_are_the_oldest_the_newest_and_without(wheels):
    sdist, compiled, pure = map(Path, ("sources.tar.gz", "compiled.whl", "pure.whl"))
    old, new = Path("python3.10"), Path("python3.14")
    packages = wheels.packages([old, new])
    assert [packages[name][0] for name in ("oldest", "newest")] == [old, new]
    rows = wheels.rows(sdist, compiled, pure)
    assert [r.file for r in rows] == [compiled, sdist, compiled, compiled, pure]
    assert [r.long for r in rows] == [True] + [False] * 4
    tests = [wheels.LONG_TESTS, wheels.FEW_TESTS, *[wheels.SHORT_TESTS] * 3]
    assert [r.tests for r in rows] == tests
    one_after_the_other = [name for name, _ in groupby(r.environment for r in rows)]
    assert one_after_the_other == list(packages)
    named = {name for row in rows for name in row.tests}
    found = Counter(path.stem.removeprefix("test_") for path in ROOT.glob("tests/**/test_*.py"))
    assert not [name for name in named if found[name] != 1]


def test_hosted_ci_runs_the_same_short_tests(wheels):
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    files = re.findall(r"tests/\w+/test_(\w+)\.py", settings["test-command"])
    assert tuple(files) == wheels.SHORT_TESTS
    assert f"-k '{wheels.SHORT_OF}'" in settings["test-command"]
    assert tuple(settings["test-requires"]) == wheels.TEST_PACKAGES
    repair = settings["repair-wheel-command"]
    assert tuple(re.findall(r"--exclude (\S+)", repair)) == wheels.NOT_OURS
