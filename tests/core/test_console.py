"""Screen output: plain lines without a terminal, a bar on one, and readable numbers."""

from __future__ import annotations

import errno
import io
import logging
import math
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from metarun.core.console import BAR_SHOWS_IT, FILE_ONLY, Screen, duration, summary
from metarun.core.measures import figure, number, values_text
from metarun.core.streams import fitted, unbroken_streams
from tests.tiny_run import go

RESULTS = {
    "algo": "maml", "data": "omniglot_small", "kind": "classification", "metric": "accuracy",
    "way": 5, "shot": 1, "seed": 7, "steps": 3000, "seconds": 754.2, "tasks_per_second": 1234.5,
    "val": {"mean": 0.91234, "ci95": 0.00567, "episodes": 200, "step": 2500},
    "test": {"mean": 0.87654, "ci95": None, "episodes": 600},
    "parameters_from": "best", "parameters_step": 2500,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal() -> tuple[Screen, Terminal]:
    file = Terminal()
    return Screen(Console(file=file, force_terminal=True, width=100, _environ={})), file


def plain_text(written: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)


def test_without_a_terminal_there_are_lines_and_no_control_characters() -> None:
    file = io.StringIO()
    screen, log = Screen(Console(file=file)), logging.getLogger("metarun.training.trainer")
    with screen.attached(), screen.bar("train", 10) as bar:
        log.info("step 1", extra=BAR_SHOWS_IT)
        bar.to(1, "step 1")
        log.warning("lower [query] to 6")
        log.info("a traceback", extra=FILE_ONLY)
    assert file.getvalue() == "step 1\nwarning: lower [query] to 6\n"


def test_colors_asked_for_by_a_variable_make_no_terminal_of_a_pipe() -> None:
    file = io.StringIO()
    screen = Screen(Console(file=file, force_terminal=True, _environ={}))
    with screen.attached(), screen.bar("train", 10) as bar:
        bar.to(5, "loss 1")
    assert file.getvalue() == ""


def test_a_terminal_shows_the_bar_and_leaves_out_the_lines_that_it_replaces() -> None:
    screen, file = on_terminal()
    log = logging.getLogger("metarun.training.trainer")
    with screen.attached(), screen.bar("train", 10) as bar:
        bar.to(5, "loss 0.1234")
        log.info("step 5/10 loss 0.1234 in a line", extra=BAR_SHOWS_IT)
        log.info("step 5/10 val [mse] 0.5")
        time.sleep(0.6)  # the bar is drawn four times a second
    text = plain_text(file.getvalue())
    assert "5/10" in text
    assert "loss 0.1234" in text
    assert "in a line" not in text
    assert "val [mse] 0.5" in text


def test_a_run_on_a_terminal_ends_with_its_table_and_without_a_bar(tmp_path: Path) -> None:
    screen, file = on_terminal()
    go(tmp_path, screen=screen)
    text = plain_text(file.getvalue())
    assert text.count("\n") < 60
    assert "step 7/60" not in text
    assert "step 10/60  val mse" in text
    assert str(tmp_path) in text
    assert "step 7/60" in (tmp_path / "metarun.log").read_text()


def test_a_reader_that_goes_away_does_not_stop_the_run(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    assert go(tmp_path, screen=Screen(Console(file=Gone())), steps=20)["steps"] == 20


def test_streams_that_fail_end_nothing_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", Dead())
    monkeypatch.setattr(sys, "stderr", ascii_only)
    before = sys.stdout, sys.stderr
    with unbroken_streams(), unbroken_streams():
        print("lost", flush=True)
        print("93 ± 1", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    assert ascii_only.buffer.getvalue() == b"93 ? 1\n"


def test_the_handlers_of_the_caller_are_set_aside_and_come_back() -> None:
    logger, mine = logging.getLogger("metarun"), logging.StreamHandler(io.StringIO())
    logger.addHandler(mine)
    try:
        with Screen(Console(file=io.StringIO())).attached():
            logger.warning("once")
            assert mine not in logger.handlers
        assert mine in logger.handlers
        assert mine.stream.getvalue() == ""
    finally:
        logger.removeHandler(mine)


def test_without_a_terminal_a_bar_breaks_long_silences_and_tells_what_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("metarun.core.console.time.monotonic", lambda: now)
    file = io.StringIO()
    screen, log = Screen(Console(file=file)), logging.getLogger("metarun.training.trainer")
    with screen.attached(), screen.bar("test", 100, long=60.0, shorter="use fewer") as bar:
        for done, now in [(1, 103.0), (2, 104.0), (6, 108.0), (9, 110.0), (20, 119.0)]:  # noqa: B007
            bar.to(done)
        now = 130.0
        assert bar.due
        log.info("a line")
        assert not bar.due
        now = 145.0
        bar.to(26, "loss 1")
    assert file.getvalue().splitlines() == [
        "test takes about 1 min 34 s from here: use fewer",
        "test 20/100  1 min 07 s left",
        "a line",
        "test 26/100  loss 1  2 min 04 s left",
    ]


def test_a_terminal_shows_warnings_in_color_and_breaks_no_word() -> None:
    screen, file = on_terminal()
    with screen.attached():
        logging.getLogger("metarun.x").warning("%s", "word " * 40)
    assert "\x1b[33mwarning:\x1b[0m" in file.getvalue()
    lines = plain_text(file.getvalue()).replace("\r", "").splitlines()
    assert {word for line in lines for word in line.split()} == {"warning:", "word"}
    assert max(map(len, lines)) <= 100


def test_control_characters_of_a_name_are_shown_and_not_obeyed() -> None:
    file = io.StringIO()
    with Screen(Console(file=file)).attached():
        logging.getLogger("metarun.x").info("class \x1b[31mred\r was\nread")
    assert file.getvalue() == "class \\x1b[31mred\\r was\nread\n"


@pytest.mark.parametrize(
    ("metric", "mean", "ci95", "text"),
    [
        ("accuracy", 0.92345, 0.00512, "92.34 ± 0.51 %"),
        ("accuracy", 1.0, math.nan, "100.00 %"),
        ("mse", 0.41234, 0.0311, "0.4123 ± 0.0311"),
        ("mse", 0.00492, 0.000901, "0.00492 ± 0.00090"),
        ("mse", 12345.6, None, "1.235e+04"),
        ("mse", None, None, "not a number"),
        ("mse", math.nan, 1.0, "not a number"),
    ],
)
def test_figures_can_be_read(
    metric: str, mean: float | None, ci95: float | None, text: str
) -> None:
    assert figure(metric, mean, ci95) == text


def test_small_and_large_numbers_keep_their_digits() -> None:
    assert [number(v) for v in (0.0, 1.5, 0.00012345, 123456.0)] == [
        "0.0000", "1.5000", "0.0001234", "1.235e+05",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.26, "0.3 s"), (9.4, "9.4 s"), (9.6, "10 s"), (59.7, "1 min 00 s"), (754.2, "12 min 34 s"),
     (3599.8, "1 h 00 min"), (12000.0, "3 h 20 min")],
)  # fmt: skip
def test_durations_can_be_read(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_single_step_is_one_step() -> None:
    assert "1 step, 1,234 tasks/s" in summary({**RESULTS, "steps": 1}, "outputs/a/b")


def test_the_wrong_answers_are_counted_with_a_binomial_interval() -> None:
    queries = {"number": 400, "wrong": 14, "error": 0.035, "low": 0.0209, "high": 0.0579}
    assert (
        "test error     3.50 %          14 of 400 queries, binomial 95 %: 2.09 to 5.79 %"
        in summary({**RESULTS, "queries": queries}, "outputs/a/b")
    )


def test_the_table_says_what_was_reached_and_where_it_is() -> None:
    assert summary(RESULTS, "outputs/a/b").splitlines()[1:-1:1] == [
        "maml on omniglot_small, 5-way 1-shot, seed 7",
        "─" * 76,
        "val accuracy   91.23 ± 0.57 %  200 episodes, step 2,500",
        "test accuracy  87.65 %         600 episodes, parameters of step 2,500 (best)",
        "time           12 min 34 s     3,000 steps, 1,234 tasks/s",
        "files          outputs/a/b",
    ]


def test_lines_on_a_terminal_are_broken_between_words_alone() -> None:
    path = f"outputs/{'x' * 40}"
    table = "time   1 s    3 steps of a kind that has a long name"
    text = (
        f"{'─' * 50}\nfiles in {path}\n{table}\nplease type `metarun a=1 b=2 c=3 d=4`, then go on"
    )
    assert fitted(text, 32).split("\n") == [
        "─" * 32,
        "files in",
        path,
        "time   1 s    3 steps of a kind",
        "              that has a long",
        "              name",
        "please type",
        "`metarun a=1 b=2 c=3 d=4`, then",
        "go on",
    ]
    assert fitted(text, 200) == text


def test_a_loss_that_is_the_metric_is_shown_once() -> None:
    assert values_text({"loss": 0.25, "mse": 0.25}, "mse") == "mse 0.2500"
    assert values_text({"loss": 0.5, "mse": 0.25}, "mse") == "loss 0.5000  mse 0.2500"
