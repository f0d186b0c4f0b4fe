"""Tests of the page in headless Chromium, opened from disk as a reader opens it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metarun.cli.main import main
from metarun.reporting.page import Page, Section, render
from metarun.reporting.tables import Table
from tests.reporting.conftest import made, swept

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt install chromium"),
]

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium has no sandbox for the root user of a container.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """An open page, with its console messages and its requests."""

    def __init__(self, browser: Any, path: Path, size: str, scheme: str = "light") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def color(self, selector: str, which: str = "color") -> str:
        script = f"e => getComputedStyle(e)['{which}']"
        return str(self.page.locator(selector).first.evaluate(script))


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    pages: list[Opened] = []

    def open_page(path: Path, size: str = "desktop", scheme: str = "light") -> Opened:
        pages.append(Opened(browser, path, size, scheme))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


def report(folder: Path, *more: Path) -> Path:
    assert main(["report", str(folder), *map(str, more)]) == 0
    return folder / "report.html"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["maml", "characters", "anp", "mixture", "stream", "sweep"])
def test_a_page_renders_says_nothing_and_asks_for_nothing(
    name: str, size: str, runs: Path, opened: Any
) -> None:
    path = report(swept(runs) if name == "sweep" else made(runs, name))
    here = opened(path, size)
    assert here.said == []
    assert [url for url in here.asked if not url.startswith("data:")] == [path.as_uri()]
    # The page does not scroll sideways; only elements with their own scroll bar do.
    assert here.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for box in here.page.locator(".drawing svg").all():
        shape = box.bounding_box()
        assert shape["width"] > 250
        assert shape["height"] > 40


def test_a_series_is_hidden_and_shown_again(runs: Path, opened: Any) -> None:
    here = opened(report(made(runs, "maml")), "phone")
    line = here.page.locator('[id="fit-good--after10"]')
    button = here.page.locator("#figure-fit-good .legend button", has_text="10 steps")
    assert line.is_visible()
    button.click()
    assert not line.is_visible()
    assert button.get_attribute("aria-pressed") == "false"
    # The series "after1", whose name is the beginning of "after10", stays visible.
    assert here.page.locator('[id="fit-good--after1"]').is_visible()
    button.click()
    assert line.is_visible()


@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_light_or_dark_as_the_system_is_until_the_reader_says(
    size: str, runs: Path, opened: Any
) -> None:
    path = report(made(runs, "maml"))
    light, dark = opened(path, size, "light"), opened(path, size, "dark")
    assert light.color("body", "background-color") != dark.color("body", "background-color")
    line = '[id="learning--meta-val"] path'
    assert light.color(line, "stroke") != dark.color(line, "stroke")
    dark.page.locator("#theme").click()
    for selector, which in (("body", "background-color"), (line, "stroke")):
        assert dark.color(selector, which) == light.color(selector, which)


def test_text_has_enough_contrast_in_both_themes(runs: Path, opened: Any) -> None:
    """WCAG 2.1, criterion 1.4.3, requires a contrast of 4.5 to 1."""

    def luminance(rgb: str) -> float:
        parts = [float(p) / 255 for p in rgb[rgb.index("(") + 1 : -1].split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in ("light", "dark"):
        here = opened(report(made(runs, "maml")), "desktop", scheme)
        paper = luminance(here.color("figure", "background-color"))
        for selector, which in (
            ("figcaption", "color"), ("figure h3", "color"), (".drawing text", "fill"),
        ):  # fmt: skip
            ink = luminance(here.color(selector, which))
            bright, dim = max(ink, paper), min(ink, paper)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (scheme, selector)


def test_a_table_is_sorted_by_its_numbers(runs: Path, opened: Any) -> None:
    here = opened(report(swept(runs)))
    table = here.page.locator("#runs table").first
    head = table.locator("th", has_text="meta-test")
    column = table.locator("th").all_inner_texts().index("meta-test") + 1

    def values() -> list[float]:
        cells = table.locator(f"tbody td:nth-child({column})").all()
        return [float(cell.get_attribute("data-value")) for cell in cells]

    head.locator("button").click()
    assert values() == sorted(values())
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")
    assert values() == sorted(values(), reverse=True)


@pytest.mark.parametrize("size", SIZES)
def test_a_long_table_scrolls_by_itself_under_its_heads(
    size: str, tmp_path: Path, opened: Any
) -> None:
    lines = [{"run": f"run {number}", "figure": str(number)} for number in range(200)]
    section = Section("runs", "Results", tables=[Table("runs", lines)])
    path = tmp_path / "report.html"
    path.write_text(render(Page("200 runs", [], [section]), tmp_path), encoding="utf-8")
    here = opened(path, size)
    box = here.page.locator(".scroll")
    assert box.bounding_box()["height"] < SIZES[size][1]
    top = here.page.locator("thead").bounding_box()["y"]
    box.evaluate("e => { e.scrollTop = 2000; }")
    assert here.page.locator("th").first.bounding_box()["y"] == pytest.approx(top, abs=2.0)
    # A printed page shows the whole table.
    here.page.emulate_media(media="print")
    assert box.bounding_box()["height"] > 2000


@pytest.mark.parametrize("how", ["hover", "focus"])
def test_a_row_of_the_table_lights_its_line(how: str, runs: Path, opened: Any) -> None:
    here = opened(report(swept(runs)))
    getattr(here.page.locator('tr[data-series="entry1"]').first, how)()
    own = here.page.locator('[id="learning-together--entry1"]')
    other = here.page.locator('[id="learning-together--entry0"]')
    assert "faded" not in (own.get_attribute("class") or "")
    assert "faded" in (other.get_attribute("class") or "")


@pytest.mark.parametrize(("kind", "begins"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("csv", b"")])
def test_a_figure_is_saved_as_on_white_paper(
    kind: str, begins: bytes, runs: Path, opened: Any, tmp_path: Path
) -> None:
    folder = made(runs, "maml")
    here = opened(report(folder), "desktop", "dark")
    with here.page.expect_download() as waiting:
        here.page.locator(f'#figure-fit-good [data-save="{kind}"]').click()
    waiting.value.save_as(tmp_path / "saved")
    data = (tmp_path / "saved").read_bytes()
    assert waiting.value.suggested_filename == f"fit-good.{kind}"
    assert data.startswith(begins)
    assert b"var(--" not in data
    if kind == "csv":
        assert data == (folder / "figures" / "fit-good.csv").read_bytes()
    assert here.said == []


def test_numbers_are_copied(runs: Path, opened: Any) -> None:
    here = opened(report(made(runs, "maml")))
    here.context.grant_permissions(["clipboard-read", "clipboard-write"])
    figure = here.page.locator("#figure-adaptation")
    figure.locator("summary").click()
    figure.locator(".copy").click()
    sync_api.expect(figure.locator(".copy")).to_have_text(re.compile("copied|selected"))
    chosen = here.page.evaluate("getSelection().toString() || navigator.clipboard.readText()")
    assert "inner steps,mse,ci95" in chosen


def test_a_print_is_light_and_without_buttons(runs: Path, opened: Any) -> None:
    here = opened(report(made(runs, "maml")), "desktop", "dark")
    here.page.emulate_media(media="print")
    assert not here.page.locator("#theme").is_visible()
    assert not here.page.locator(".files").first.is_visible()
    assert here.page.locator(".drawing svg").first.is_visible()
    assert len(here.page.pdf()) > 10_000
