"""Images that an algorithm made for its test tasks, beside the real ones.

Shapes: T tasks, S rows of a support, M made rows, C H W of an image.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from metarun.core.statistics import Floats
from metarun.reporting.figures.drawing import Panel
from metarun.reporting.run_files import RunFiles


def panels(run: RunFiles) -> list[Panel]:
    """A row for each task, its support, then what is made; none where nothing was made."""
    if not run.samples:
        return []
    support, made = run.samples["support"], run.samples["made"]
    summary = f"The support of {len(made)} test tasks, and {made.shape[1]} images made for each."
    return [
        Panel(
            "samples",
            "What was made",
            summary,
            summary,
            _grid(support, made, run.title),
            {
                "task": list(range(len(made))),
                "mean of the support": [float(task.mean()) for task in support],
                "mean of what was made": [float(task.mean()) for task in made],
            },
            wide=True,
        )
    ]


def _grid(support: Floats, made: Floats, heading: str) -> Figure:
    """A figure of (T, S, C, H, W) and (T, M, C, H, W)."""
    tasks, shots, samples = len(made), support.shape[1], made.shape[1]
    figure = Figure(figsize=(0.4 * (shots + samples) + 0.6, 0.4 * tasks + 0.9))
    drawn = figure.subplots(1, 2, width_ratios=[shots, samples], squeeze=False)[0]
    for axes, images, name in zip(
        drawn, (support, made), ("support of a task", "made for it"), strict=True
    ):
        axes.imshow(mosaic(shares(images, support)))
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    figure.suptitle(heading, fontsize=10)
    return figure


def shares(images: Floats, range_of: Floats) -> Floats:
    """Images (T, …, C, H, W), from 0 to 1 between the ends of a task's and a channel's others."""
    low, high = range_of.min((1, 3, 4)), range_of.max((1, 3, 4))
    scale = np.maximum(high - low, 1e-12)[:, None, :, None, None]
    scaled: Floats = (images - low[:, None, :, None, None]) / scale
    return scaled


def mosaic(images: Floats) -> Floats:
    """One picture (…, …, 3) of (rows, columns, channels, height, width), a pixel apart."""
    apart = np.pad(images, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.5)
    rows, columns, _, height, width = apart.shape
    # Colors of three channels; of any other number the first, as gray.
    colors = apart if apart.shape[2] == 3 else apart[:, :, :1].repeat(3, axis=2)
    laid = colors.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    return np.clip(laid, 0.0, 1.0)
