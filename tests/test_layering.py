"""Each part of the package imports only from the parts before it."""

from __future__ import annotations

import ast
from pathlib import Path

import fastfreeze

PACKAGE = Path(fastfreeze.__file__).parent
ORDER = [
    "_version",
    "checks",
    "errors",
    "files",
    "text",
    "clock",
    "views",
    "execution",
    "schedule",
    "_frozen",
    "layer_names",
    "layers",
    "freezing",
    "saving",
    "layer_costs",
    "ops",
    "optim",
    "trimming",
    "cache",
    "blockers",
    "report",
    "snapshots",
    "ensemble",
    "_public",
    "integrations",
    "distributed",
    "recipes",
    "reproduction",
    "cli",
    "__main__",
]
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part_of(module):
    part = module.split(".")[1]
    return "_version" if part == "__version__" else part


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        yield from (part_of(n) for n in names if n.startswith("fastfreeze."))


def test_imports_go_one_way():
    backwards = []
    for path in FILES:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        assert own in ORDER, f"{own} has no place in the order"
        later = {p for p in imported_parts(path) if ORDER.index(p) > ORDER.index(own)}
        backwards += [f"{path.relative_to(PACKAGE)} imports from {part}" for part in later]
    assert not backwards


def test_files_stay_readable():
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in FILES}
    assert not {name: length for name, length in lengths.items() if length > 600}
