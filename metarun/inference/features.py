"""Features of all rows of a data set, by the network of a learner.

Shapes: N rows, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, own_parameters
from metarun.algorithms.common.features import FeatureLearner, WithFeatures
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.network import Network
from metarun.core.types import SPLITS, EpisodeSource, HasRowsOfClasses
from metarun.data.storage.table_files import CLASSES, FEATURES, WEIGHTS


def features_of(
    algorithm: Algorithm, source: EpisodeSource, name: str, tick: Callable[[int], object]
) -> dict[str, Any]:
    """Return the arrays of a file of features, which `data=features` reads.

    Args:
        algorithm: Learner whose network computes them: what a metric learner compares, or what the
            head of another learner reads.
        source: Data set of classes; its rows are not augmented.
        name: Name of the data set, for messages.
        tick: Function called with the number of rows done.

    Returns:
        `features` (N, F) float32; `label` (N,), with the names of the labels as `classes`; `split`
        (N,); `files` (N,) where the rows are files; `weights`, a hash of the network.

    Raises:
        ValueError: The data set has no rows of classes, or the features of a row depend on others.
    """
    if not isinstance(source, HasRowsOfClasses) or source.spec.streams is not None:
        raise ValueError(
            f"data={name} has no rows of classes: expected a data set such as omniglot_small or "
            "folder, no stream"
        )
    encoder = _encoder(algorithm)
    found: list[Any] = []
    done = 0
    with torch.no_grad():
        for split in SPLITS:
            for rows in source.all_rows(split):
                found.append(encoder(rows).flatten(1).float().cpu().numpy())
                done += len(rows)
                tick(done)
    counts = {split: source.counts(split) for split in SPLITS}
    classes = [name for split in SPLITS for name in source.class_names(split)]
    in_order = [count for split in SPLITS for count in counts[split]]
    arrays = {
        FEATURES: np.concatenate(found),
        "label": np.repeat(np.arange(len(classes)), in_order),
        CLASSES: np.array(classes),
        "split": np.repeat(np.array(SPLITS), [sum(counts[split]) for split in SPLITS]),
        WEIGHTS: np.array(hash_of(_network(algorithm))),
    }
    files = getattr(source, "file_names", None)
    if files is not None:
        listed: list[str] = [file for split in SPLITS for file in files[split]]
        arrays["files"] = np.array(listed)
    return arrays


def hash_of(net: nn.Module) -> str:
    """Return a hash of all parameters and buffers of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _network(algorithm: Algorithm) -> nn.Module:
    net = algorithm.net
    return net.features if isinstance(net, WithFeatures) else net


def _encoder(algorithm: Algorithm) -> Callable[[Tensor], Tensor]:
    """Return the function that maps rows (n, …) to features, each row by itself."""
    if algorithm.bn_statistics in ("support", "transductive"):
        raise ValueError(
            f"with bn={algorithm.bn_statistics} the features of a row depend on the others: type "
            "bn=running"
        )
    ctx = ForwardContext(running=True)
    if isinstance(algorithm, FeatureLearner):
        params = own_parameters(algorithm.net)
        return lambda rows: algorithm.features(algorithm.net, params, rows, ctx)
    net = algorithm.net
    if not isinstance(net, Network):
        raise ValueError(
            f"{type(algorithm).__name__} has no network of features: use a run of a learner such "
            "as algo=protonet or maml"
        )
    return lambda rows: net.body(rows, ctx)


def counted(arrays: dict[str, Any]) -> str:
    """Return what a file of features holds, in words."""
    rows, width = arrays[FEATURES].shape
    splits: Sequence[str] = arrays["split"]
    counts = [len(np.unique(arrays["label"][splits == split])) for split in SPLITS]
    return (
        f"{rows:,} rows of {width} features, {'/'.join(map(str, counts))} train/val/test classes, "
        f"weights {arrays[WEIGHTS]}"
    )
