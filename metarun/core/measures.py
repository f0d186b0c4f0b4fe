"""Descriptions of measures: what a measured quantity is called, and how it is shown.

`results.json` holds the description of every measure beside its value. Tables, reports and trackers
read it from there, so they show a measure that they do not know. Its computation is in
`evaluation/measures.py`. Torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Measure:
    """The description of a measure with one value for each test episode.

    Attributes:
        name: Key in `results.json` and `episodes.npz`; trackers show it as `test/<name>`.
        title: Name in tables and reports.
        unit: Unit of the values. `%` shows a fraction in percent.
        better: Whether higher or lower values are better; None where neither is.
        places: Decimal places in tables; None shows two significant digits or more.
        by_default: Whether the end of a run and the table of `metarun compare` show it unasked.
        about: Definition and source, in one sentence.
    """

    name: str
    title: str
    unit: str = ""
    better: Better | None = None
    places: int | None = None
    by_default: bool = False
    about: str = ""

    @classmethod
    def of(cls, name: str, stored: Mapping[str, Any]) -> Measure:
        """Return a description stored in `results.json`; unknown entries are ignored."""
        known = {field.name for field in fields(cls)} - {"name"}
        return cls(name, **{"title": name} | {k: v for k, v in stored.items() if k in known})

    def stored(self) -> dict[str, Any]:
        """Return the description as an entry of `results.json`."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    @property
    def head(self) -> str:
        """Title with the unit, as the head of a table's column."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def scale(self) -> float:
        """Factor from stored to shown values."""
        return 100.0 if self.unit == "%" else 1.0

    def text(self, mean: float | None, ci95: float | None) -> str:
        """Format a value with its 95 % interval; see `figure`."""
        return figure("accuracy" if self.unit == "%" else self.name, mean, ci95)


LOG_LIKELIHOOD = Measure(
    "log_likelihood",
    "log-likelihood",
    better="higher",
    places=2,
    by_default=True,
    about="Mean log-density of the targets under the predicted normal distributions.",
)
COVERAGE = Measure(
    "coverage",
    "within the 95 % band",
    unit="%",
    places=1,
    by_default=True,
    about="Share of the targets within 1.96 predicted standard deviations of the mean.",
)
WITHOUT_DESCRIPTION = {measure.name: measure for measure in (LOG_LIKELIHOOD, COVERAGE)}
"""Measures whose description older files of results do not hold."""


def figure(metric: str, mean: float | None, ci95: float | None = None) -> str:
    """Format a metric with its interval: `93.41 ± 0.52 %`, `0.4123 ± 0.0311`, `0.00490 ± 0.00090`.

    Args:
        metric: Name of the metric; an accuracy is shown in percent.
        mean: Value of the metric; None if it is not finite.
        ci95: Half-width of the interval; None or NaN omits it.
    """
    if mean is None or math.isnan(mean):
        return "not a number"
    width = "" if ci95 is None or math.isnan(ci95) else " ± {}"
    if metric == "accuracy":
        return f"{100 * mean:.2f}{width.format(f'{100 * (ci95 or 0):.2f}')} %"
    if width and 0.0 < (ci95 or 0.0) < 1e-3 <= abs(mean):
        # As many places as show two digits of the interval.
        places = 1 - math.floor(math.log10(ci95 or 1.0))
        return f"{mean:.{places}f} ± {ci95:.{places}f}"
    return f"{number(mean)}{width.format(number(ci95 or 0.0))}"


def number(value: float) -> str:
    """Format a number with four digits."""
    fixed = value == 0.0 or 1e-3 <= abs(value) < 1e4
    return f"{value:.4f}" if fixed else f"{value:.4g}"


def values_text(values: Mapping[str, float], metric: str) -> str:
    """Format several values in a line, the metric as `figure` does.

    A loss that is the metric is shown once.
    """
    return "  ".join(
        f"{name} {figure(name, value) if name == metric else number(value)}"
        for name, value in values.items()
        if name != "loss" or value != values.get(metric)
    )
