"""Statistics over groups of episodes: the mean of their means, and average ranks."""

from __future__ import annotations

import numpy as np
import pytest

from metarun.core.statistics import average_ranks, interval, mean_of_groups


def test_the_interval_of_a_mean_of_means_holds_the_mean_as_often_as_it_says() -> None:
    draw, groups = np.random.default_rng(0), np.repeat([0, 1], [12, 30])
    truth, held = (1.0 + 5.0) / 2.0, 0
    for _ in range(2000):
        values = np.where(groups == 0, draw.normal(1.0, 3.0, 42), draw.normal(5.0, 0.5, 42))
        mean, width = mean_of_groups(values, groups)
        held += abs(mean - truth) <= width
    # Four standard deviations of a binomial around 95 %.
    assert abs(held / 2000 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


def test_one_group_has_the_usual_interval() -> None:
    values = np.random.default_rng(1).normal(size=20)
    assert mean_of_groups(values, np.zeros(20)) == pytest.approx(interval(values))


def test_ranks_are_those_of_the_means_in_each_group_and_ties_share_theirs() -> None:
    groups = np.array([0, 0, 1, 1])
    values = np.array([[1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 5.0, 5.0], [0.0, 0.0, 9.0, 9.0]])
    ranks, widths = average_ranks(values, groups)
    # Group 0: 1.5, 1.5 and 3; group 1: 3, 2 and 1.
    np.testing.assert_allclose(ranks, [2.25, 1.75, 2.0])
    assert widths[2] == 0.0
    assert widths[0] > 0.0


def test_the_better_of_two_by_far_has_rank_one_for_certain() -> None:
    values = np.stack([np.arange(40.0), np.arange(40.0) + 100.0])
    ranks, widths = average_ranks(values, np.arange(40) % 4)
    np.testing.assert_array_equal(ranks, [2.0, 1.0])
    np.testing.assert_array_equal(widths, [0.0, 0.0])
