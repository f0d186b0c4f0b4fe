"""Continual-learning metrics, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from metarun.core.types import Stream
from metarun.evaluation import continual_metrics

# Accuracy on three tasks after each of three visits, one rollout.
MATRIX = np.array([[[0.9, 0.3, 0.1], [0.7, 0.8, 0.2], [0.6, 0.5, 1.0]]])
ONCE = (0, 1, 2)
# The same three tasks, the first of which returns.
RETURNING = (0, 1, 2, 0)
RETURNED = np.array([[[0.9, 0.3, 0.1], [0.7, 0.8, 0.2], [0.6, 0.5, 1.0], [0.8, 0.4, 0.9]]])


def test_the_average_is_that_of_the_last_row() -> None:
    assert continual_metrics.average(MATRIX) == pytest.approx([(0.6 + 0.5 + 1.0) / 3])


def test_backward_transfer_compares_the_end_with_when_a_task_was_learned() -> None:
    expected = ((0.6 - 0.9) + (0.5 - 0.8)) / 2
    assert continual_metrics.backward_transfer(MATRIX, ONCE, higher=True) == pytest.approx(
        [expected]
    )
    # The task that was visited last is left out, whatever its number.
    expected = ((0.4 - 0.8) + (0.9 - 1.0)) / 2
    found = continual_metrics.backward_transfer(RETURNED, RETURNING, higher=True)
    assert found == pytest.approx([expected])


def test_forward_transfer_compares_what_is_known_before_a_task_with_knowing_nothing() -> None:
    untaught = np.array([[0.5, 0.1, 0.4]])
    expected = ((0.3 - 0.1) + (0.2 - 0.4)) / 2
    found = continual_metrics.forward_transfer(MATRIX, untaught, ONCE, higher=True)
    assert found == pytest.approx([expected])


def test_a_gain_is_positive_for_errors_too() -> None:
    untaught = np.array([[0.5, 0.1, 0.4]])
    for figure in (
        continual_metrics.backward_transfer(MATRIX, ONCE, higher=False)
        + continual_metrics.backward_transfer(MATRIX, ONCE, higher=True),
        continual_metrics.forward_transfer(MATRIX, untaught, ONCE, higher=False)
        + continual_metrics.forward_transfer(MATRIX, untaught, ONCE, higher=True),
    ):
        assert figure == pytest.approx([0.0])


def test_forgetting_is_the_distance_to_the_best_that_was_known() -> None:
    expected = ((0.9 - 0.6) + (0.8 - 0.5)) / 2
    assert continual_metrics.forgetting(MATRIX, ONCE, higher=True) == pytest.approx([expected])
    # The best accuracy before the end is 0.8 for task 1 and 1.0 for task 2.
    expected = ((0.8 - 0.4) + (1.0 - 0.9)) / 2
    assert continual_metrics.forgetting(RETURNED, RETURNING, higher=True) == pytest.approx(
        [expected]
    )
    # The best error is the smallest since the first visit: 0.6 and 0.3; at the end 0.6 and 0.5.
    errors = np.array([[[0.9, 0.1, 0.0], [0.6, 0.3, 0.0], [0.6, 0.5, 0.2]]])
    expected = ((0.6 - 0.6) + (0.5 - 0.3)) / 2
    assert continual_metrics.forgetting(errors, ONCE, higher=False) == pytest.approx([expected])


def test_one_task_alone_has_no_transfer() -> None:
    one = np.array([[[0.4]], [[0.6]]])
    assert np.isnan(continual_metrics.backward_transfer(one, (0,), higher=True)).all()
    assert np.isnan(continual_metrics.forward_transfer(one, one[:, 0], (0,), higher=True)).all()
    assert np.isnan(continual_metrics.forgetting(one, (0,), higher=True)).all()


def test_what_was_seen_so_far_is_averaged_over_the_tasks_that_were_met() -> None:
    found = continual_metrics.seen_so_far(RETURNED, RETURNING)
    expected = [0.9, (0.7 + 0.8) / 2, (0.6 + 0.5 + 1.0) / 3, (0.8 + 0.4 + 0.9) / 3]
    assert found[0] == pytest.approx(expected)


def test_the_prequential_figure_is_a_running_mean() -> None:
    found = continual_metrics.prequential(np.array([[1.0, 0.0, 0.5, 0.5]]))
    assert found[0] == pytest.approx([1.0, 0.5, 0.5, 0.5])


def test_regret_is_the_loss_above_the_comparator_so_far() -> None:
    stream = Stream(visits=(0,), steps=3, rows=1, queries=1)
    losses = np.array([[3.0, 2.0, 1.0]]), np.array([[1.0, 1.0, 2.0]])
    assert continual_metrics.regret(*losses, stream)[0] == pytest.approx([2.0, 3.0, 2.0])
    # A step's loss is a mean over its rows.
    several = Stream(visits=(0,), steps=3, rows=4, queries=1)
    assert continual_metrics.regret(*losses, several)[0] == pytest.approx([8.0, 12.0, 8.0])
    assert continual_metrics.cumulative(losses[0], several)[0] == pytest.approx([12.0, 20.0, 24.0])


def test_growth_is_the_exponent_of_a_power_law() -> None:
    steps = np.arange(1, 101)
    late = np.where(steps < 50, 1.0, -1.0)
    curves = np.stack([3.0 * steps, np.sqrt(steps), -1.0 * steps, late])
    found = continual_metrics.growth(curves)
    assert found[:2] == pytest.approx([1.0, 0.5])
    assert np.isnan(found[2:]).all()


def test_rows_to_proficiency_count_until_the_threshold_is_reached_first() -> None:
    current = np.array([[0.2, 0.9, 0.5, 0.1, 0.2, 0.3]])
    found = continual_metrics.to_proficiency(current, 0.9, visits=2, rows=4, higher=True)
    assert found[0] == pytest.approx([8.0, 12.0])
    found = continual_metrics.to_proficiency(current, 0.2, visits=2, rows=1, higher=False)
    assert found[0] == pytest.approx([1.0, 1.0])


def test_first_and_later_visits_are_counted_apart_where_tasks_return() -> None:
    stream = Stream(visits=(0, 1, 0), steps=2, rows=3, queries=1)
    stream_record = {
        "incoming": np.zeros((1, 6)),
        "incoming_loss": np.zeros((1, 6)),
        "current": np.array([[0.1, 0.9, 0.1, 0.2, 0.9, 0.9]]),
        "matrix": np.zeros((1, 4, 2)),
        "untrained": np.zeros((1, 2)),
    }
    found = continual_metrics.summary(stream_record, stream, higher=True, proficiency=0.5)
    assert found["rows_to_proficiency_new"] == pytest.approx([6.0])
    assert found["rows_to_proficiency_returning"] == pytest.approx([3.0])
    assert found["rows_to_proficiency"] == pytest.approx([5.0])
    assert "rows_to_proficiency" not in continual_metrics.summary(
        stream_record, stream, higher=True
    )


def test_the_curves_have_a_line_for_each_step_and_the_tasks_met_where_a_visit_ends() -> None:
    stream = Stream(visits=(0, 1), steps=2, rows=3, queries=1)
    stream_record = {
        "incoming": np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]),
        "incoming_loss": np.full((2, 4), 0.5),
        "current": np.full((2, 4), 0.25),
        "matrix": np.stack([np.zeros((3, 2)), np.ones((3, 2))]),
    }
    lines = continual_metrics.curves(stream_record, stream).splitlines()
    head = lines[0].split(",")
    rows = [dict(zip(head, line.split(","), strict=True)) for line in lines[1:]]
    assert [row["rows"] for row in rows] == ["3", "6", "9", "12"]
    assert [row["tasks_met"] for row in rows] == ["1", "1", "2", "2"]
    # Three rows in a step, each with a loss of one half.
    assert [float(row["cumulative_loss"]) for row in rows] == [1.5, 3.0, 4.5, 6.0]
    assert [row["seen"] for row in rows] == ["", "0.5", "", "0.5"]
    assert float(rows[1]["incoming"]) == 0.5
