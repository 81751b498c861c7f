"""Tables of a test's rows in which every two values meet, where all combinations would be many."""

from __future__ import annotations

from itertools import combinations

import pytest

from tests.conftest import HAS_GPU


def covering(*indirect, **tables):
    """Parametrizes a test by rows in which each value meets each value of every other table.

    A fault of a kernel hangs on one value or on two that meet, hardly ever on three. A value that
    is skipped here has one row, so that it is seen to be, and takes no part in the others. With a
    GPU, which is quick, each backend has all pairs of the other tables for itself.

    Args:
        indirect: names that are fixtures', which take the value as request.param.
        tables: for each name its values, pytest.params with an id among them, or a dict by id.
    """
    columns = {name: _as_params(values) for name, values in tables.items()}
    apart = columns["backend_and_device"] if HAS_GPU and "backend_and_device" in columns else []
    each = [columns | {"backend_and_device": [backend]} for backend in apart] or [columns]
    params = [
        pytest.param(
            *(p.values[0] for p in row),
            marks=[mark for p in row for mark in p.marks],
            id="-".join(p.id for p in row),
        )
        for chosen in each
        for row in _rows(list(chosen.values()))
    ]
    return pytest.mark.parametrize(tuple(tables), params, indirect=list(indirect))


def _rows(columns):
    able = [[p for p in column if not _skipped(p)] or column for column in columns]
    rows = [
        [column[i] for column, i in zip(able, row, strict=True)]
        for row in _every_pair([len(column) for column in able])
    ]
    for at, column in enumerate(columns):
        for p in column:
            if not any(p is a for a in able[at]):
                rows.append([p if i == at else able[i][0] for i in range(len(able))])
    return rows


def _as_params(values):
    named = values.items() if isinstance(values, dict) else ((str(v), v) for v in values)
    return [v if hasattr(v, "marks") else pytest.param(v, id=name) for name, v in named]


def _skipped(param):
    return any(mark.name == "skipif" and mark.args[0] for mark in param.marks)


def _every_pair(sizes):
    """Rows of indices below sizes in which every two indices of two places meet; few rows."""
    places = range(len(sizes))
    missing = {
        ((i, a), (j, b))
        for i, j in combinations(places, 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    }
    rows = []
    while missing:
        row = dict(min(missing))
        for i in places:
            if i not in row:
                gains = [
                    sum(tuple(sorted([(i, a), other])) in missing for other in row.items())
                    for a in range(sizes[i])
                ]
                row[i] = gains.index(max(gains))
        rows.append([row[i] for i in places])
        missing -= set(combinations(enumerate(rows[-1]), 2))
    return rows
