"""Exit codes, the exceptions that end a run, and errors in one line for a reader."""

from __future__ import annotations


class RunError(ValueError):
    """A run that broke off: its text is one line with what happened and what to do."""


class Interrupted(Exception):  # noqa: N818 - a wish of the user's, not an error
    """A signal stopped the run, which can be continued: the text says from where and how.

    Attributes:
        signum: The signal.
        exit_code: What a shell expects of a program that this signal ended.
    """

    def __init__(self, signum: int, text: str = "") -> None:
        super().__init__(text or f"stopped by signal {signum}")
        self.signum = signum
        self.exit_code = 128 + signum


def one_line(error: BaseException) -> str:
    """The message of an exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def describe_error(error: BaseException) -> str:
    """An error in one line for a reader, without a traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, ArithmeticError, OSError)):
        return one_line(error)
    # Not a user's mistake, so that one who can mend it needs to know what it is.
    return f"{type(error).__name__}: {one_line(error)} (debug=true shows where)"
