"""Tests of the page alone: it makes no requests, and text of a run cannot break it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from metarun.reporting.figures.drawing import COLORS, SIZE, STYLE, Panel, Series, band
from metarun.reporting.page import Code, Page, Section, inlined, is_ours, render
from metarun.reporting.tables import RowSeries, Table

NASTY = "</script><script>alert(1)</script> & <b>'\"</b>"


def panel(name: str) -> Panel:
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=COLORS[0], gid="one", marker="o")
        band(axes, [0, 1], np.array([0.0, 1.0]), np.array([0.1, 0.1]), COLORS[0], "one")
        axes.set(xlabel=NASTY)
    series = {"one": Series(NASTY, COLORS[0])}
    return Panel(name, NASTY, NASTY, NASTY, figure, {"x": [0, 1], NASTY: [NASTY, 2]}, series)


def page() -> Page:
    table = Table(NASTY, [{NASTY: NASTY}], NASTY, {NASTY: RowSeries("entry0", COLORS[1])})
    section = Section(
        "part", NASTY, NASTY, [Code(NASTY, NASTY)], [table], [panel("first"), panel("second")]
    )
    return Page(NASTY, [(NASTY, NASTY)], [section, Section("none", "Nothing")], NASTY)


def test_nothing_that_a_run_says_becomes_a_tag(tmp_path: Path) -> None:
    html = render(page(), tmp_path)
    assert "alert(1)</script>" not in html
    assert html.count("<script") == 2
    assert "<b>" not in html


def test_no_address_leads_away_from_the_page(tmp_path: Path) -> None:
    html = render(page(), tmp_path)
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<)]+", html)) <= names
    assert set(re.findall(r'(?:src|href)="([^"#]*)', html)) <= {"data:,", ""}
    assert "default-src 'none'" in html


def test_ids_are_unique_and_every_reference_has_one(tmp_path: Path) -> None:
    html = render(page(), tmp_path)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    named = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert set(named) <= set(ids)
    assert 'id="second--one"' in html
    assert 'data-hides="second--one"' in html


def test_colors_are_the_pages_in_the_page_and_real_in_the_files(tmp_path: Path) -> None:
    html = render(page(), tmp_path)
    drawn = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--c0)" in drawn
    assert not any(color.lower() in drawn.lower() for color in COLORS)
    svg = (tmp_path / "first.svg").read_text()
    assert COLORS[0].lower() in svg
    assert "var(--" not in svg


def test_an_empty_section_is_left_out(tmp_path: Path) -> None:
    assert "Nothing" not in render(page(), tmp_path)


def test_a_drawing_says_what_it_shows() -> None:
    svg = '<?xml version="1.0"?><svg width="1pt" height="2pt" viewBox="0 0 1 2"><g id="a"/></svg>'
    made = inlined(svg, "name", 'a "good" <one>', "0 0.5 1 1")
    assert 'role="img" aria-label="a &quot;good&quot; &lt;one&gt;"' in made
    assert made.startswith('<svg viewBox="0 0.5 1 1" data-whole="0 0 1 2"')
    assert 'id="name--a"' in made


def test_a_page_of_ours_is_known_again_and_one_of_others_is_not(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.html", tmp_path / "theirs.html"
    ours.write_text(render(page(), tmp_path), encoding="utf-8")
    theirs.write_text("<html>my notes on the metarun report</html>")
    assert is_ours(ours)
    assert not is_ours(theirs)
