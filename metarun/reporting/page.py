"""One self-contained HTML page of figures, tables and commands."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup

import metarun
from metarun.reporting import tables
from metarun.reporting.figures.drawing import COLORS, INK, MUTED, PAPER, RULE, Panel, table, write
from metarun.reporting.tables import Table

GENERATOR = "metarun report"
"""Generator named in a page, so that only pages of metarun are overwritten."""

_HERE = Path(__file__).parent
_DARK = ("#56A8DE", "#F08A45", "#2FC397", "#E09BC0", "#F0B93A", "#8ACBF0", "#A9B1BA")
"""Counterparts of `COLORS` on a dark background."""
_STROKES = {"-": "", "--": "6 3", ":": "1.5 3", "-.": "6 2 1.5 2"}
_SIGNS = {
    "o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★", "<": "◀",
    ">": "▶",
}  # fmt: skip
"""Characters for Matplotlib's markers."""
_POINTS = 4.0 / 3.0
"""Pixels per typographic point."""


@dataclass(frozen=True)
class Code:
    """A block of text with a copy button."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    text: str = ""
    codes: Sequence[Code] = ()
    tables: Sequence[Table] = ()
    panels: Sequence[Panel] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.codes or self.tables or self.panels)


@dataclass(frozen=True)
class Page:
    """The content of a report.

    Attributes:
        title: First line of the page.
        facts: Names and values of the most important figures.
        about: Other names and values, in one line.
        sections: Sections in the order shown; empty ones are left out.
        note: Reasons why parts of the page are missing.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default_factory=tuple)
    note: str = ""
    about: Sequence[tuple[str, str]] = ()


def render(page: Page, figures: Path) -> str:
    """Return the page as HTML, and write its figures as SVG, PNG and CSV.

    Args:
        page: Content of the page.
        figures: Folder for the figure files.
    """
    sections = [
        {
            "name": section.name,
            "title": section.title,
            "text": section.text,
            "codes": section.codes,
            "tables": [
                {"title": t.title, "text": t.text, "html": _themed(t)} for t in section.tables
            ],
            "figures": [
                _figure(panel, *write(figures, panel, page.title)) for panel in section.panels
            ],
        }
        for section in page.sections
        if not section.empty
    ]
    light = {f"--{name}": color for name, color in _variables().items()}
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    # Escaping "<" keeps text of a run from closing this script block.
    block = json.dumps(light).replace("<", "\\u003c")
    return _template().render(
        page={
            "title": page.title,
            "facts": page.facts,
            "about": page.about,
            "note": page.note,
            "sections": sections,
        },
        generator=GENERATOR,
        version=metarun.__version__,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        palette=Markup(_palette()),
        light=Markup(block),
        script=Markup(script),
    )


def is_ours(path: Path) -> bool:
    """Return whether a file is a page that metarun generated."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'content="{GENERATOR}"' in file.read(1000)


@cache
def _template() -> Template:
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html.jinja")


def _variables() -> dict[str, str]:
    """Return the names of the page's color variables with their values in the light theme."""
    names = {f"c{place}": color for place, color in enumerate(COLORS)}
    return {**names, "ink": INK, "muted": MUTED, "rule": RULE, "paper": PAPER}


def _palette() -> str:
    """Return the colors of both themes as CSS rules."""
    light = "".join(f"--c{place}:{color};" for place, color in enumerate(COLORS))
    dark = "".join(f"--c{place}:{color};" for place, color in enumerate(_DARK))
    return f':root{{{light}}}:root[data-theme="dark"]{{{dark}}}'


def _variable(color: str) -> str:
    """Return a color of the palette as a CSS variable, whose value depends on the theme."""
    named = {value.lower(): name for name, value in _variables().items()}
    name = named.get(color.lower())
    return color if name is None else f"var(--{name})"


def _themed(table: Table) -> Markup:
    """Return a table as HTML, with the colors of its rows as variables of the page."""
    series = {
        label: replace(series, color=_variable(series.color))
        for label, series in table.series.items()
    }
    return Markup(tables.render("html", [replace(table, title="", text="", series=series)]))


def _figure(panel: Panel, svg: str, view: str) -> Mapping[str, Any]:
    return {
        "name": panel.name,
        "title": panel.title,
        "caption": panel.caption,
        "wide": panel.wide,
        "width": round(_POINTS * 72.0 * float(panel.figure.get_figwidth())),
        "svg": Markup(inlined(svg, panel.name, panel.alt, view)),
        "csv": table(panel.columns),
        "legend": [
            {
                "prefix": f"{panel.name}--{key}",
                "name": series.name,
                "color": _variable(series.color),
                "stroke": _STROKES[series.dash],
                "sign": _SIGNS.get(series.marker, ""),
                "alpha": series.alpha,
            }
            for key, series in (panel.series or {}).items()
        ],
    }


def inlined(svg: str, name: str, alt: str, view: str) -> str:
    """Return an SVG for embedding in the page, with unique ids and the page's color variables.

    Args:
        svg: SVG text as Matplotlib writes it.
        name: Name of the figure, which is prefixed to every id.
        alt: Alternative text of the figure.
        view: `viewBox` of the part that the page shows; the page has a title and legend of its own.
            The whole one is kept as `data-whole`, for saved figures.
    """
    body = svg[svg.index("<svg") :]
    # Both contain addresses or CSS rules that would affect the page outside the figure.
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}--\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}--\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}--\1)", body)
    for variable, color in _variables().items():
        body = re.sub(re.escape(color), f"var(--{variable})", body, flags=re.IGNORECASE)
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    head = re.sub(r'\sviewBox="([^"]*)"', rf' viewBox="{view}" data-whole="\1"', head)
    return f'{head} role="img" aria-label="{html.escape(alt)}">{rest}'
