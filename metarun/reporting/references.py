"""What we measured for an experiment, and how a measured value compares with a published one.

A reference stands in the file of its experiment, beside the published values. It is read from
that very file: it belongs to no configuration, and no other experiment inherits it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metarun.config.catalogue import conf_dir, experiment, find, load
from metarun.config.checks import structured
from metarun.config.search_path import own_folders
from metarun.core.settings import Outcome, Published, PublishedCell, Reference
from metarun.core.sizes import most
from metarun.reporting.tables import Figure

NOT_RUN = "not run"
"""What stands for a value that was not measured."""

_POINTS = 0.5
"""Difference of two accuracies, in points, that always counts as reproduced."""

_FEWEST_SEEDS = 3
"""Smallest number of seeds whose interval is used; that of two is too wide to be of use."""


def folders_of(config_dir: str | Path | None) -> list[Path]:
    """Return the folders of YAML files: the shipped one and the user's."""
    return [conf_dir(), *own_folders(config_dir)]


def read_reference(folders: Sequence[Path], name: str) -> Reference | None:
    """Return what was measured for an experiment; None if nothing was.

    Raises:
        ValueError: A key is unknown or missing, or has the wrong type.
    """
    path = find(folders, "experiment", name)
    content = None if path is None else load(path).get("reference")
    if content is None:
        return None
    reference: Reference = structured("reference", content, Reference)
    return reference


def read_published(folders: Sequence[Path], name: str) -> Published | None:
    """Return the published values of an experiment; None for an experiment of no paper."""
    content = experiment(folders, name).get("published")
    if content is None:
        return None
    published: Published = structured("published", content, Published)
    return published


def outcome_of(
    ours: Figure, cell: PublishedCell, steps: int, of_steps: int, *, accuracy: bool
) -> Outcome:
    """Compare a measured value with a published one.

    It is reproduced if the difference is within the joint interval of both and half of the last
    printed digit: sqrt(a^2 + b^2) + d. Here b is the published interval, 0 if none is printed, and
    a is ours over episodes, or ours over seeds if there are three or more and it is wider: seeds
    share their test episodes, whose choice alone moves a mean. Differences of accuracies of up to
    half a point count as reproduced, too, and d is 0.05 for all of them.

    Args:
        ours: The measured value; an accuracy is in percent.
        cell: The published value.
        steps: Number of meta-updates made.
        of_steps: Number of meta-updates of the recipe.
        accuracy: Whether the value is an accuracy. If not, it is an error, and lower is better.
    """
    over_seeds = ours.seeds_ci95 if ours.seeds >= _FEWEST_SEEDS else None
    joint = math.hypot(max(_width(ours.ci95), _width(over_seeds)), _width(cell.ci95))
    tolerance = joint + 0.5 * 10.0 ** -decimals(cell.value)
    if accuracy:
        tolerance = max(_POINTS, joint + 0.05)
    better = ours.mean - cell.value if accuracy else cell.value - ours.mean
    # Rounding in floating point must not decide, as in 99.2 - 98.7.
    tolerance += 1e-9
    if steps < of_steps:
        return "reached" if better >= -tolerance else "partial"
    if abs(better) <= tolerance:
        return "reproduced"
    return "above" if better > 0 else "below"


def _width(ci95: float | None) -> float:
    """Return an interval, 0 for a missing one."""
    return 0.0 if ci95 is None or math.isnan(ci95) else ci95


def decimals(value: float, fewest: int = 2) -> int:
    """Return the number of decimal places of a value, at least 2: YAML drops the 0 of 0.90."""
    return max(fewest, len(repr(value).partition(".")[2]))


def words_of(outcome: Outcome, steps: int, of_steps: int) -> str:
    """Return the words for an outcome, such as `reached at 20,000 of 60,000 steps`."""
    part = f"{steps:,} of {of_steps:,} steps"
    return {"reached": f"reached at {part}", "partial": f"partial: {part}"}.get(outcome, outcome)


def reference_figures(reference: Reference | None, published: Published) -> list[Figure | None]:
    """Return our figure for each published cell, marked with its outcome; None where not run."""
    if reference is None:
        return [None] * len(published.cells)
    return [
        Figure(
            ours.value,
            ours.ci95,
            reference.episodes,
            len(reference.seeds),
            ours.over_seeds,
            places=decimals(cell.value),
            mark=words_of(ours.outcome, reference.steps, published.steps),
        )
        for ours, cell in zip(reference.cells, published.cells, strict=True)
    ]


def is_unverified(published: Published, cell: PublishedCell) -> bool:
    """Return whether a published value was recalled and not yet verified."""
    return cell.unverified or published.confidence == "unverified"


def published_figure(published: Published, cell: PublishedCell, *, accuracy: bool) -> Figure:
    """Return a published value with its interval and marks, to the printed decimal place."""
    marks = [] if cell.spread is None else [f"± {cell.spread:g} over runs"]
    marks += ["unverified"] if is_unverified(published, cell) else []
    places = decimals(cell.value, 1 if accuracy else 2)
    return Figure(cell.value, cell.ci95, places=places, mark=", ".join(marks))


def is_accuracy(config: Mapping[str, Any]) -> bool:
    """Return whether the values of an experiment are accuracies: regression has one way."""
    return most(config["way"]) > 1
