"""Images that an algorithm generated for its test tasks, next to the real ones.

Shapes: T tasks, S support rows, M generated images, C H W of an image.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from metarun.core.statistics import Floats
from metarun.reporting.figures.drawing import Panel
from metarun.reporting.run_files import RunFiles


def panels(run: RunFiles) -> list[Panel]:
    """Return a figure with each task's support and generated images; none without any."""
    if not run.samples:
        return []
    support, made = run.samples["support"], run.samples["made"]
    summary = f"Support of {len(made)} test tasks, and {made.shape[1]} images generated for each."
    return [
        Panel(
            "samples",
            "Generated samples",
            summary,
            summary,
            _grid(support, made),
            {
                "task": list(range(len(made))),
                "mean of the support": [float(task.mean()) for task in support],
                "mean of what was made": [float(task.mean()) for task in made],
            },
            wide=True,
        )
    ]


def _grid(support: Floats, made: Floats) -> Figure:
    """Draw support images (T, S, C, H, W) next to generated ones (T, M, C, H, W)."""
    tasks, shots, samples = len(made), support.shape[1], made.shape[1]
    figure = Figure(figsize=(0.4 * (shots + samples) + 0.6, 0.4 * tasks + 0.9))
    drawn = figure.subplots(1, 2, width_ratios=[shots, samples], squeeze=False)[0]
    for axes, images, name in zip(
        drawn, (support, made), ("support of a task", "generated"), strict=True
    ):
        axes.imshow(mosaic(shares(images, support)))
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    return figure


def shares(images: Floats, range_of: Floats) -> Floats:
    """Scale images (T, …, C, H, W) by the range of `range_of` in each task and channel.

    The smallest and the largest value of `range_of` become 0 and 1.
    """
    low, high = range_of.min((1, 3, 4)), range_of.max((1, 3, 4))
    scale = np.maximum(high - low, 1e-12)[:, None, :, None, None]
    scaled: Floats = (images - low[:, None, :, None, None]) / scale
    return scaled


def mosaic(images: Floats) -> Floats:
    """Arrange images (rows, columns, channels, height, width) in one RGB image with margins."""
    apart = np.pad(images, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.5)
    rows, columns, _, height, width = apart.shape
    # Three channels are colors; of any other number, the first is shown as gray.
    colors = apart if apart.shape[2] == 3 else apart[:, :, :1].repeat(3, axis=2)
    laid = colors.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    return np.clip(laid, 0.0, 1.0)
