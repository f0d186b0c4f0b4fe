"""Writing of the page of a run, of several runs, or of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from metarun.core.files import write_atomically
from metarun.core.statistics import quiet
from metarun.reporting import several_runs, single_run
from metarun.reporting.figures.drawing import STYLE
from metarun.reporting.page import Page, is_ours, render
from metarun.reporting.published import DAMAGED, Run
from metarun.reporting.run_files import RunFiles

FILE = "report.html"


@quiet
def write_page(runs: Sequence[Run], folder: Path, config_dir: str | None = None) -> Path:
    """Write the page and its figures, and return the path of the page.

    Args:
        runs: One run or several.
        folder: Folder of `report.html` and `figures/`.
        config_dir: Folder of the user's YAML files.

    Raises:
        ValueError: No run has enough readable files, or the page of somebody else is there.
    """
    place = folder / FILE
    if place.exists() and not is_ours(place):
        raise ValueError(
            f"{place} exists and is not a page of metarun: type --output DIR with another folder"
        )
    with rc_context(STYLE):
        page = _page(runs, config_dir)
        folder.mkdir(parents=True, exist_ok=True)
        html = render(page, folder / "figures")
    write_atomically(place, html.encode())
    return place


def _page(runs: Sequence[Run], config_dir: str | None) -> Page:
    if len(runs) == 1:
        # A run whose results are unreadable may still have learning curves.
        broken = runs[0].status["state"] == DAMAGED
        why = f"Its files are damaged: {runs[0].status['why']}." if broken else ""
        return single_run.page(RunFiles.read(runs[0].path), why, config_dir)
    whole = [run for run in runs if run.status["state"] != DAMAGED]
    if not whole:
        raise ValueError(f"{runs[0].path.parent}: the files of all runs in it are damaged")
    return several_runs.page(whole, config_dir)
