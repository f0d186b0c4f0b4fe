"""Imports between the folders of the package, their ranks, and a figure of them.

`python tests/imports.py FIGURE.svg` draws the folders by rank, the highest on the right, and an
arrow from each folder to each folder that it imports from, unless a chain of other arrows leads
there. An arrow to the right would be red.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
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
"""The folders from the bottom up: a module may import from lower rows and its own folder."""

RANK = {folder: rank for rank, row in enumerate(RANKS) for folder in row}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Return a module's name without `metarun.`; empty for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> Iterator[str]:
    """Yield what a module imports from metarun, without `metarun.`, including late imports."""
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
    """Return the folder of a module."""
    return name.partition(".")[0]


def arrows() -> Counter[tuple[str, str]]:
    """Count the imports from one folder to another."""
    found: Counter[tuple[str, str]] = Counter()
    for path in MODULES:
        here = folder_of(name_of(path))
        for name in imported(path):
            there = folder_of(name)
            if here in RANK and there in RANK and here != there:
                found[here, there] += 1
    return found


def direct(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the arrows that no chain of other arrows replaces (the transitive reduction)."""
    known = set(found)
    below: dict[str, set[str]] = {}
    for here in sorted(RANK, key=lambda folder: RANK[folder]):
        nearest = {there for start, there in known if start == here and RANK[there] < RANK[here]}
        below[here] = nearest.union(*(below[there] for there in nearest))
    return [
        (here, there)
        for here, there in sorted(known)
        if not any(there in below[other] for start, other in known if start == here)
    ]


_HEIGHTS = {"algorithms": 0.5, "evaluation": 0.5, "training": -0.6, "trackers": -0.6}
"""Folders out of the middle, so that no arrow passes through another folder."""


def draw(picture: Path) -> None:
    """Draw the folders and their direct imports as arrows, from the right to the left."""
    from matplotlib import pyplot as plt

    place = {
        folder: (float(rank), _HEIGHTS.get(folder, 1.5 * ((len(row) - 1) / 2 - number)))
        for rank, row in enumerate(RANKS)
        for number, folder in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(14.0, 5.0), layout="constrained")
    look = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "#22303c"}
    boxes = {
        folder: axes.text(x, y, folder, ha="center", va="center", fontsize=13, bbox=look)
        for folder, (x, y) in place.items()
    }
    found = arrows()
    upwards = {pair for pair in found if RANK[pair[1]] >= RANK[pair[0]]}
    for here, there in [*direct(found), *upwards]:
        axes.annotate(
            "",
            place[there],
            place[here],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "red" if (here, there) in upwards else "#5b6b7b",
                "linewidth": 1.6,
                "mutation_scale": 16,
                "patchA": boxes[here].get_bbox_patch(),
                "patchB": boxes[there].get_bbox_patch(),
            },
            zorder=1,
        )
    axes.set_xlim(-0.5, len(RANKS) - 0.5)
    axes.set_ylim(-1.9, 1.9)
    axes.axis("off")
    title = "Folders of metarun: each imports from those to its left, by arrows or chains of arrows"
    axes.set_title(f"{title}; {len(upwards)} imports to the right", fontsize=15)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
