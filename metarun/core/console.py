"""Screen output of a run: a progress bar on a terminal, plain lines elsewhere.

All text goes through the logger `metarun`, so the screen and `metarun.log` have the same lines.
Progress lines that repeat the bar are marked with `extra=BAR_SHOWS_IT`. They are omitted on a
terminal and kept elsewhere and in the log. Without a terminal, a bar writes a line of its own
whenever nothing was shown for a while.
"""

from __future__ import annotations

import logging
import math
import shutil
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from metarun.core import distributed
from metarun.core.measures import figure
from metarun.core.results import Results, measures_of
from metarun.core.sizes import size_text
from metarun.core.streams import fitted, printable, spinning, unbroken_streams, wrapped
from metarun.core.words import number_of

_log = logging.getLogger(__name__)

BAR_SHOWS_IT = {"bar_shows_it": True}
FILE_ONLY = {"file_only": True}
GOOD = {"style": "green"}
_SECONDS_BETWEEN_UPDATES = 0.5
_SILENCE = 5.0
"""Seconds without a line after which a bar without a terminal writes one. It doubles with each."""
_LONGEST_SILENCE = 60.0


class Bar:
    """Progress of one part of a run: a bar on a terminal, and otherwise a line from time to time.

    Args:
        screen: Screen that shows it.
        name: Name of the part.
        total, done: Units of the part, and those already done.
        long: Seconds from which on the part says beforehand how long it takes.
        shorter: How to make it shorter.
    """

    def __init__(
        self, screen: Screen, name: str, total: int, done: int, long: float, shorter: str
    ) -> None:
        self._screen = screen
        self._name, self._total, self._start = name, total, done
        self._long, self._shorter = long, shorter
        self._text = ""
        # The first unit is left out of the time: it includes what happens only once.
        self._began: float | None = None
        self._next = 0.0
        self._silence = _SILENCE
        self._foretold = False

    @property
    def due(self) -> bool:
        """Whether it is time to show the bar again."""
        now = time.monotonic()
        return now >= self._next and (self._screen.has_bars or self._is_silent(now))

    def to(self, done: int, text: str | None = None) -> None:
        """Move the bar to `done`; `text` replaces the previous text next to the bar."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._start = now, done
        self._text = self._text if text is None else text
        if text is None and now < self._next:
            return
        self._next = now + _SECONDS_BETWEEN_UPDATES
        self._foretell(done, now)
        if self._screen.has_bars:
            self._screen.move(self, done, self._text)
        elif self._is_silent(now):
            self._silence = min(2 * self._silence, _LONGEST_SILENCE)
            left = self._left(done, now)
            until = "" if left is None else f"{duration(left)} left"
            parts = (f"{self._name} {done}/{self._total}", self._text, until)
            self._screen.write("  ".join(part for part in parts if part))

    def _is_silent(self, now: float) -> bool:
        return now - self._screen.shown >= self._silence

    def _left(self, done: int, now: float) -> float | None:
        """Return the seconds until the end as they are known so far."""
        if self._began is None or done <= self._start:
            return None
        return (now - self._began) / (done - self._start) * (self._total - done)

    def _foretell(self, done: int, now: float) -> None:
        """Say once that the part takes long, after a few seconds of it."""
        if self._foretold or self._began is None or now - self._began < _SILENCE:
            return
        left = self._left(done, now)
        if left is not None:
            self._foretold = True
            if left > self._long:
                text = "%s takes about %s from here: %s"
                _log.info(text, self._name, duration(left), self._shorter)


class Screen:
    """The screen of one run.

    Args:
        console: Console for the output; by default standard output. A quiet one shows nothing.

    Attributes:
        shown: Time at which the last line was shown.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.shown = time.monotonic()
        self._progress: Progress | None = None
        self._tasks: dict[Bar, TaskID] = {}

    @property
    def has_bars(self) -> bool:
        """Whether progress is shown by bars, on a terminal."""
        return self._progress is not None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Show the log records of the program, in place of the logger's previous handlers."""
        logger = logging.getLogger("metarun")
        before, level = list(logger.handlers), logger.level
        handler = _Lines(self)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        try:
            with unbroken_streams(), self._with_progress():
                yield
        finally:
            logger.handlers[:] = before
            logger.setLevel(level)

    @contextmanager
    def bar(
        self, name: str, total: int, done: int = 0, long: float = math.inf, shorter: str = ""
    ) -> Iterator[Bar]:
        """Show the progress of a part for the duration of the context; see `Bar`."""
        bar, progress = Bar(self, name, total, done, long, shorter), self._progress
        if progress is None or not total:
            yield bar
            return
        self._tasks[bar] = progress.add_task(name, total=total, completed=done, text="")
        try:
            yield bar
        finally:
            progress.remove_task(self._tasks.pop(bar))

    def move(self, bar: Bar, done: int, text: str) -> None:
        """Move a bar on the terminal."""
        if self._progress is not None:
            self._progress.update(self._tasks[bar], completed=done, text=text)

    def show(self, record: logging.LogRecord) -> None:
        """Write one log record."""
        if getattr(record, "file_only", False) or self.console.quiet:
            return
        if self._progress is not None and getattr(record, "bar_shows_it", False):
            return
        words = printable(record.getMessage(), kept="\n")
        kind = f"{record.levelname.lower()}:" if record.levelno >= logging.WARNING else ""
        words = f"{kind} {words}" if kind else words
        if self.console.is_terminal:
            words = fitted(words, self.console.width)
        text = Text(words, getattr(record, "style", ""))
        text.highlight_regex(r"(?m)^test .*$", "bold")
        text.stylize("yellow", 0, len(kind))
        self.write(text)

    def write(self, text: Text | str) -> None:
        """Write a text on lines of its own."""
        if self.console.quiet:
            return
        self.shown = time.monotonic()
        # A console of one's own may have another file than the standard streams.
        with suppress(OSError):
            if self.console.is_terminal:
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self.console.file, flush=True)

    @contextmanager
    def _with_progress(self) -> Iterator[None]:
        console = self.console
        # `is_terminal` alone is not enough: environment variables for colors also set it.
        if (
            console.quiet
            or not (console.is_interactive and console.file.isatty())
            or console.is_jupyter
        ):
            yield
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=4,
            transient=True,
            expand=True,
        ) as progress:
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None


