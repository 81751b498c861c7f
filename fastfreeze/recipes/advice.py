"""Which method to take, by the numbers of one finished comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastfreeze.recipes.rundir import Line
from fastfreeze.recipes.tables import METHOD_TITLES, by_method, delivered_error

_FREEZING = ("freezeout", "both")
_GAINS = 0.97  # of plain SGD's time: above that is noise


def advice(results: Sequence[Line], epochs: int, num_tested: int) -> str:
    """Which method to take, and which plain run is freezing's fair rival; "" without plain SGD.

    Args:
        results: of the trainings, each of so many ``epochs``.
        epochs: >= 1.
        num_tested: test images; where there is one seed, they give the standard error.
    """
    methods = by_method(results)
    if "sgd" not in methods or len(methods) < 2:
        return ""
    errors = {m: [delivered_error(r) for r in own] for m, own in methods.items()}
    seconds = {m: float(np.mean([r["seconds"] for r in own])) for m, own in methods.items()}
    best = min(errors, key=lambda m: float(np.mean(errors[m])))
    off = {m: float(np.mean(e) - np.mean(errors[best])) for m, e in errors.items()}
    spread = {m: _standard_error(e, errors[best], num_tested) for m, e in errors.items()}
    taken = min((m for m in methods if off[m] <= spread[m]), key=seconds.__getitem__)
    lines = [
        f"Of these, take {METHOD_TITLES[taken]}: the fastest whose error is the lowest, or within "
        "one standard error of it."
    ]
    for method in (m for m in _FREEZING if m in methods):
        share, title = seconds[method] / seconds["sgd"], METHOD_TITLES[method]
        shorter = round(share * epochs)
        if share > _GAINS:
            lines.append(f"{title} took {share:.2f} of plain SGD's time: nothing is gained here.")
        elif 0 < shorter < epochs:
            lines.append(
                f"{title} took {share:.2f} of plain SGD's time. A plain run that is as short is "
                f"its fair rival, and often as good: --methods sgd --epochs {shorter}."
            )
    return "\n".join(lines)


def _standard_error(own: Sequence[float], others: Sequence[float], num_tested: int) -> float:
    """Of the difference of two mean errors: over the seeds, or over the images of one seed."""

    def variance(errors: Sequence[float]) -> float:
        if len(errors) > 1:
            return float(np.var(errors, ddof=1)) / len(errors)
        return errors[0] * (1 - errors[0]) / num_tested

    return math.sqrt(variance(own) + variance(others))
