"""Errors of recipes, each told in one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class RecipeError(RuntimeError):
    """A recipe cannot go on for a reason that its user can mend: the message says how."""


@contextmanager
def told(what: str, how: str = "") -> Iterator[None]:
    """Turn any error inside, such as of a user's code, into a RecipeError of one line.

    It says ``what`` is wrong, the error's own first sentence, and ``how`` to go on.
    """
    try:
        yield
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:
        line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        first = line.partition(". ")[0].rstrip(".")
        raise RecipeError(f"{what}: {first}{how}") from error


def optional_package(name: str, how: str = 'pip install "fastfreeze[train]"') -> Any:
    """The module ``name``.

    Raises:
        RecipeError: its package is not installed; the message says ``how`` to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise RecipeError(f"the package {package} is not installed: {how}") from error
