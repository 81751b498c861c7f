"""What can be expected to go wrong in a recipe, told in one line."""

from __future__ import annotations

import importlib
from typing import Any


class RecipeError(RuntimeError):
    """A recipe cannot go on for a reason that its user can mend: the message says how."""


def optional_package(name: str, how: str = 'pip install "fastfreeze[train]"') -> Any:
    """The module ``name`` of a package that the extra "train" installs, or else ``how``.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise RecipeError(f"the package {package} is not installed: {how}") from error
