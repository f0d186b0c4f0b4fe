"""Agreement between the groups in which a learner puts tasks and the families of the tasks.

Shapes: N tasks, E dimensions of an embedding.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from metarun.core.statistics import Floats

Labels = npt.NDArray[np.int64]


def counts(families: Labels, groups: Labels) -> Labels:
    """Return the number of tasks of each family (row) in each group (column)."""
    table = np.zeros((families.max() + 1, groups.max() + 1), dtype=np.int64)
    np.add.at(table, (families, groups), 1)
    return table


def adjusted_rand_index(table: Labels) -> float:
    """Return the adjusted Rand index: 1 if groups equal families, about 0 by chance.

    It counts the pairs of tasks that share both family and group. The excess over chance is
    divided by its largest possible value (Hubert & Arabie 1985, eq. 5).

    Args:
        table: Contingency table as returned by `counts`.
    """

    def pairs(numbers: Any) -> float:
        return float((numbers * (numbers - 1) / 2).sum())

    together, by_family, by_group = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = by_family * by_group / max(pairs(table.sum()), 1.0)
    most = (by_family + by_group) / 2.0
    return 1.0 if most == chance else (together - chance) / (most - chance)


def gaussian_mixture(embeddings: Floats, components: int) -> Labels | None:
    """Return the group (N,) of each task by a Gaussian mixture, fitted to embeddings (N, E).

    EM fits full covariances to the first principal components, which explain 99 % of the
    variance; the best of ten initializations is used. Returns None without scikit-learn, if an
    embedding is not finite, or if there are fewer tasks than components.
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
        # scikit-learn warns if the tasks are alike; then there are no groups to find.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(mixture.fit_predict(few), dtype=np.int64)
