"""Sphinx: the pages of this folder, and the reference from the docstrings.

``python -m sphinx -W docs build/docs``
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

import fastfreeze

project = "fastfreeze"
author = "the fastfreeze authors"
version = release = fastfreeze.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"fastfreeze {release}"

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["lightning", "pytorch_lightning", "transformers"]
napoleon_use_ivar = True  # attributes are described where the class is
napoleon_use_rtype = False


def without_links_to_the_repository(_: Sphinx, __: str, source: list[str]) -> None:
    """Of links to files outside docs/, which the site does not hold, leave the text alone."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", without_links_to_the_repository)
