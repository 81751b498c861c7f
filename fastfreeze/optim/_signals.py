"""A stretch of code during which no signal's handler runs: handlers run right after it."""

from __future__ import annotations

# What signal's functions wrap: they take 20 times as long, to make enums.
import _signal  # type: ignore[import-not-found]
import signal
from types import FrameType
from typing import Any

# Those that users give handlers: Ctrl-C, a cluster's warnings, time limits.
_NUMBERS = tuple(
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class SignalsDeferred:
    """Puts off the handlers of signals, which Python runs in the main thread alone.

    ``KeyboardInterrupt`` then rises when the stretch is over, and a handler that saves a checkpoint
    finds all of it done.
    """

    def __enter__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: list[tuple[int, FrameType | None]] = []
        self._deferring = False
        try:
            for number, handler in zip(_NUMBERS, map(_signal.getsignal, _NUMBERS), strict=True):
                if callable(handler):
                    self._handlers[number] = handler
                    _signal.signal(number, self._handle)
            self._deferring = True
        except ValueError:  # not the main thread: it has no handlers to put off
            self._handlers.clear()
        except BaseException:  # a handler's own
            self._restore()
            raise

    def __exit__(self, *_: object) -> None:
        self._deferring = False
        try:
            self._restore()
        finally:
            if self._came:
                self._catch_up()

    def _catch_up(self) -> None:
        """Call the handlers whose signals came, each of them, whatever one before it raises."""
        number, frame = self._came.pop(0)
        try:
            self._handlers[number](number, frame)
        finally:
            if self._came:
                self._catch_up()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferring:
            self._came.append((number, frame))
        else:  # before or after the stretch, also if a handler's error kept one from being restored
            self._handlers[number](number, frame)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)
