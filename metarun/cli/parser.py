"""The argument parser that all subcommands share."""

from __future__ import annotations

import argparse
from typing import NoReturn

_LONGEST = 120


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a one-line error instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Reject the arguments with argparse's message and the usage.

        Raises:
            ValueError: Always.
        """
        # A pattern that the shell has expanded may be thousands of files.
        shown = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} …"
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise ValueError(f"{shown}: expected `{usage}`")
