"""How classes, or tasks, are divided into train, val and test: by a hash of their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from metarun.core import seeding
from metarun.core.checks import within
from metarun.core.types import Split

WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "validation", "valid"),
    "test": ("test",),
}
"""Names that a split may have."""


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Check the options `val_fraction` and `test_fraction` of a data set.

    Raises:
        ValueError: They are out of range, or leave nothing for training.
    """
    within("data", "(0, 1)", val_fraction=val_fraction, test_fraction=test_fraction)
    if val_fraction + test_fraction >= 1.0:
        raise ValueError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} leave no "
            "class to train on: their sum has to be less than 1"
        )


def hashed_split(
    names: Iterable[str],
    where: str,
    val_fraction: float,
    test_fraction: float,
    *,
    what: str = "classes",
    least: int = 2,
) -> dict[Split, list[str]]:
    """Divide names by a hash, which depends on nothing but the names.

    Args:
        names: Distinct names.
        where: Where they come from, for messages.
        val_fraction, test_fraction: Share of the names for val and for test.
        what: What they name, for messages.
        least: Smallest number of names of a split.

    Raises:
        ValueError: There are too few of them.
    """
    order = hashed_order(names)
    num_val = max(least, round(val_fraction * len(order)))
    num_test = max(least, round(test_fraction * len(order)))
    if len(order) < num_val + num_test + least:
        raise ValueError(
            f"{where} has {len(order)} {what}, {3 * least} or more are needed for disjoint "
            "train, val and test splits"
        )
    return {
        "train": sorted(order[num_val + num_test :]),
        "val": sorted(order[num_test : num_val + num_test]),
        "test": sorted(order[:num_test]),
    }


def hashed_order(names: Iterable[str]) -> list[str]:
    """Return names in the order of their hashes."""
    return sorted(names, key=lambda name: seeding.key("folder", name))


def check_disjoint(
    splits: Mapping[Split, Iterable[str]], where: str, way_out: str, *, what: str = "class"
) -> None:
    """Check that no name is in two splits.

    Args:
        splits: Names of each split.
        where: Where they come from, for messages.
        way_out: What to do about it, for messages.
        what: What they name, for messages.

    Raises:
        ValueError: One is.
    """
    owner: dict[str, Split] = {}
    for split, names in splits.items():
        for name in names:
            if name in owner:
                what_many = "classes" if what == "class" else f"{what}s"
                raise ValueError(
                    f"{where}: {what} {name} is in {owner[name]} and in {split}, but splits must "
                    f"not share {what_many}: {way_out}"
                )
            owner[name] = split
