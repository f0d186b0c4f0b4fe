"""Tests of tables of results against figures computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from metarun.core.results import completed
from metarun.reporting.comparison_tables import Row, comparison
from metarun.reporting.figures import drawing
from metarun.reporting.results import UNTRAINED, Result, read_result
from metarun.reporting.tables import Table, render
from metarun.runs.folder import RunFolder


def result(values: list[float], metric: str = "accuracy", **facts: Any) -> Result:
    record = {
        "metric": metric, "bn_statistics": "running", "transductive": False, "parameters": 1234,
        "train_seconds": 90.0, "steps": 300, "tasks_per_step": 4, **facts,
    }  # fmt: skip
    return Result(completed(record), np.asarray(values), untrained=0.25)


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
