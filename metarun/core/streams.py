"""The standard streams: what they show fits the terminal, and their errors end no run."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console


def printable(text: str, kept: str = "") -> str:
    """Return a text with unprintable characters escaped, except those `kept`.

    Names of files, classes and runs may come from somebody else, and a terminal obeys their codes.
    """
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def terminal_columns() -> int:
    """Return the number of columns of the terminal; a large number for a file or a pipe."""
    return shutil.get_terminal_size((10_000, 0)).columns


def wrapped(text: str, width: int, before: str = "") -> list[str]:
    """Return a text in lines of whole words; those after the first are indented like it.

    A command in backticks stays on one line, so that it can be copied.
    """
    held = re.sub("`[^`]*`", lambda found: found[0].replace(" ", _HELD), printable(text))
    lines = textwrap.wrap(
        held, width, initial_indent=before, subsequent_indent=" " * len(before),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace(_HELD, " ") for line in lines]


_HELD = "\0"
"""Stands for a space at which no line ends."""


def fitted(text: str, width: int) -> str:
    """Return lines in at most `width` columns: rules are cut, others wrapped by `wrapped`.

    What follows the last gap of a line, such as the last column of a table, is indented by it.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width:
            lines.append(line)
        elif not line.strip("─"):
            lines.append(line[:width])
        else:
            gap = re.search(r".*\S  +(?=\S)|^ *", line[: width // 2 + 1])
            before = "" if gap is None else gap[0]
            lines += wrapped(line[len(before) :], width, before)
    return "\n".join(lines)


def tell(text: str, stream: TextIO | None = None) -> None:
    """Write lines to standard output or another stream, in whole words on a terminal."""
    stream = stream or sys.stdout
    print(fitted(text, terminal_columns()) if stream.isatty() else text, file=stream, flush=True)


spinning: list[Console] = []
"""The console that shows a spinner, if there is one; it writes lines above it."""
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan", "interrupted": "yellow"}


def say(kind: Literal["error", "warning", "note", "interrupted"], text: str) -> None:
    """Write `kind: text` to standard error, on a terminal in whole words, the first in color."""
    with unbroken_streams():
        if not sys.stderr.isatty():
            print(f"{kind}: {text}", file=sys.stderr, flush=True)
            return
        from rich.console import Console
        from rich.text import Text

        console = spinning[-1] if spinning else Console(stderr=True)
        shown = fitted(f"{kind}: {text}", console.width)
        line = Text.assemble((kind, _STYLES[kind]), shown[len(kind) :])
        console.print(line, soft_wrap=True, highlight=False)


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
