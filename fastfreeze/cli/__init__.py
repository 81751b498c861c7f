"""The command ``fastfreeze``: train, finetune, compare, reproduce, plot, plan, backends.

Exit codes: 0 done, 1 failed for a reason that the message tells, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from typing import Any

try:
    import click
except ModuleNotFoundError:
    sys.exit('fastfreeze: the command line needs click: pip install "fastfreeze[train]"')

from fastfreeze._version import __version__
from fastfreeze.cli import finetune, plan, reproduce, show, train
from fastfreeze.errors import SnapshotError
from fastfreeze.recipes.errors import RecipeError


class _Group(click.Group):
    """Tells expected errors in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (RecipeError, SnapshotError) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader has gone: click ends quietly
                raise
            raise click.ClickException(f"{type(error).__name__}: {error}") from error
        except KeyboardInterrupt:  # click's own ending would say "Aborted!", and exit with 1
            click.echo("Interrupted.", err=True)
            raise click.exceptions.Exit(130) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train faster by freezing, and get an ensemble for free."""


for command in (
    train.train,
    finetune.finetune,
    train.compare,
    reproduce.reproduce,
    show.plot,
    plan.plan,
    show.backends,
):
    main.add_command(command)
