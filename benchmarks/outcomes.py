"""A pytest plugin (-p benchmarks.outcomes): each test's outcome as a line of JSON, as it ends.

pytest's own reports come at the end, which a run that is cut off does not reach. The lines go to
the file that FASTFREEZE_OUTCOMES names.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path


def pytest_runtest_logreport(report) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the controller hears of the test, too
        return
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        line = {"test": report.nodeid, "outcome": _outcome(report), "reason": reason[-2000:]}
        with Path(os.environ["FASTFREEZE_OUTCOMES"]).open("a") as file:
            file.write(json.dumps(line) + "\n")


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
