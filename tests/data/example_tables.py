"""Writes four tables for `data=csv`: two of scikit-learn, and two with tasks, generated.

    python tests/data/example_tables.py FOLDER

`shops.csv`: sales of 400 shops, which react to price and promotion each in its own way.
`taste.csv`: what 400 users like, each by the product of two columns of an item, up to its sign.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets

Lines = Iterator[tuple[Any, ...]]


def shops(draw: np.random.Generator) -> Lines:
    """Yield the rows of 400 shops, 20 to 59 of each."""
    yield "shop", "day", "price", "promotion", "weekday", "sales"
    for shop in range(400):
        base, slope, effect = draw.normal([50, -3, 5], [10, 3, 5])
        for day in range(draw.integers(20, 60)):
            price, promotion = draw.uniform(2, 8), draw.integers(2)
            weekday = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"][day % 7]
            mean = base + slope * (price - 5) + effect * promotion + 4 * (weekday in ("sat", "sun"))
            known = f"{price:.2f}" if draw.random() > 0.02 else ""
            sold = f"{draw.normal(mean):.2f}"
            yield f"shop{shop}", day, known, ("no", "yes")[promotion], weekday, sold


def taste(draw: np.random.Generator) -> Lines:
    """Yield the rows of 400 users, 30 to 59 of each."""
    yield "user", *(f"x{place}" for place in range(6)), "likes"
    for user in range(400):
        which, sign = draw.integers(6), draw.choice([-1, 1])
        for _ in range(draw.integers(30, 60)):
            x = draw.normal(size=6)
            likes = sign * x[which] * x[(which + 1) % 6] > 0
            yield f"user{user}", *(f"{value:.3f}" for value in x), ("no", "yes")[int(likes)]


def of_sklearn(bunch: Any, target: str) -> Lines:
    """Yield the rows of a table of scikit-learn."""
    names = getattr(bunch, "feature_names", range(bunch.data.shape[1]))
    yield *names, target
    for row, value in zip(bunch.data.tolist(), bunch.target.tolist(), strict=True):
        yield *row, value


def write(path: Path, rows: Iterable[Iterable[Any]]) -> Path:
    """Write rows as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


if __name__ == "__main__":
    tables = {
        "shops": shops(np.random.default_rng(0)),
        "taste": taste(np.random.default_rng(0)),
        "diabetes": of_sklearn(datasets.load_diabetes(scaled=False), "progression"),
        "digits": of_sklearn(datasets.load_digits(), "digit"),
    }
    for name, rows in tables.items():
        write(Path(sys.argv[1]) / f"{name}.csv", rows)
