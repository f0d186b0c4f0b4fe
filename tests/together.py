"""A few updates of every algorithm, in one process or in several; the tests compare them.

`python -m tests.together FILE CASE…`, started in the environment of torchrun, makes the updates
together with the other processes. The main process writes the outcome to FILE.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metarun.config.build import Experiment, build_experiment
from metarun.core import distributed, seeding
from metarun.core.types import Progress, Share
from metarun.evaluation.episodes import evaluate
from tests.helpers import composed

TASKS, UPDATES, EPISODES = 3, 2, 5
"""Odd numbers, which two processes cannot divide equally."""
# Adam would amplify rounding errors of zero gradients, such as that of a bias before batch norm.
COMMON = ["precision=float64", "device=cpu", "engine=loop", "optim=sgd", "optim.lr=0.01"]
IMAGES = ["way=3", "shot=2", "query=2"]
TRANSFORMED = [
    "way=2", "shot=2", "query=2", "train.shot=2", "train.query=2", "data.tasks=2", "data.rows=2",
]  # fmt: skip
SMALL = {
    "sinusoid": ["backbone.hidden=[6]", "shot=6", "train.shot=6"],
    "multimodal": ["backbone.hidden=[6]", "shot=6", "train.shot=6"],
    "omniglot_small": [*IMAGES, "backbone.filters=2", "data.image_size=14", "backbone.blocks=2"],
    "tables": ["query=2"],
    "mixed": [*IMAGES, "backbone.filters=2", "data.image_size=14", "backbone.blocks=2"],
    "stream_linear": ["backbone.hidden=[6]", "shot=4", "data.tasks=3"],
    "stream_sinusoid": ["backbone.hidden=[6]", "shot=4", "data.tasks=3"],
    "stream_incremental_sine": ["backbone.hidden=[6]"],
    **dict.fromkeys(("stream_rotated", "stream_permuted", "stream_rainbow"), TRANSFORMED),
    "stream_omniglot_small": [*IMAGES, "backbone.filters=2", "train.way=2"],
}

EVALUATED = ("maml", "mann", "mixture", "nearest", "np", "oml", "selector")
"""Algorithms to evaluate; together they cover every kind of measurement."""


def made(algo: str, data: str, *words: str) -> Experiment:
    """Build an experiment so small that an update takes milliseconds."""
    # The small sizes do not apply to another backbone.
    small = [] if "backbone=" in " ".join(words) else SMALL[data]
    return build_experiment(composed(f"algo={algo}", f"data={data}", *COMMON, *small, *words))


def outcome(algo: str, data: str, *words: str) -> dict[str, Any]:
    """Return the measurements of an algorithm before training, and its state after updates."""
    experiment = made(algo, data, *words)
    algorithm, source = experiment.algorithm, experiment.source
    found: dict[str, Any] = {}
    if algo in EVALUATED or any(".." in word for word in words):
        measured = evaluate(algorithm, source, "test", EPISODES, 2, curve_steps=1)
        found["measured"] = {**measured.arrays, "hash": measured.digest}
    share = None
    first, count = 0, TASKS
    if distributed.size() > 1:
        share = Share.of(TASKS, distributed.rank(), distributed.size())
        first, count = share.first, share.count
    metrics: list[dict[str, Tensor]] = []
    for step in range(UPDATES):
        torch.manual_seed(seeding.key("update", 0, step))
        batch = source.batch("train", step * TASKS + first, count)
        here = algorithm.update(batch, Progress(step, 100, share))
        metrics.append(distributed.mean({n: v.detach().double() for n, v in here.items()}, count))
    found["metrics"] = metrics
    found["state"] = tensors(algorithm.state_dict())
    return found


def tensors(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a nested container, by their path."""
    leaves, _ = pytree.tree_flatten_with_path(state)
    return {
        pytree.keystr(path): leaf.detach().clone()
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }


def main(path: Path, cases: list[str]) -> None:
    place = distributed.place_from_environment()
    distributed.start(place)
    found = {case: outcome(*case.split()) for case in cases}
    if distributed.is_main():
        path.write_bytes(pickle.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
