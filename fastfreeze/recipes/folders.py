"""Folders of images, one for each class: what lies where is told before anything is read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from fastfreeze.errors import warn
from fastfreeze.recipes.images import FORMATS, image_endings
from fastfreeze.text import some

# What systems and programs put beside a user's files, some of it images; names with a dot as well.
_NOT_THE_USERS = {
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "Thumbs.db",
    "desktop.ini",
}


def visible(name: str) -> bool:
    """Whether a file or folder is one that its user sees as such."""
    return not name.startswith(".") and name not in _NOT_THE_USERS


def _visible_in(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if visible(p.name)), key=lambda path: path.name)


def class_folders(root: Path, inside: str = "") -> tuple[list[str], list[int], dict[str, int]]:
    """The images below a folder for each class, in the order of torchvision's ``ImageFolder``.

    Unlike that, it takes every format that is read, leaves out what is hidden, does not go round
    in circles of links, and passes over nothing without a word.

    Args:
        root: holds the classes' folders.
        inside: the folder in that of a class where its images are; "" for that of the class.

    Returns:
        The images' paths, the class of each, and the numbers of the classes by name.

    Raises:
        OSError: these are no classes to tell apart, or a folder cannot be listed.

    Warns:
        FastfreezeWarning: files are left out, folders lie in classes, or names are alike.
    """
    if not root.is_dir():
        beside = [entry.name for entry in _visible_in(root.parent)] if root.parent.is_dir() else []
        instead = f"; {root.parent} holds {some(beside)}" if beside else ""
        raise FileNotFoundError(f"there is no folder {root}{instead}")
    entries = _visible_in(root)
    folders = [entry for entry in entries if entry.is_dir()]
    images, left_out = [], [str(entry) for entry in entries if not entry.is_dir()]
    for folder in folders:
        found, others = _files_below(folder / inside)
        images.append(found)
        left_out += others
    classes = {folder.name: label for label, folder in enumerate(folders)}
    by_class = dict(zip(classes, images, strict=True))
    outside, nested = _left_out(root, left_out), _nested(root, by_class)
    _check(root, by_class, outside, nested)
    for text in (outside, nested, _alike(list(classes))):
        if text:
            warn(f"{root}: {text}")
    labels = [classes[name] for name, found in by_class.items() for _ in found]
    return [path for found in images for path in found], labels, classes


def _files_below(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of the images below a folder, ordered by folder and name, and of the other files."""

    def refuse(error: OSError) -> None:
        raise error

    files = []
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = filter(visible, folders)
        for name in folders:
            _check_no_circle(Path(path, name))
        files += [(path, name) for name in names if visible(name)]
    endings = image_endings()
    images: list[str] = []
    others: list[str] = []
    for path, name in sorted(files):
        kind = images if name.lower().endswith(endings) else others
        kind.append(f"{path}{os.sep}{name}")
    return images, others


def _check_no_circle(folder: Path) -> None:
    if folder.is_symlink() and any(folder.samefile(p) for p in folder.absolute().parents):
        raise OSError(f"{folder} is a link to a folder that it is in: remove it")


def _check(root: Path, by_class: dict[str, list[str]], left_out: str, nested: str) -> None:
    """Refuse what cannot be meant; ``left_out`` and ``nested`` tell why it may be so."""
    also = f"; {left_out}" if left_out else ""
    if not by_class:
        raise OSError(f"{root} holds no folder of a class{also}")
    empty = [name for name, paths in by_class.items() if not paths]
    if empty:
        raise OSError(f"{root} holds classes without images: {some(empty)}{also}")
    if len(by_class) == 1:
        also = f"; {nested}" if nested else also
        raise OSError(f"{root} holds one class alone, {some(list(by_class))}{also}")


def _left_out(root: Path, paths: list[str]) -> str:
    """What is said of files that belong to no class, or are not read."""
    if not paths:
        return ""
    return (
        f"files left out: {len(paths)}, such as {os.path.relpath(paths[0], root)}; read are "
        f"those in a class's folder with the ending of {', '.join(FORMATS)}"
    )


def _nested(root: Path, by_class: dict[str, list[str]]) -> str:
    """What is said of a class whose images lie in several folders."""
    for name, paths in by_class.items():
        folders = sorted({path.rpartition(os.sep)[0] for path in paths})
        if len(folders) > 1:
            below = [os.path.relpath(folder, root) for folder in folders]
            return (
                f"the images in {some(below)} are all of the class {name}; "
                "if these folders are classes, move them up"
            )
    return ""


def _alike(names: list[str]) -> str:
    """What is said of classes whose names differ in case alone."""
    times = Counter(name.casefold() for name in names)
    alike = [name for name in names if times[name.casefold()] > 1]
    return f"{some(alike)} are different classes" if alike else ""
