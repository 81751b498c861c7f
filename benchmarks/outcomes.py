"""A pytest plugin (-p benchmarks.outcomes): each test's outcome as a line of JSON, as it ends.

pytest's own reports come at the end, which a run that is cut off does not reach. The lines go to
the file that FASTFREEZE_OUTCOMES names. Tests that have a line there already are left out, so that
a run can go on behind a test that killed it; it stops where a test has broken the CUDA context,
after which all others would fail. FASTFREEZE_SHARE=1/3 takes the second of each three tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

LONGEST_REASON = 6000  # characters


class _Log:
    def __init__(self, path: Path) -> None:
        self._path = path
        # Whoever was killed in the midst of a line has left half of one.
        self._gap = "" if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n") else "\n"
        self._known = {t for t, x in outcomes([path]).items() if x["outcome"] != "collected"}
        self._session: pytest.Session | None = None

    @pytest.hookimpl(trylast=True)  # behind -k
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        first, step = map(int, os.environ.get("FASTFREEZE_SHARE", "0/1").split("/"))
        items[:] = [item for item in items[first::step] if item.nodeid not in self._known]
        for item in items:
            self._write(item.nodeid, "collected")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "begun")

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self._write(report.nodeid, _outcome(report), reason[-LONGEST_REASON:])
        if report.failed and self._session is not None and context_is_broken():
            self._session.shouldstop = "the CUDA context is broken"

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._write(report.nodeid, "error", str(report.longrepr)[-LONGEST_REASON:])

    def _write(self, test: str, outcome: str, reason: str = "") -> None:
        line = json.dumps({"test": test, "outcome": outcome, "reason": reason})
        with self._path.open("a") as file:
            file.write(f"{self._gap}{line}\n")
        self._gap = ""


def pytest_configure(config) -> None:
    config.pluginmanager.register(_Log(Path(os.environ["FASTFREEZE_OUTCOMES"])))


def context_is_broken() -> bool:
    """Whether an error on the device has made this process's CUDA context useless."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # of more than one type
        return True
    return False


def _outcome(report) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "failed"
    if report.outcome == "failed" and report.when != "call":
        return "error"
    return report.outcome


def _lines(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # half a line
            found.append(json.loads(line))
    return found


def outcomes(paths: list[Path]) -> dict[str, dict]:
    """The last line of each test, or the one that says that it failed."""
    found: dict[str, dict] = {}
    for line in (line for path in paths for line in _lines(path)):
        if found.get(line["test"], line)["outcome"] != "failed":
            found[line["test"]] = line
    return found


def summary(paths: list[Path]) -> dict:
    """Counts, failures with their reasons, and why tests were skipped.

    A test that is "collected" has not been begun; one that is "begun" has not ended: it is running,
    or has killed its process.
    """
    lines = outcomes(paths)
    bad = {test: line for test, line in lines.items() if line["outcome"] in ("failed", "error")}
    skipped = Counter(x["reason"] for x in lines.values() if x["outcome"] == "skipped")
    return {
        "counts": dict(Counter(line["outcome"] for line in lines.values())),
        "failures": {test: line["reason"] for test, line in bad.items()},
        "not_ended": [test for test, line in lines.items() if line["outcome"] == "begun"],
        "skip_reasons": dict(skipped),
    }
