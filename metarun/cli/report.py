"""`metarun report`: one HTML page for a run, for several, or for a sweep.

What a run has written is read, not measured again; some single test tasks are looked at once
more, to be drawn. A run without some of it shows what it has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from metarun.cli.parser import Parser
from metarun.core.errors import EXIT_FAILED, EXIT_OK
from metarun.core.files import write_atomically
from metarun.core.statistics import quiet
from metarun.reporting import published, several_runs, single_run
from metarun.reporting.figures.drawing import STYLE
from metarun.reporting.page import Page, is_ours, render
from metarun.reporting.published import DAMAGED, Run
from metarun.reporting.run_files import RunFiles

FILE = "report.html"


def run(argv: Sequence[str]) -> int:
    """Answer `metarun report PATH… [--output DIR]`; returns the exit code."""
    parser = Parser(
        prog="metarun report",
        description="One HTML page for a run, for several, or for a sweep; it needs no network.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="run folders, or folders of them")
    parser.add_argument(
        "--output", metavar="DIR", help=f"the folder of {FILE} and figures/: that of the runs"
    )
    parser.add_argument("--config-dir", help="your own YAML files beside the shipped ones")
    args = parser.parse_args(list(argv))
    if not args.paths:
        raise ValueError("metarun report needs a folder, as in `metarun report outputs/sweeps`")
    found = list(published.read_runs(map(Path, args.paths)))
    if not found:
        raise ValueError(f"{args.paths[0]}: there is no run in it")
    folder = Path(args.output) if args.output else _home(args.paths, found)
    place = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file: expected a folder, for {FILE} and figures/")
    if place.exists() and not is_ours(place):
        raise ValueError(f"{place} is not a page that metarun made: type --output DIR")
    damaged = [run for run in found if run.status["state"] == DAMAGED]
    if len(found) > 1:
        published.tell_damaged(found)
    _write(found, folder, args.config_dir)
    print(place)
    return EXIT_FAILED if damaged else EXIT_OK


def _home(paths: Sequence[str], runs: Sequence[Run]) -> Path:
    """Where a page goes by itself: the folder typed, or the one that holds all of them."""
    if len(runs) == 1:
        return runs[0].path
    if len(paths) == 1:
        return Path(paths[0])
    return Path(os.path.commonpath([Path(path).absolute() for path in paths]))


@quiet
def _write(runs: Sequence[Run], folder: Path, config_dir: str | None) -> None:
    """Write the page and its figures.

    Raises:
        ValueError: Of no run enough can be read.
    """
    with rc_context(STYLE):
        page = _page(runs, config_dir)
        folder.mkdir(parents=True, exist_ok=True)
        html = render(page, folder / "figures")
    write_atomically(folder / FILE, html.encode())


def _page(runs: Sequence[Run], config_dir: str | None) -> Page:
    if len(runs) == 1:
        # One whose results cannot be read may still show how it learned.
        broken = runs[0].status["state"] == DAMAGED
        why = f"Its files are damaged: {runs[0].status['why']}." if broken else ""
        return single_run.page(RunFiles.read(runs[0].path), why)
    whole = [run for run in runs if run.status["state"] != DAMAGED]
    if not whole:
        raise ValueError(f"{runs[0].path.parent}: there is no run in it that can be read")
    return several_runs.page(whole, config_dir)
