"""``import fastfreeze``: light until a public name is used, and then all of them are there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastfreeze
from fastfreeze import _public


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "use",
    [
        "from fastfreeze import *; SGD, trim",
        "import fastfreeze; fastfreeze.SGD; fastfreeze.schedule.StepDecay",
        "import fastfreeze; assert 'SGD' in dir(fastfreeze)",
    ],
)
def test_torch_is_imported_with_the_first_name(use):
    done = run(
        f"import fastfreeze, sys; assert 'torch' not in sys.modules\n{use}\nsys.modules['torch']"
    )
    assert done.returncode == 0, done.stderr


def test_the_names_are_those_of_the_list():
    assert fastfreeze.__all__ == _public.__all__
    assert set(_public.__all__) <= set(dir(fastfreeze))
    for name in _public.__all__:
        assert getattr(fastfreeze, name) is getattr(_public, name)


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="module 'fastfreeze' has no attribute 'SDG'"):
        fastfreeze.SDG  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SDG'"):
        from fastfreeze import SDG  # noqa: F401
