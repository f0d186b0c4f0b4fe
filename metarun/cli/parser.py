"""Reading the words of a subcommand."""

from __future__ import annotations

import argparse
from typing import NoReturn

_LONGEST = 120


class Parser(argparse.ArgumentParser):
    """One that answers what it cannot read in one line, as every other mistake is answered."""

    def error(self, message: str) -> NoReturn:
        """Refuse the words.

        Raises:
            ValueError: Always.
        """
        # A pattern that the shell has spelled out may be thousands of files.
        shown = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} …"
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise ValueError(f"{shown}: expected `{usage}`")
