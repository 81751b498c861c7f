"""A pytest plugin (-p benchmarks.outcomes): each test's outcome as a line of JSON, as it ends.

pytest's own reports come at the end, which a run that is cut off does not reach. The lines go to
the file that FASTFREEZE_OUTCOMES names.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path


class _Log:
    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        line = {"test": report.nodeid, "outcome": _outcome(report), "reason": reason[-2000:]}
        with Path(os.environ["FASTFREEZE_OUTCOMES"]).open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # the controller hears of a worker's tests, too
        config.pluginmanager.register(_Log())


def _outcome(report) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "failed"
    if report.outcome == "failed" and report.when != "call":
        return "error"
    return report.outcome


def summary(path: Path) -> dict:
    """Counts, failures with their reasons, and why tests were skipped."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    bad = [line for line in lines if line["outcome"] in ("failed", "error")]
    skipped = Counter(line["reason"] for line in lines if line["outcome"] == "skipped")
    return {
        "counts": dict(Counter(line["outcome"] for line in lines)),
        "failures": {line["test"]: line["reason"] for line in bad},
        "skip_reasons": dict(skipped),
    }
