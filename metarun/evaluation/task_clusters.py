"""Groups of tasks that a learner makes, against the families that the tasks are of.

Shapes: N tasks, E numbers of an embedding.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from metarun.core.statistics import Floats

Labels = npt.NDArray[np.int64]


def counts(families: Labels, groups: Labels) -> Labels:
    """Tasks of each family (row) that are in each group (column)."""
    table = np.zeros((families.max() + 1, groups.max() + 1), dtype=np.int64)
    np.add.at(table, (families, groups), 1)
    return table


def adjusted_rand_index(table: Labels) -> float:
    """How well groups are families: 1 if they are the same, about 0 by chance.

    Of the pairs of tasks that are together in both, how many more there are than by chance, over
    the most that there could be (Hubert & Arabie 1985, eq. 5).

    Args:
        table: As of `counts`.
    """

    def pairs(numbers: Any) -> float:
        return float((numbers * (numbers - 1) / 2).sum())

    together, by_family, by_group = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = by_family * by_group / max(pairs(table.sum()), 1.0)
    most = (by_family + by_group) / 2.0
    return 1.0 if most == chance else (together - chance) / (most - chance)


def gaussian_mixture(embeddings: Floats, components: int) -> Labels | None:
    """The group (N,) of each task by a mixture of normals, fitted by EM to embeddings (N, E).

    Full covariances, of the first principal components that hold 99 % of the variance; the best
    of ten starts. None without scikit-learn, where an embedding is not finite, or where there are
    fewer tasks than components.
    """
    if not np.isfinite(embeddings).all() or len(embeddings) < components:
        return None
    try:
        from sklearn.decomposition import PCA
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
    except ImportError:
        return None
    spread = embeddings.std(0)
    scaled = (embeddings - embeddings.mean(0)) / np.where(spread > 0.0, spread, 1.0)
    few = PCA(0.99, svd_solver="full").fit_transform(scaled) if scaled.any() else scaled
    mixture = GaussianMixture(components, n_init=10, random_state=0, reg_covar=1e-4)
    with warnings.catch_warnings():
        # Said where tasks are alike: then there is nothing to find.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(mixture.fit_predict(few), dtype=np.int64)
