"""SIGINT, SIGTERM and SIGHUP as a request to stop, which the training loop checks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from metarun.core import distributed
from metarun.core.console import Bar


class StopRequestedError(Exception):
    """A signal was received, and the current work has stopped where it can be resumed."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class OutOfTimeError(Exception):
    """Training has taken `train.max_minutes`, and has stopped where it can be resumed."""

    def __init__(self, minutes: float) -> None:
        super().__init__(minutes)
        self.minutes = minutes


HANGUP = getattr(signal, "SIGHUP", None)
"""The signal of a closed terminal; None on Windows."""

Receive = Callable[[int, FrameType | None], None]


@contextmanager
def received_by(receive: Receive) -> Iterator[None]:
    """Let a function receive SIGINT, SIGTERM and SIGHUP, where they would end the process."""
    before: dict[int, Any] = {}
    # Python allows handlers in the main thread only; in others the caller's remain.
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM, HANGUP):
            # `nohup` ignores the end of the terminal.
            if signum is not None and (
                signum != HANGUP or signal.getsignal(signum) is not signal.SIG_IGN
            ):
                before[signum] = signal.signal(signum, receive)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Signals:
    """The request to stop of a signal, which `check` raises.

    Attributes:
        signum: The first signal received; None before.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._can_abort = False

    @contextmanager
    def received(self) -> Iterator[None]:
        """Receive signals within the block."""
        with received_by(self._receive):
            yield

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """Let a second signal raise KeyboardInterrupt within the block, once.

        What follows, such as the status of the run, is written however many signals come.
        """
        self._can_abort = True
        try:
            yield
        finally:
            self._can_abort = False

    def check(self, _: int = 0) -> None:
        """Raise StopRequestedError if any process received a signal.

        All processes raise it at the same step.
        """
        signum = distributed.maximum(self.signum or 0)
        if signum:
            self.signum = signum
            raise StopRequestedError(signum)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            if distributed.is_main():
                say("saving and stopping; repeat the signal to stop at once")
        # A terminal that closes may send several.
        elif self._can_abort and signum != HANGUP:
            self._can_abort = False
            raise KeyboardInterrupt


def say(text: str) -> None:
    """Write a line to the standard error from a handler of signals."""
    # Not by logging: the signal may have interrupted a logging call.
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def ticker(bar: Bar, signals: Signals) -> Any:
    """Return a function that moves the bar to a count and raises if a signal was received."""

    def tick(done: int) -> None:
        bar.to(done)
        signals.check()

    return tick
