"""The figures that a run draws of itself at its end, from its own files."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context

from metarun.report import presentations, samples, streams
from metarun.report.drawing import STYLE, write
from metarun.report.files import RunFiles


def draw(folder: Path) -> None:
    """Write what there is of a stream, of presentations and of samples into `figures/`.

    Args:
        folder: Of a finished run or of a meta-test.
    """
    run = RunFiles.of_test(folder)
    with rc_context(STYLE):
        for source in (streams, presentations, samples):
            for panel in source.panels(run):
                write(folder / "figures", panel)
