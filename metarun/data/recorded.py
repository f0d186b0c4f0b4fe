"""What a run records of its data set, so that what was learned can be used without the data.

The record is plain JSON: kind and shapes of the tasks, classes, sizes, how an image becomes a row,
and the fingerprint of the data. Nothing in it is executed.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from metarun.core.types import (
    SPLITS,
    EpisodeSize,
    EpisodeSource,
    Record,
    Split,
    Stream,
    TaskBatch,
    TaskSpec,
)
from metarun.data.encoding import TableEncoding
from metarun.data.episodes import PreparesImages
from metarun.data.preparation import Preparation

FILE = "data.json"
"""Name of the record in the run's folder."""

_OWN = "own"
TABLE = "table"
_LOSSES = {"classification": "cross_entropy", "regression": "mse"}


def record_of(source: EpisodeSource) -> Record:
    """Return the record of a data set."""
    names = getattr(source, "original_names", None) or getattr(source, "class_names", None)
    names = names if source.spec.kind == "classification" else None
    return {
        **asdict(source.spec),
        "metric": source.spec.metric,
        "loss": _LOSSES[source.spec.kind],
        "sizes": {split: asdict(source.sizes[split]) for split in SPLITS},
        "classes": names and {split: list(map(_printable, names(split))) for split in SPLITS},
        "preparation": _preparation_of(source),
        "fingerprint": source.fingerprint(),
    }


def _printable(name: str) -> str:
    """Return a name that is valid text; that of a folder need not be."""
    return name.encode("utf-8", "backslashreplace").decode()


def _preparation_of(source: EpisodeSource) -> Record | str | None:
    """Return how images, or rows of a table, become inputs.

    None where inputs are taken as they are; `own` if it is not to be recorded.
    """
    encoding = getattr(source, "encoding", None)
    if isinstance(encoding, TableEncoding):
        return {"kind": TABLE, **encoding.record()}
    if not hasattr(source, "prepare"):
        return None
    if not isinstance(source, PreparesImages) or type(source).prepare is not PreparesImages.prepare:
        return _OWN
    return source.preparation.record() or _OWN


def suffices(record: Record) -> bool:
    """Return whether a learner can be used without its data, by the record alone.

    Raises:
        ValueError: The record is damaged.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no record")
    return record.get("preparation") != _OWN


class Recorded:
    """A data set of which only the record is there: it has a spec and prepares images.

    Args:
        record: What `record_of` returned when the run began.
        device: Device of prepared rows.
        dtype: Precision of prepared rows.

    Attributes:
        spec, sizes, device: See `EpisodeSource`.
        prepare, preparation: As those of `ClassEpisodes`; missing if the inputs are no images.
        encoding: How the columns of a table become inputs; missing if they are no table.

    Raises:
        ValueError: The record is damaged.
    """

    def __init__(self, record: Record, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        try:
            self.spec = _spec(record)
            self.sizes = {split: EpisodeSize(**record["sizes"][split]) for split in SPLITS}
            self._fingerprint = str(record["fingerprint"])
            described = record["preparation"]
            if described is not None and described["kind"] == TABLE:
                self.encoding = TableEncoding.of(described)
            elif described is not None:
                preparation = Preparation.of(described, device, dtype)
                self.preparation = preparation
                self.prepare = lambda images: preparation.rows(images, self.spec.input_shape)
        except KeyError as error:
            raise ValueError(f"it has no {error}") from error
        except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise ValueError(" ".join(str(error).split())) from error

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Refuse, as there are no data."""
        raise ValueError(f"tasks {index} to {index + num_tasks - 1} of {split} need the data")

    def fingerprint(self) -> str:
        """Return the fingerprint of the data when the run began."""
        return self._fingerprint


def _spec(record: Record) -> TaskSpec:
    kind, shape = record["kind"], tuple(map(int, record["input_shape"]))
    if kind not in _LOSSES or not shape or min(shape) < 1:
        raise ValueError(f"kind {kind!r} with inputs of shape {shape}")
    streams = record["streams"]
    return TaskSpec(
        kind=kind,
        input_shape=shape,
        output_dim=int(record["output_dim"]),
        train_way=int(record["train_way"]),
        num_train_classes=_number(record["num_train_classes"]),
        train_shot=_number(record["train_shot"]),
        streams=streams and {s: Stream.of(dict(streams[s])) for s in SPLITS},
    )


def _number(value: object) -> int | None:
    return None if value is None else int(str(value))
