"""Meta-Dataset's rule of ways and shots (Triantafillou et al. 2020, section 3.2 and appendix).

The number of classes is uniform. A class gives the same number of queries as every other, and
about as many support rows as its share of the data: tasks are as unequal as the data are.

Shapes: T tasks, W ways. All tensors are on the CPU, where they decide the shapes of a batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_WAY, MOST_WAY = 5, 50
MOST_QUERY = 10
"""Largest number of queries of a class."""
MOST_SUPPORT = 500
"""Largest number of support rows of a task."""
_MOST_OF_A_CLASS = 100
"""Largest number of rows that a class counts for the size of the support set."""
LOG_WEIGHTS = math.log(0.5), math.log(2.0)
"""Range of the uniform logarithm of a class's weight."""


def query_size(counts: Tensor) -> int:
    """Return the number of queries of each class, at most half of the smallest class.

    Args:
        counts: Rows of each class of each task, (T, W); 2 or more.
    """
    return min(MOST_QUERY, int(counts.min()) // 2)


def support_size(counts: Tensor, query: int, beta: float) -> int:
    """Return the size of the support sets: each class adds a share `beta` of its rows.

    Args:
        counts: Rows of each class of each task, (T, W).
        query: Queries of each class.
        beta: A number in [0, 1), drawn uniformly. The smallest of the tasks' sizes is returned.
    """
    counted = (counts - query).clamp(max=_MOST_OF_A_CLASS)
    sizes = torch.floor(beta * counted.double() + 1.0).sum(1)
    return min(MOST_SUPPORT, int(sizes.min()))


def shots(counts: Tensor, query: int, size: int, weights: Tensor) -> Tensor:
    """Return the number of support rows of each class, (T, W), with equal sums over classes.

    A class has one row, and of the `size - W` others its share of `weights * counts`, rounded down.
    It has no more than remain beside its queries.

    Args:
        counts: Rows of each class of each task, (T, W).
        query: Queries of each class.
        size: Size of the support set, W or more.
        weights: (T, W) weights of the classes; logarithms are uniform on `LOG_WEIGHTS`.
    """
    shares = weights * counts
    shares = shares / shares.sum(1, keepdim=True)
    own = torch.floor(shares * (size - counts.shape[1])).long() + 1
    own = torch.minimum(own, counts - query)
    # Rounding leaves the tasks of a batch with different sums: the largest classes give way.
    for task in (own.sum(1) - own.sum(1).min()).nonzero().flatten().tolist():
        for _ in range(int(own[task].sum() - own.sum(1).min())):
            own[task, own[task].argmax()] -= 1
    return own
