"""The figures that a run draws of itself at its end, from its own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from matplotlib import rc_context

from metarun.reporting.figures import curves, presentations, samples, streams
from metarun.reporting.figures.drawing import STYLE, write
from metarun.reporting.run_files import RunFiles


def draw(folder: Path) -> None:
    """Write what there is of a stream, of presentations and of samples into `figures/`.

    Args:
        folder: Of a finished run or of a meta-test.
    """
    _draw(RunFiles.of_test(folder), (streams, presentations, samples))


def draw_curves(folder: Path) -> None:
    """Write what a finished run has learned and reached along its way into `figures/`."""
    _draw(RunFiles.read(folder), (curves,))


def _draw(run: RunFiles, sources: Sequence[ModuleType]) -> None:
    with rc_context(STYLE):
        for source in sources:
            for panel in source.panels(run):
                write(run.path / "figures", panel)
