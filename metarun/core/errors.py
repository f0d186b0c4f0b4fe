"""Exit codes, the exceptions that end a run, and one-line descriptions of errors."""

from __future__ import annotations

from typing import TypeGuard

from metarun.core.files import DISK_FULL, full_disk
from metarun.core.memory import shortage
from metarun.core.streams import printable


class RunError(ValueError):
    """A run cannot continue. The message is one line: what happened and what to do."""


class OutOfTime(RunError):  # noqa: N818 - requested by the user, not an error
    """Training has taken the time that the user has given it, and the run is saved."""


class Interrupted(Exception):  # noqa: N818 - requested by the user, not an error
    """A signal stopped the run. The message says where it stopped and how to resume it.

    Attributes:
        signum: Number of the signal.
        exit_code: Exit code that shells expect of a program ended by this signal.
    """

    def __init__(self, signum: int, text: str = "") -> None:
        super().__init__(text or f"stopped by signal {signum}")
        self.signum = signum
        self.exit_code = 128 + signum


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line."""
    return printable(" ".join(str(error).split())) or type(error).__name__


EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Return whether an error says that a disk is full, or a quota exhausted."""
    return isinstance(error, OSError) and error.errno in DISK_FULL


def describe_error(error: BaseException) -> str:
    """Describe an error for the user in one line, without a traceback."""
    if is_full(error):
        what, remedy = full_disk(error.filename)
        return printable(f"{what}: {remedy} and repeat the command")
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        return printable(f"{named}{error.strerror}")
    if isinstance(error, (ValueError, ArithmeticError, OSError)):
        return one_line(error)
    if (short := shortage(error)) is not None:
        return short
    # Not the user's mistake: the type of the exception helps whoever has to fix it.
    return f"{type(error).__name__}: {one_line(error)} (debug=true shows where)"
