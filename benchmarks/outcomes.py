"""A pytest plugin (-p benchmarks.outcomes): each test's outcome as a line of JSON, as it ends.

pytest's own reports come at the end, which a run that is cut off does not reach. The lines go to
the file that FASTFREEZE_OUTCOMES names. A process of pytest-xdist ends itself where a test has
broken its CUDA context, after which all others would fail; another one then takes its place.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.jobs import DIED, context_is_broken

LONGEST_REASON = 6000  # characters


class _Log:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "begun")

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", report)

    def _write(self, test: str, outcome: str, report=None) -> None:
        why = report and report.longrepr
        reason = why[2] if isinstance(why, tuple) else str(why or "")
        line = {"test": test, "outcome": outcome, "reason": reason[-LONGEST_REASON:]}
        with self._path.open("a") as file:
            file.write(f"{json.dumps(line)}\n")


class _Worker:
    @pytest.hookimpl(trylast=True)  # the report has been sent
    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and context_is_broken():
            os._exit(DIED)


def pytest_configure(config) -> None:
    of_xdist = hasattr(config, "workerinput")
    log = Path(os.environ["FASTFREEZE_OUTCOMES"])
    config.pluginmanager.register(_Worker() if of_xdist else _Log(log))


def summary(path: Path) -> dict:
    """Counts of the last outcomes, failures with their reasons, and why tests were skipped.

    A test that is "begun" has not ended: it is running, or the run was cut off.
    """
    lines: dict[str, dict] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if lines.get(line["test"], line)["outcome"] != "failed":
            lines[line["test"]] = line

    def reasons(outcome: str) -> dict[str, str]:
        return {test: x["reason"] for test, x in lines.items() if x["outcome"] == outcome}

    return {
        "counts": dict(Counter(line["outcome"] for line in lines.values())),
        "failures": reasons("failed"),
        "not_ended": list(reasons("begun")),
        "skip_reasons": dict(Counter(reasons("skipped").values())),
    }
