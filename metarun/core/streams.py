"""The standard streams, whose errors must not end a run: a terminal closes, a disk is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO, cast


def printable(text: str, kept: str = "") -> str:
    """Return a text with unprintable characters escaped, except those `kept`.

    Names of files, classes and runs may come from somebody else, and a terminal obeys their codes.
    """
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan", "interrupted": "yellow"}


def say(kind: Literal["error", "warning", "note", "interrupted"], text: str) -> None:
    """Write `kind: text` to standard error, on a terminal with the first word in color."""
    with unbroken_streams():
        if not sys.stderr.isatty():
            print(f"{kind}: {text}", file=sys.stderr, flush=True)
            return
        from rich.console import Console
        from rich.text import Text

        colored = Text.assemble((f"{kind}:", _STYLES[kind]), f" {text}")
        Console(stderr=True, highlight=False).print(colored, soft_wrap=True)


def open_closed_streams() -> None:
    """Open the null device for the standard streams that the shell has closed, as with `>&-`.

    Otherwise the next file that the program opens would take the number of the stream.
    """
    # The lowest number that is free is opened, which is that of the stream.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for good


@contextmanager
def unbroken_streams() -> Iterator[None]:
    """Let no error of standard output and standard error end the block; what fails is not shown.

    It may be nested.
    """
    before = sys.stdout, sys.stderr
    if isinstance(before[0], _Unbroken):
        yield
        return
    sys.stdout, sys.stderr = (cast("TextIO", stream and _Unbroken(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            if stream is not None:
                flush_or_discard(stream)


def flush_or_discard(stream: TextIO) -> OSError | ValueError | None:
    """Flush a stream; if this fails, discard what it holds and return the error.

    Python would flush it again when it exits, and print a traceback.
    """
    try:
        stream.flush()
    except (OSError, ValueError) as error:
        # A stream of a test has no number.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return error
    return None


class _Unbroken:
    """A text stream that ignores errors of its device, and shows what it cannot encode as `?`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            return self.write(text.encode(error.encoding, "replace").decode(error.encoding))
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
