"""Work that a thread of its own does, in order."""

from __future__ import annotations

import os
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from fastfreeze.errors import warn


class Background:
    """Calls made one after the other in one thread, which an exiting interpreter waits for.

    A child process that is forked begins without any.
    """

    def __init__(self) -> None:
        self._start()

    def submit(self, call: Callable[[], object]) -> None:
        """Have ``call`` made after those before it."""
        self._renew_in_child()
        with self._lock:
            self._futures.append(self._executor.submit(_made, call))

    def wait_for_room(self, limit: int) -> None:
        """Wait until fewer than ``limit`` calls have not ended."""
        self._renew_in_child()
        with self._lock:
            left = [future for future in self._futures if not future.done()]
        wait(left[: max(0, len(left) - limit + 1)])  # they end in order

    def flush(self) -> None:
        """Wait for all calls so far; then as :meth:`raise_error`."""
        self._renew_in_child()
        with self._lock:
            futures = tuple(self._futures)
        wait(futures)
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what the earliest call raised of those that have ended and were not asked yet."""
        self._renew_in_child()
        with self._lock:
            while self._futures and self._futures[0].done():
                self._futures.popleft().result()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._futures: deque[Future[None]] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fastfreeze-snapshots")
        # By then all have ended: a call holds on to its store, and threads end before exit.
        weakref.finalize(self, _warn_of_errors, self._futures)

    def _renew_in_child(self) -> None:
        if self._pid != os.getpid():
            self._start()


def _made(call: Callable[[], object]) -> None:
    try:
        call()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the store, and copies of weights
        del call
        raise


def _warn_of_errors(futures: deque[Future[None]]) -> None:
    for future in futures:
        error = future.exception() if future.done() else None
        if error is not None:
            message = f"a snapshot was not saved, and nobody asked: {error!r}"
            warn(message)
