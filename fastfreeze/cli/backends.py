"""``fastfreeze backends``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from fastfreeze.text import format_table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def backends(as_json: bool) -> None:
    """Show which kernels can run here, and why others cannot.

    \b
    Example:
      fastfreeze backends
    """
    from fastfreeze.kernels import library

    found = library.backends()
    if as_json:
        click.echo(json.dumps({name: asdict(state) for name, state in found.items()}, indent=2))
        return
    rows = [
        [name, "yes" if state.available else "no", state.reason] for name, state in found.items()
    ]
    click.echo(format_table(["backend", "available", "why"], rows))
