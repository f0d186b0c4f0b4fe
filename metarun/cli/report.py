"""`metarun report`: one HTML page for a run, for several runs, or for a sweep.

The page is made from the files of the runs. Nothing is measured again, except that a few single
test tasks are evaluated once more to be drawn. Panels whose files are missing are left out.
"""

from __future__ import annotations

import argparse
import os
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from metarun.core.console import busy
from metarun.core.errors import EXIT_FAILED, EXIT_OK
from metarun.core.streams import printable, say
from metarun.core.words import number_of
from metarun.reporting import published
from metarun.reporting.published import Run
from metarun.reporting.writing import FILE, write_page
from metarun.runs.find import LAST, OUTPUTS, find_run


def run(args: argparse.Namespace) -> int:
    """Run `metarun report [PATH…] [--output DIR] [--open]` and return the exit code.

    Raises:
        ValueError: No readable run was found, or the page cannot be written there.
    """
    words = args.paths or [_last()]
    found = published.named(words)
    folder = Path(args.output) if args.output else _home(words, found)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file: expected a folder for {FILE} and figures/")
    damaged = published.tell_damaged(found)
    with busy(f"drawing the page of {number_of(len(found), 'run')}"):
        place = write_page(found, folder, args.config_dir)
    print(place)
    if args.open and not webbrowser.open(place.absolute().as_uri()):
        say("note", "no browser was found: open the page by hand")
    return EXIT_FAILED if damaged else EXIT_OK


def _last() -> str:
    """Return the folder of the last run, and say which one it is."""
    folder = find_run(LAST)
    say("note", f"the last run is {printable(str(folder))}")
    return str(folder)


def _home(words: Sequence[str], runs: Sequence[Run]) -> Path:
    """Return the default folder of a page: that of the run, or the closest one above all runs.

    The runs of a sweep lie among those of others, so that its page has a folder of its own.
    """
    if len(runs) == 1:
        return runs[0].path
    if len(words) == 1:
        return Path(words[0]) if Path(words[0]).exists() else OUTPUTS / "reports" / words[0]
    return Path(os.path.commonpath([run.path.absolute() for run in runs]))
