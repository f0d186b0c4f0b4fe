"""What every evaluation has in common: three verbs, and the results that the trainer stores.

Shapes: N episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from metarun.core.statistics import Floats, interval_record, mean_of_groups
from metarun.core.types import Record, TaskBatch

Tick = Callable[[int], None]
"""Function called with the number of units done; it may raise an exception to stop."""

Digest = Any
"""A hashlib object; hashlib has no public type for it."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The results of an evaluation.

    Attributes:
        values: (N,) accuracy as a fraction, or mean squared error over query rows and outputs.
        digest: Hash of the episodes: equal for equal episodes, whatever the batch size.
        arrays: Entries of `episodes.npz`, with `values` under the name of the metric.
        record: Entries of `results.json`.
        files: Other files, as bytes by name.
    """

    values: Floats
    digest: str
    arrays: Mapping[str, Any] = field(default_factory=dict)
    record: Record = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


class Evaluation(Protocol):
    """An evaluation of an algorithm on a split; it can be stopped, saved and continued.

    Attributes:
        size: Number of units that `run` counts.
    """

    size: int

    def run(self, tick: Tick | None = None) -> Evaluated:
        """Evaluate, or continue an evaluation that was stopped, and return the results.

        The state of the algorithm and of the data does not change.

        Args:
            tick: Function called with the number of units done; it may raise an exception to stop.
        """
        ...

    def state_dict(self) -> Record | None:
        """Return everything that `load_state_dict` needs; None if there is nothing to continue."""
        ...

    def load_state_dict(self, state: Record) -> None:
        """Continue from the state of the same evaluation."""
        ...


def base_record(values: Floats, digest: str) -> Record:
    """Return the entries of `results.json` that every evaluation has."""
    return {
        "test": {**interval_record(values), "episodes": len(values)},
        "curve": None,
        "episodes_hash": digest,
        "measures": {},
    }


def by_source(values: Floats, places: npt.NDArray[Any], names: Sequence[str]) -> Record:
    """Return the entries of `results.json` for episodes of several data sets.

    Args:
        values: (N,) metric of each episode.
        places: (N,) position of its data set in `names`.
        names: Names of the data sets.
    """
    own = [(name, values[places == place]) for place, name in enumerate(names)]
    mean, ci95 = mean_of_groups(values, places)
    return {
        "sources": {
            name: {**interval_record(part), "episodes": len(part)}
            for name, part in own
            if len(part)
        },
        "mean_of_sources": {"mean": mean, "ci95": ci95},
    }


def merged(records: list[Record]) -> Record:
    """Return the entries of several records; those of `measures` are joined."""
    whole: Record = {}
    for record in records:
        measures = {**whole.get("measures", {}), **record.get("measures", {})}
        whole |= record
        whole["measures"] = measures
    return whole


def add_to_digest(digest: Digest, batch: TaskBatch) -> None:
    """Add a batch to a hash: all labels, and about 64 values of each input row.

    Hashing whole images would take seconds.
    """
    parts = [batch.support_y, batch.query_y]
    parts += [] if batch.class_ids is None else [batch.class_ids]
    for inputs in (batch.support_x, batch.query_x):
        rows = inputs.flatten(2)
        parts.append(rows[..., :: max(1, rows.shape[-1] // 64)])
    arrays = [part.cpu().numpy() for part in parts]
    # Task by task, so that the hash does not depend on the batch size.
    for task in range(batch.num_tasks):
        for array in arrays:
            digest.update(array[task].tobytes())
