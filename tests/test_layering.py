"""Each file of the package imports only from the rooms and files before it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import fastfreeze

PACKAGE = Path(fastfreeze.__file__).parent
# Rooms, and files that stand elsewhere than the rest of their room.
ORDER = [
    *("_version", "checks", "errors", "files", "text", "clock", "views"),
    *("schedule", "layers", "kernels", "optim", "trimming", "cache"),
    *("layers.blockers", "layers.report"),
    *("snapshots", "ensemble", "_public", "integrations", "distributed"),
    *("recipes", "reproduction", "cli", "__main__"),
]
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def imports(path):
    """The files of the package that a file imports from, but for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (file_of(f"{node.module}.{a.name}") for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (file_of(a.name) for a in node.names)


def file_of(name):
    """The file that a module, or a name in one, stands in; "" if it is none of the package's."""
    if not name.startswith("fastfreeze."):
        return ""
    name = name.removeprefix("fastfreeze.").replace("__version__", "_version")
    while name and not (found := {name, f"{name}.__init__"} & FILES.keys()):
        name = name.rpartition(".")[0]
    return min(found) if name else ""


def place(file):
    """Where a file stands: its own place, else its room's."""
    room = file.split(".")[0]
    return ORDER.index(file if file in ORDER else room)


def test_imports_go_one_way():
    backwards = [
        f"{file} imports from {other}"
        for file, path in FILES.items()
        for other in imports(path)
        if other and place(other) > place(file)
    ]
    assert not backwards


def test_there_are_no_circles():
    left = {file: set(imports(path)) - {file} for file, path in FILES.items()}
    while free := [file for file, others in left.items() if not others & left.keys()]:
        for file in free:
            del left[file]
    assert not left


def test_underscored_files_are_read_by_their_room():
    strangers = [
        f"{file} imports from {other}"
        for file, path in FILES.items()
        for other in imports(path)
        for room, _, name in [other.rpartition(".")]
        if room and re.match("_[a-z]", name) and room != file.rpartition(".")[0]
    ]
    assert not strangers


def test_files_stay_readable():
    lengths = {file: len(path.read_text().splitlines()) for file, path in FILES.items()}
    assert not {name: length for name, length in lengths.items() if length > 600}
