"""Rows that a generative algorithm makes for test tasks."""

from __future__ import annotations

from metarun.algorithms.base import Algorithm
from metarun.algorithms.capabilities import Generative
from metarun.core.files import to_npz
from metarun.core.types import EpisodeSource
from metarun.evaluation.episodes import tasks_alike

_TASKS = 8
_ROWS = 10
"""Rows generated for each of these tasks, and the largest number of support rows shown."""


def generated_samples(algorithm: Algorithm, source: EpisodeSource) -> dict[str, bytes]:
    """Return `samples.npz` with rows for the first test tasks and their support; empty if none."""
    if not isinstance(algorithm, Generative) or not algorithm.generates:
        return {}
    support = tasks_alike(source, "test", _TASKS).support_x
    made = algorithm.generated(support, _ROWS)
    # Evenly spaced, so that the rows are of many classes.
    shown = support[:, :: -(-support.shape[1] // _ROWS)]
    return {"samples.npz": to_npz({"support": shown.cpu().numpy(), "made": made.cpu().numpy()})}
