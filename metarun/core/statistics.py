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
def t_quantile(freedom: int) -> float:
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
