"""SIGINT and SIGTERM as a request to stop, which the training loop checks."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from metarun.core import distributed
from metarun.core.console import Bar


class StopRequestedError(Exception):
    """A signal was received, and the current work has stopped where it can be resumed."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Signals:
    """A context in which SIGINT and SIGTERM set a request to stop, which `check` raises.

    A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python allows handlers in the main thread only; in others the caller's remain.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def check(self, _: int = 0) -> None:
        """Raise StopRequestedError if any process received a signal.

        All processes raise it at the same step.
        """
        signum = distributed.maximum(self.signum or 0)
        if signum:
            self.signum = signum
            raise StopRequestedError(signum)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        if not distributed.is_main():
            return
        # Not by logging: the signal may have interrupted a logging call.
        with suppress(OSError):
            os.write(2, b"\nsaving and stopping; repeat the signal to stop at once\n")


def ticker(bar: Bar, signals: Signals) -> Any:
    """Return a function that moves the bar to a count and raises if a signal was received."""

    def tick(done: int) -> None:
        bar.to(done)
        signals.check()

    return tick
