"""Means and their 95 % intervals, without torch, so that tables print without delay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NORMAL_95 = 1.959963984540054
"""Standard deviations on either side of the mean that contain 95 % of a normal distribution."""

quiet = np.errstate(over="ignore", invalid="ignore")
"""Decorator for statistics of values that may have diverged: the result shows the overflow or NaN,
so numpy's warning is not needed."""


def curve(lines: Iterable[Mapping[str, Any]], name: str) -> tuple[Floats, Floats]:
    """Return the steps (N,) and values (N,) of a metric in lines of a log; null values are NaN."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    steps = np.array([step for step, _ in found], dtype=np.float64)
    values = np.array([value for _, value in found], dtype=np.float64)
    return steps, values


@quiet
def interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Return the mean of N values and the half-width of its 95 % confidence interval.

    The half-width is t(0.975, N - 1) s / sqrt(N), where s has N - 1 degrees of freedom. It is NaN
    for a single value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    count = numbers.size
    mean = float(numbers.mean())
    if count < 2:
        return mean, math.nan
    return mean, t_quantile(count - 1) * float(numbers.std(ddof=1)) / math.sqrt(count)


def interval_record(values: npt.ArrayLike) -> dict[str, float]:
    """Return the mean and the half-width of its interval as an entry of `results.json`."""
    mean, ci95 = interval(values)
    return {"mean": mean, "ci95": ci95}


@quiet
def mean_of_groups(values: Floats, groups: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the mean of the groups' means, and the half-width of its 95 % interval.

    Values are independent within and between groups. The variance is the mean of the groups'
    variances of their means, divided by their number, with the degrees of freedom of Welch (1947).

    Args:
        values: (N,) values.
        groups: (N,) group of each.
    """
    parts = [values[groups == name] for name in np.unique(groups)]
    mean = float(np.mean([part.mean() for part in parts]))
    if min(map(len, parts)) < 2:
        return mean, math.nan
    own = np.array([part.var(ddof=1) / len(part) for part in parts])
    total = float(own.sum())
    if not total > 0.0:
        return mean, 0.0 if total == 0.0 else math.nan
    freedom = total**2 / float((own**2 / [len(part) - 1 for part in parts]).sum())
    return mean, t_quantile(freedom) * math.sqrt(total) / len(parts)


@quiet
def average_ranks(values: Floats, groups: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """Return the mean over groups of each method's rank, (G,), and the half-widths of intervals.

    In a group, rank 1 has the greatest mean, and equal means share the mean of their ranks. The
    half-width is 1.96 standard deviations over 1000 bootstrap samples of the episodes of each group
    (Efron 1979), the same for all methods.

    Args:
        values: (G, N) value of each method on each episode, greater being better.
        groups: (N,) group of each episode.
    """
    draw, ranks, drawn = np.random.default_rng(0), [], []
    for name in np.unique(groups):
        part = values[:, groups == name]
        sample = draw.integers(part.shape[1], size=(1000, part.shape[1]))
        ranks.append(_ranks_of(part.mean(1)))
        drawn.append(_ranks_of(part[:, sample].mean(2)))
    width: Floats = NORMAL_95 * np.mean(drawn, axis=0).std(1, ddof=1)
    return np.mean(ranks, axis=0), width


def _ranks_of(means: Floats) -> Floats:
    """Return ranks along the first dimension, from 1 for the greatest."""
    above = (means[None] > means[:, None]).sum(1)
    equal = (means[None] == means[:, None]).sum(1)
    ranks: Floats = above + (equal + 1) / 2.0
    return ranks


@quiet
def pseudo_values(sums: Floats, statistic: Callable[[Floats], Floats]) -> Floats:
    """Return N values whose mean is a statistic of pooled sums, and whose interval is its own.

    They are the jackknife's pseudo-values n s - (n - 1) s_i, where s_i is the statistic without
    episode i (Tukey 1958), shifted to the mean s. Episodes are independent and their rows need
    not be. The pseudo-values of a mean over equally large episodes are the means of the episodes.

    Args:
        sums: (N, …) sums of each episode.
        statistic: Function that maps pooled sums (…) to a value; it has to accept leading
            dimensions.
    """
    count, total = len(sums), sums.sum(0)
    whole = statistic(total)
    if count < 2:
        return np.full(count, whole)
    values = count * whole - (count - 1) * statistic(total - sums)
    shifted: Floats = values - values.mean() + whole
    return shifted


def wilson_interval(count: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a probability from a number of independent trials.

    It is that of Wilson (1927): all p with |count / trials - p| <= z sqrt(p (1 - p) / trials).

    >>> [round(bound, 4) for bound in wilson_interval(0, 400)]
    [0.0, 0.0095]
    """
    square = NORMAL_95**2 / trials
    share = count / trials
    middle = (share + square / 2.0) / (1.0 + square)
    half = math.sqrt(share * (1.0 - share) * square + square**2 / 4.0) / (1.0 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


@lru_cache
def t_quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t distribution with `freedom` degrees of freedom.

    With t = sqrt(v) tan(a), P(|T| < t) is the integral of c cos(a)^(v - 1). The integrand is
    smooth, so Gauss-Legendre quadrature is exact up to rounding. Newton's method converges
    monotonically from below, because the distribution function is concave there.

    >>> round(t_quantile(1), 4), round(t_quantile(4), 4), round(t_quantile(599), 4)
    (12.7062, 2.7764, 1.9639)
    """
    nodes, weights = np.polynomial.legendre.leggauss(100)
    constant = 2.0 / math.sqrt(math.pi)
    constant *= math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    t = 1.95
    for _ in range(50):
        angle = math.atan(t / math.sqrt(freedom))
        inside = np.cos(angle * (nodes + 1.0) / 2.0) ** (freedom - 1)
        probability = constant * angle / 2.0 * float(weights @ inside)
        density = constant / math.sqrt(freedom) * (1.0 + t * t / freedom) ** (-(freedom + 1) / 2)
        step = (0.95 - probability) / density
        t += step
        if abs(step) < 1e-13 * t:
            break
    return t
