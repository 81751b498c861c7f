"""Saves that a thread of its own makes, one after the other."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable
from threading import Thread

from fastfreeze.errors import warn


class Background:
    """One call at a time in a thread, which an exiting interpreter waits for.

    A child process that is forked has no thread to wait for.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []  # more than one where several threads begin some
        # By then all have ended: a call holds on to its store, and threads end before exit.
        weakref.finalize(self, _warn_of_errors, self._calls)

    def submit(self, call: Callable[[], object]) -> None:
        """Have ``call`` made; those before it have ended."""
        begun = _Call(call)
        begun.start()
        self._calls.append(begun)

    def flush(self) -> None:
        """Wait for all calls so far; raise what the earliest raised that was not raised yet."""
        for call in tuple(self._calls):
            call.join()
            try:
                self._calls.remove(call)
            except ValueError:  # another thread has asked, too
                continue
            if call.error is not None:
                raise call.error


class _Call(Thread):
    """A call, and what it has raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(name="fastfreeze-snapshot")
        self._call: Callable[[], object] | None = call
        self.error: BaseException | None = None

    def run(self) -> None:
        assert self._call is not None
        try:
            self._call()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the store, and weights
            self.error = error
        finally:
            self._call = None


def _warn_of_errors(calls: list[_Call]) -> None:
    for call in calls:
        if call.error is not None:
            warn(f"a snapshot was not saved, and nobody asked: {call.error!r}")
