"""How every figure looks and is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's, which colour-blind people tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "metarun",
}
_DPI = 150


def title(results: Mapping[str, Any]) -> str:
    """What the figures of a run are headed with."""
    return f"{results['algo']} on {results['data']}, seed {results['seed']}"


def save(folder: Path, name: str, figure: Figure) -> list[Path]:
    """Write a figure as PNG and SVG, without a date; returns the files."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=_DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