class _Lines(logging.Handler):
    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.INFO)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.show(record)


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Show that something of unknown length goes on, on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal or not distributed.is_main():
        yield
        return
    with console.status(text):
        spinning.append(console)
        try:
            yield
        finally:
            spinning.pop()


def duration(seconds: float) -> str:
    """Format a number of seconds: `41 s`, `12 min 05 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def rate_text(rate: float) -> str:
    """Format a number of tasks in a second: `1,204 tasks/s`, `0.3 tasks/s`."""
    return f"{rate:,.0f} tasks/s" if rate >= 9.5 else f"{rate:.2g} tasks/s"


def summary(results: Results, where: str) -> str:
    """Return the table that is shown at the end of a run.

    Args:
        results: Results as stored in `results.json`.
        where: Run folder, as shown in the last row.
    """
    metric = results["metric"]
    rows: list[tuple[str, str, str]] = []
    val, test = results.get("val"), results["test"]
    if val is not None:
        note = number_of(val["episodes"], "episode")
        note += f", step {val['step']:,}" if results.get("steps") else ""
        rows.append((f"val {metric}", figure(metric, val["mean"], val["ci95"]), note))
    note = number_of(test["episodes"], "episode")
    # A learner without meta-training has made no step.
    if results.get("parameters_step"):
        step, which = results["parameters_step"], results["parameters_from"]
        note += f", parameters of step {step:,} ({which})"
    rows.append((f"test {metric}", figure(metric, test["mean"], test["ci95"]), note))
    for name, own in results.get("sources", {}).items():
        note = number_of(own["episodes"], "episode")
        rows.append((f"  {name}", figure(metric, own["mean"], own["ci95"]), note))
    if "mean_of_sources" in results:
        whole = results["mean_of_sources"]
        rows.append(("mean of sources", figure(metric, whole["mean"], whole["ci95"]), ""))
    if "queries" in results:
        queries = results["queries"]
        bounds = f"binomial 95 %: {100 * queries['low']:.2f} to {100 * queries['high']:.2f} %"
        note = f"{queries['wrong']:,} of {queries['number']:,} queries, {bounds}"
        rows.append(("test error", f"{100 * queries['error']:.2f} %", note))
    for measure, here in measures_of(results):
        if measure.by_default:
            rows.append((measure.title, measure.text(here["mean"], here["ci95"]), ""))
    presentations = results.get("presentations", [])
    for at in sorted({1, 2, 5, len(presentations)}):
        if 1 <= at <= len(presentations):
            here = presentations[at - 1]
            row = (f"presentation {at}", figure(metric, here["mean"], here["ci95"]), "")
            rows.append(row)
    if "families" in results:
        found = results["families"]
        rows.append(
            ("families found", f"ARI {found['adjusted_rand_index']:.2f}", f"by {found['by']}")
        )
    for name, strategy in results.get("strategies", {}).items():
        gain = figure(metric, strategy["gain"]["mean"], strategy["gain"]["ci95"])
        row = (name, figure(metric, strategy["mean"], strategy["ci95"]), f"beaten by {gain}")
        rows.append(row)
    note = ""
    if "tasks_per_second" in results:
        made, rate = results["steps"], results["tasks_per_second"] or 0
        note = number_of(made, "step") if made else "no meta-training"
        note += f", {rate_text(rate)}" if rate else ""
    rows.append(("time", duration(results["seconds"]), note))
    return _table(_title(results), rows, where)


def _title(results: Mapping[str, Any]) -> str:
    names = [str(results[key]) for key in ("algo", "data") if key in results]
    parts = [" on ".join(names)]
    if results.get("kind") == "regression":
        parts.append(f"{results['shot']} points" if "shot" in results else "")
    elif "way" in results:
        parts.append(size_text(results))
    if "seed" in results:
        parts.append(f"seed {results['seed']}")
    return ", ".join(part for part in parts if part)


def _table(title: str, rows: list[tuple[str, str, str]], where: str) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.append(f"{'files'.ljust(widths[0])}  {where}")
    rule = "─" * min(100, max(map(len, [title, *lines])))
    return "\n".join([rule, title, rule, *lines, rule])


FULL_WIDTH = 80

NARROWEST, WIDEST = 40, 100
"""Smallest and largest number of terminal columns to which tables are fitted."""

INDENT = 4


def columns() -> int:
    """Return the number of columns of the terminal, or of the default without a terminal."""
    return max(NARROWEST, shutil.get_terminal_size((FULL_WIDTH, 24)).columns)


def table_console() -> Console:
    """Return a console of the terminal's width, within `NARROWEST` and `WIDEST`."""
    return Console(width=min(WIDEST, columns()), highlight=False)


