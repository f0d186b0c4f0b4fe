"""Tests of tables of results against figures computed by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from metarun.core.results import completed
from metarun.reporting import comparison_tables
from metarun.reporting.comparison_tables import Row
from metarun.reporting.figures import drawing
from metarun.reporting.results import UNTRAINED, Result, read_result
from metarun.reporting.tables import Figure, Table, render
from metarun.runs.folder import RunFolder


def result(values: list[float], metric: str = "accuracy", **facts: Any) -> Result:
    record = {
        "metric": metric, "bn_statistics": "running", "transductive": False, "parameters": 1234,
        "train_seconds": 90.0, "steps": 300, "tasks_per_step": 4, **facts,
    }  # fmt: skip
    return Result(completed(record), np.asarray(values), untrained=0.25)


def comparison(rows: list[Row], columns: list[str]) -> str:
    return render("markdown", [comparison_tables.comparison(rows, columns)])


def test_a_figure_is_the_mean_and_the_t_interval_over_episodes() -> None:
    values = [0.5, 0.75, 1.0, 0.25]
    half = stats.t.ppf(0.975, 3) * stats.sem(values)
    text = comparison([Row("a", "A (2020)", [[result(values)]])], ["5-way 1-shot"])
    assert f"| `a` | A (2020) | 62.5 ± {100 * half:.1f} |" in text
    assert "| 25.0 | 1,200 | 1 min 30 s | 1,234 | running |" in text


def test_several_seeds_are_averaged_by_episode_and_their_spread_stands_apart() -> None:
    one, other = [0.5, 1.0, 0.75], [0.25, 0.5, 0.75]
    over_episodes = stats.t.ppf(0.975, 2) * stats.sem(np.mean([one, other], axis=0))
    over_seeds = stats.t.ppf(0.975, 1) * stats.sem([np.mean(one), np.mean(other)])
    text = comparison([Row("a", "A", [[result(one), result(other)]])], ["5-way 1-shot"])
    assert f"62.5 ± {100 * over_episodes:.1f} (± {100 * over_seeds:.1f} over 2 seeds)" in text


def test_the_best_stands_first_and_what_was_not_run_last_and_says_so() -> None:
    rows = [
        Row("missing", "", [[]]),
        Row("worse", "", [[result([0.2, 0.4])]]),
        Row("better", "", [[result([0.8, 0.9])]]),
    ]
    lines = comparison(rows, ["5-way 1-shot"]).splitlines()
    assert [line.split("`")[1] for line in lines[2:5]] == ["better", "worse", "missing"]
    assert "not run" in lines[4]


def test_what_failed_is_told_from_what_was_not_run() -> None:
    rows = [
        Row("a", "", [[], [result([0.5, 0.5])]], failed=[2, 1]),
        Row("b", "", [[], [result([0.5, 0.5])]]),
    ]
    lines = comparison(rows, ["1-shot", "5-shot"]).splitlines()
    assert "| failed | 50.0 ± 0.0 (1 failed) |" in lines[2]
    assert "| not run | 50.0 ± 0.0 |" in lines[3]


def test_log_likelihood_and_coverage_have_columns_if_any_run_has_them() -> None:
    named = {"mean": -0.5, "ci95": 0.1}
    sure = result([2.0, 4.0], "mse", log_likelihood=named, coverage=named)
    likelihood, covered = np.array([-0.6, -0.4]), np.array([0.9, 1.0])
    sure = replace(sure, measures={"log_likelihood": likelihood, "coverage": covered})
    again = replace(sure, measures={"log_likelihood": likelihood + 0.2, "coverage": covered})
    rows = [Row("unsure", "", [[result([1.0, 1.0], "mse")]]), Row("sure", "", [[sure]])]
    lines = comparison(rows, ["5 points"]).splitlines()
    assert "| log-likelihood | within the 95 % band, % | before training |" in lines[0]
    assert "| 1.00 ± 0.00 | – | – |" in lines[2]
    episodes = stats.t.ppf(0.975, 1) * 0.1
    assert f"| -0.50 ± {episodes:.2f} | 95.0 ± {50 * episodes:.1f} |" in lines[3]
    both = comparison([Row("sure", "", [[sure, again]])], ["5 points"])
    assert f"| -0.40 ± {episodes:.2f} (± {episodes:.2f} over 2 seeds) |" in both
    assert "log-likelihood" not in comparison(rows[:1], ["5 points"])


def test_of_errors_the_smallest_stands_first() -> None:
    rows = [
        Row("worse", "", [[result([2.0, 4.0], "mse")]]),
        Row("better", "", [[result([0.01, 0.02], "mse")]]),
    ]
    lines = comparison(rows, ["5 points"]).splitlines()
    assert "5 points: MSE" in lines[0]
    assert "0.015 ± 0.064" in lines[2]  # as many places as the mean has
    assert "3.00 ± 12.71" in lines[3]


def test_a_run_that_diverged_stands_last_and_says_so() -> None:
    rows = [
        Row("diverged", "", [[result([0.1, float("nan")], "mse")]]),
        Row("worse", "", [[result([2.0, 4.0], "mse")]]),
    ]
    lines = comparison(rows, ["5 points"]).splitlines()
    assert lines[3].startswith("| `diverged` |  | not finite |")


def test_a_transductive_figure_says_so() -> None:
    found = result([0.5, 0.6], bn_statistics="transductive", transductive=True)
    assert "| transductive |" in comparison([Row("a", "", [[found]])], ["5-way 1-shot"])


def test_only_a_finished_run_has_a_result(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config="{}\n")
    assert read_result(run) is None
    (run.path / "results.json").write_text(json.dumps({"format": 1, "metric": "mse"}))
    np.savez(run.path / "episodes.npz", mse=np.array([1.0, 2.0]))
    assert read_result(run) is None
    run.set_status("finished")
    found = read_result(run)
    assert found is not None
    assert found.untrained is None
    assert found.episodes.tolist() == [1.0, 2.0]
    run.write_json(UNTRAINED, {"mean": 3.5})
    again = read_result(run)
    assert again is not None
    assert again.untrained == pytest.approx(3.5)


def test_cells_that_a_spreadsheet_would_run_are_quoted_in_every_csv() -> None:
    text = render("csv", [Table("", [{"run": "=cmd|' /C calc'!A0", "@x": "-1.5"}])])
    assert text.splitlines() == ["table,run,'@x", ",'=cmd|' /C calc'!A0,-1.5"]
    text = drawing.table({"+class": ["@SUM(A1)", "-", "cat"], "value": [-1.5, -2, 0.5]})
    assert text.splitlines() == ["'+class,value", "'@SUM(A1),-1.5", "'-,-2", "cat,0.5"]


# Tables on a terminal.

RUNS = Table(
    "runs",
    [
        {
            "run": f"algo={algo} optim.lr=0.001 backbone.filters=64",
            "task": "5-way 1-shot",
            "meta-test": Figure(93.5, 0.5, 600, places=1),
            "empty": "",
            "batch norm": "transductive",
            "steps": steps,
        }
        for algo, steps in (("maml", "10,000"), ("anil", "9,000"))
    ],
    "Every figure is a mean over test episodes with its interval at the level of 95 percent.",
)


def at(columns: int, table: Table, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    return render("terminal", [table]).splitlines()


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_a_table_fits_the_terminal_and_breaks_no_word(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = at(columns, RUNS, monkeypatch)
    assert max(map(len, lines)) <= columns
    said = " ".join(lines).replace(";", "").split()
    for line in RUNS.lines:
        assert set(" ".join(map(str, line.values())).split()) <= set(said)
    assert set(RUNS.text.split()) <= set(said)


def test_what_all_rows_share_stands_in_the_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = at(100, RUNS, monkeypatch)
    assert lines[:2] == ["runs", "task: 5-way 1-shot; batch norm: transductive"]
    assert lines[3].split() == ["run", "meta-test", "steps"]
    assert len(lines) == 9
    alike = [{"run": "a", "task": "5-way"}, {"run": "b", "task": ""}]
    assert at(100, Table("", alike), monkeypatch)[1].split() == ["run", "task"]


def test_rows_that_are_too_wide_are_paragraphs(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = at(60, RUNS, monkeypatch)
    assert lines[3:7] == [
        "algo=maml optim.lr=0.001 backbone.filters=64",
        "  meta-test  93.5 ± 0.5",
        "  steps      10,000",
        "",
    ]


def test_a_file_has_aligned_columns_of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("", [{"a": "x" * 150, "b": "y" * 150}, {"a": "", "b": "z"}])
    monkeypatch.setattr("os.get_terminal_size", refuse)
    assert "x" * 150 + "  " + "y" * 150 in render("terminal", [table])


def refuse(_: int) -> None:
    raise OSError("no terminal")


def test_a_cell_cannot_command_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = Table("\x1b[2J", [{"a\x07": "\x1b[31m", "b": "1"}, {"a\x07": "\r", "b": "2"}], "\x9b")
    for columns in (5, 100):
        assert all(c.isprintable() for line in at(columns, evil, monkeypatch) for c in line)


# Other formats.


def test_latex_has_no_character_that_is_a_command_or_ends_a_row() -> None:
    text = "".join(map(chr, range(0x20, 0x7F))) + "± – → × é\n\x1b"
    written = render("latex", [Table("a\nb", [{text: text, "[x]": "*"}], "c\nd")])
    lines = written.splitlines()
    assert [lines[place][0] for place in (0, 1, 2, 4, 6, 7, 8)] == [*"%", *"\\" * 5, *"%"]
    assert len(lines) == 9
    for row in (lines[3], lines[5]):
        cells = row.removesuffix(r" \\")
        commands = re.findall(r"\\(?:[a-z]+(?:\{\})?|[&%$#_{}])|\$(?:\\[a-z]+|-)\$", cells)
        for command in sorted(set(commands), key=len, reverse=True):
            cells = cells.replace(command, "")
        # What is left is the column separator and plain text.
        assert cells.count("&") == 1
        assert not set(cells) & set("\\~^<>%$#_{}|\n\x1b")


@pytest.mark.parametrize("text", ["[1,2]", "*"])
def test_a_row_in_latex_is_no_option_of_the_row_before(text: str) -> None:
    written = render("latex", [Table("", [{"a": text}, {"a": text}])])
    assert written.count(f"\n{{}}{text}") == 2


def test_json_has_the_numbers_under_names() -> None:
    table = Table("runs", [{"run": "a", "ours": Figure(float("nan"), 0.5, 6, 2, 0.25)}], "note")
    (record,) = json.loads(render("json", [table]))
    assert record["title"] == "runs"
    assert record["text"] == "note"
    numbers = {"mean": None, "ci95": 0.5, "episodes": 6, "seeds": 2, "seeds_ci95": 0.25, "mark": ""}
    assert record["rows"] == [{"run": "a", "ours": numbers}]


def test_a_bar_in_a_cell_is_no_column_in_markdown() -> None:
    assert r"| a\|b |" in render("markdown", [Table("", [{"x": "a|b"}])])


def test_counts_and_durations_are_numbers_for_other_programs() -> None:
    line = {"run": "7", "steps": "15,000", "time": "12 min 05 s", "seeds": "3", "note": "1,000"}
    table = Table("runs", [line])
    (row,) = json.loads(render("json", [table]))[0]["rows"]
    assert row == {"run": "7", "steps": 15000, "time, s": 725, "seeds": 3, "note": "1,000"}
    heads, values = render("csv", [table]).splitlines()
    assert heads == 'table,run,steps,"time, s",seeds,note'
    assert values == 'runs,7,15000,725,3,"1,000"'
    # A part of the steps is no number.
    assert '"1 of 5,000"' in render("csv", [Table("", [{"steps": "1 of 5,000"}])])
    assert "15,000" in render("markdown", [table])
