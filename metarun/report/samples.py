"""Images that an algorithm made for its test tasks, beside the real ones.

Shapes: T tasks, S rows of a support, M made rows, C H W of an image.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from metarun.intervals import Floats
from metarun.report.drawing import STYLE, save, title


def draw(folder: Path) -> list[Path]:
    """Write `figures/samples`, as PNG and SVG: a row for each task, its support, then what is made.

    Args:
        folder: Of a run or of a test that has `samples.npz`.

    Returns:
        The files.
    """
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with np.load(folder / "samples.npz") as arrays:
        support, made = arrays["support"], arrays["made"]
    with rc_context(STYLE):
        return save(folder / "figures", "samples", _grid(support, made, title(results)))


def _grid(support: Floats, made: Floats, heading: str) -> Figure:
    """A figure of (T, S, C, H, W) and (T, M, C, H, W)."""
    tasks, shots, samples = len(made), support.shape[1], made.shape[1]
    figure = Figure(figsize=(0.4 * (shots + samples) + 0.6, 0.4 * tasks + 0.9))
    panels = figure.subplots(1, 2, width_ratios=[shots, samples], squeeze=False)[0]
    low, high = support.min((1, 3, 4)), support.max((1, 3, 4))
    for panel, images, name in zip(
        panels, (support, made), ("support of a task", "made for it"), strict=True
    ):
        shares = (images - low[:, None, :, None, None]) / np.maximum(
            (high - low)[:, None, :, None, None], 1e-12
        )
        panel.imshow(_mosaic(shares))
        panel.set_title(name, fontsize=9)
        panel.set_axis_off()
    figure.suptitle(heading, fontsize=10)
    return figure


def _mosaic(images: Floats) -> Floats:
    """One picture (…, …, 3) of (rows, columns, channels, height, width), a pixel apart."""
    apart = np.pad(images, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.5)
    rows, columns, _, height, width = apart.shape
    # Colours of three channels; of any other number the first, as grey.
    colours = apart if apart.shape[2] == 3 else apart[:, :, :1].repeat(3, axis=2)
    laid = colours.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    return np.clip(laid, 0.0, 1.0)
