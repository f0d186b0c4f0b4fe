"""Figures drawn at the end of a run, from the files of the run.

`metarun report` draws the remaining figures, which need the trained learner. matplotlib is
imported with the first figure. A full disk loses the figures, but does not fail the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metarun.core.streams import say
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    from types import ModuleType

    from metarun.reporting.run_files import RunFiles


def draw_figures(folder: Path) -> None:
    """Draw the stream, the presentations and the samples of a test, if any, into `figures/`.

    Args:
        folder: Folder of a finished run or of a meta-test.
    """
    names = ("stream.csv", "samples.npz")
    results = RunFolder(folder).read_results()
    if "presentations" not in results and not any((folder / name).exists() for name in names):
        return
    from metarun.reporting.figures import presentations, samples, streams
    from metarun.reporting.run_files import RunFiles

    _draw(RunFiles.of_test(folder), (streams, presentations, samples))


def draw_curves(folder: Path) -> None:
    """Draw the learning, adaptation and test figures of a finished run into `figures/`."""
    from metarun.reporting.figures import curves
    from metarun.reporting.run_files import RunFiles

    _draw(RunFiles.read(folder), (curves,))


def _draw(run: RunFiles, sources: Sequence[ModuleType]) -> None:
    from matplotlib import rc_context

    from metarun.reporting.figures.drawing import STYLE, write

    try:
        with rc_context(STYLE):
            for source in sources:
                for panel in source.panels(run):
                    write(run.path / "figures", panel, run.title)
    except OSError as error:
        say("warning", f"{run.path}/figures cannot be written: {error}")
