"""Saves that run in a thread, one after the other."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable
from threading import Thread

from fastfreeze.errors import warn

_Errors = list[BaseException]  # that a call has raised


class Background:
    """Runs one call at a time in a thread. An exiting interpreter waits for it, a fork does not."""

    def __init__(self) -> None:
        # More than one where several threads begin some.
        self._calls: list[tuple[Thread, _Errors]] = []
        # By then all have ended: a call holds on to its store, and threads end before exit.
        weakref.finalize(self, _warn_of_errors, self._calls)

    def submit(self, call: Callable[[], object]) -> None:
        """Have ``call`` made; those before it have ended."""
        errors: _Errors = []
        thread = Thread(target=_make, args=(call, errors), name="fastfreeze-snapshot")
        thread.start()
        self._calls.append((thread, errors))

    def flush(self) -> None:
        """Wait for all calls so far; raise the earliest error that was not raised yet."""
        for begun in tuple(self._calls):
            thread, errors = begun
            thread.join()
            try:
                self._calls.remove(begun)
            except ValueError:  # another thread has asked, too
                continue
            if errors:
                raise errors[0]


def _make(call: Callable[[], object], errors: _Errors) -> None:
    try:
        call()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the store, and weights
        errors.append(error)
    finally:
        del call  # so does it, in this frame


def _warn_of_errors(calls: list[tuple[Thread, _Errors]]) -> None:
    for error in [error for _, errors in calls for error in errors]:
        warn(f"a snapshot was not saved, and nobody asked: {error!r}")
