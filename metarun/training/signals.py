"""SIGINT and SIGTERM as a request to stop, which the work in hand asks for."""

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
    """A signal came and the work in hand is left where it can be taken up again."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Turns SIGINT and SIGTERM into a wish that the loop asks for at its own pace."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python allows handlers in the main thread alone; elsewhere the caller's stay.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def check(self, _: int = 0) -> None:
        """Leave if there was a signal, in whichever process: all leave at the same step."""
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
        # Not through the log, which the signal may have come in the middle of.
        with suppress(OSError):
            os.write(2, b"\nstopping and saving; once more stops at once\n")


def ticker(bar: Bar, signals: Signals) -> Any:
    def tick(done: int) -> None:
        bar.to(done)
        signals.check()

    return tick
