"""Who imports whom: the folders of the package, their ranks, and a picture of the arrows.

`python tests/imports.py PICTURE.svg` draws the folders in the order of their ranks, the highest
on top, and an arrow from each folder to each that it imports. An arrow upwards would be red.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import metarun

PACKAGE = Path(metarun.__file__).parent

RANKS = [
    ["core"],
    ["data", "backbones", "runs"],
    ["execution", "trackers"],
    ["algorithms"],
    ["evaluation"],
    ["training"],
    ["config"],
    ["inference"],
    ["reporting"],
    ["jobs", "bench"],
    ["cli"],
]
"""The folders from the bottom up: a module imports from lower rows and from its own folder."""

RANK = {folder: rank for rank, row in enumerate(RANKS) for folder in row}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """A module's name below `metarun.`; empty for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> Iterator[str]:
    """What a module imports from metarun, by its name below `metarun.`, late imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("metarun."):
                yield name.removeprefix("metarun.")


def folder_of(name: str) -> str:
    """The folder that a module is in."""
    return name.partition(".")[0]


def arrows() -> Counter[tuple[str, str]]:
    """How many imports go from one folder to another."""
    found: Counter[tuple[str, str]] = Counter()
    for path in MODULES:
        here = folder_of(name_of(path))
        for name in imported(path):
            there = folder_of(name)
            if here in RANK and there in RANK and here != there:
                found[here, there] += 1
    return found


def draw(picture: Path) -> None:
    """Draw the folders and the arrows between them."""
    from matplotlib import pyplot as plt

    place = {
        folder: (1.0 * (number - (len(row) - 1) / 2), float(rank))
        for rank, row in enumerate(RANKS)
        for number, folder in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(7.0, 9.0), layout="constrained")
    found = arrows()
    for (here, there), count in found.items():
        upwards = RANK[there] >= RANK[here]
        gap = RANK[here] - RANK[there]
        axes.annotate(
            "",
            place[there],
            place[here],
            arrowprops={
                "arrowstyle": "->",
                "color": "red" if upwards else "#5b6b7b",
                "alpha": 1.0 if upwards else 0.6,
                "linewidth": 0.6 + 0.25 * min(count, 12),
                "connectionstyle": f"arc3,rad={0.07 * (gap - 1) * (-1) ** gap:.3f}",
                "shrinkA": 16,
                "shrinkB": 16,
            },
        )
    for folder, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": "#22303c"}
        axes.text(x, y, folder, ha="center", va="center", fontsize=12, bbox=box)
    axes.set_xlim(-1.8, 1.8)
    axes.set_ylim(-0.6, len(RANKS) - 0.4)
    axes.axis("off")
    up = sum(RANK[there] >= RANK[here] for here, there in found)
    title = f"Imports between the folders of metarun: {len(found)} arrows, {up} of them upwards"
    axes.set_title(title, fontsize=12)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