def definitions(found: Mapping[str, str], width: int) -> Iterator[Text]:
    """Yield names with their texts next to them, or below where the names are long.

    Args:
        found: Texts of one line or several by name.
        width: Largest number of columns.
    """
    longest = max(map(len, found))
    side_by_side = longest <= width // 3
    indent = longest + 3 if side_by_side else INDENT
    for name, text in found.items():
        lines = [part for line in text.split("\n") for part in wrapped(line, width - indent)]
        first, *others = lines or [""]
        if not side_by_side:
            yield Text(f" {name}", style="bold")
            others.insert(0, first)
        else:
            yield Text.assemble((f" {name}".ljust(indent), "bold"), first)
        yield from (Text(" " * indent + line) for line in others)


def stacked(text: str, width: int) -> str:
    """Return a two-column text with the second column below the first, for a narrow terminal."""
    paragraphs: list[tuple[str, str]] = []
    for line in text.splitlines():
        margin = " " * (len(line) - len(line.lstrip()))
        left, _, right = line.strip().partition("  ")
        if len(margin) > INDENT:
            place, before = paragraphs.pop()
            paragraphs.append((place, f"{before} {left}"))
        else:
            paragraphs.append((margin, left))
            if right:
                paragraphs.append((margin + " " * INDENT, right.strip()))
    return "".join(
        textwrap.fill(words, width, initial_indent=margin, subsequent_indent=margin) + "\n"
        for margin, words in paragraphs
    )


@contextmanager
def warnings_held() -> Iterator[None]:
    """Delay log records until the end of the context, without duplicates.

    An exception discards them: the error makes earlier warnings irrelevant.
    """
    logger = logging.getLogger("metarun")
    before, records = list(logger.handlers), _Records()
    logger.handlers[:] = [records]
    try:
        yield
    finally:
        logger.handlers[:] = before
    for record in records.by_text.values():
        logger.handle(record)


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.by_text: dict[str, logging.LogRecord] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.by_text.setdefault(record.getMessage(), record)


def silent_screen() -> Screen:
    """Return a screen that shows nothing."""
    from rich.console import Console

    return Screen(Console(quiet=True))


def main_screen() -> Screen:
    """Return the screen of this process: only the main process shows output."""
    return Screen() if distributed.is_main() else silent_screen()
