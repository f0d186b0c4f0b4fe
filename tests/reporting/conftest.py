"""Runs of a few seconds each, as input of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from metarun.cli.main import main

TINY = [
    "train.log_every=2", "train.eval_every=2", "train.tasks_per_step=2", "eval.episodes=12",
    "eval.val_episodes=4", "eval.tasks_per_batch=6", "device=cpu", "threads=1",
]  # fmt: skip
IMAGES = ["data=omniglot_small", "backbone.filters=4", "way=3", "query=5", "train.query=2"]

RUNS = {
    "maml": ["algo=maml", "data=sinusoid", "train.steps=6", *TINY],
    "characters": ["algo=maml", *IMAGES, "train.steps=4", *TINY],
    "protonet": ["algo=protonet", *IMAGES, "train.way=3", "train.steps=4", *TINY],
    "cell": ["experiment=finn2017_sinusoid_5shot", "train.steps=4", *TINY],
    "anp": ["algo=anp", "data=gp", "train.steps=4", *TINY],
    "cavia": ["algo=cavia", "data=sinusoid", "train.steps=4", *TINY],
    "mixture": [
        "algo=mixture", "data=multimodal", "data.families=[sinusoid,line]", "algo.components=2",
        "backbone.hidden=[8]", "train.steps=4", *TINY,
    ],
    "snail": ["algo=snail", *IMAGES, "shot=3", "query=1", "train.steps=2", *TINY],
    "metagan": [
        "algo=metagan_relation", *IMAGES, "algo.filters=2", "train.query=1", "train.steps=2", *TINY,
    ],
    "stream": [
        "algo=online", "data=stream_linear", "data.tasks=3", "shot=4", *TINY, "eval.episodes=3",
    ],
    "selector": [
        "algo=selector", "data=tables", "train.steps=2", *TINY, "algo.processes=1",
    ],
    "nearest": ["algo=nearest", "data=sinusoid", *TINY],
}  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which `made` creates each run once for all tests."""
    return tmp_path_factory.mktemp("reports")


def made(runs: Path, name: str) -> Path:
    """Return the folder of one of `RUNS`, and run it at the first call."""
    folder = runs / name
    if not folder.exists():
        assert main([*RUNS[name], f"hydra.run.dir={folder}"]) == 0
    return folder


def swept(runs: Path) -> Path:
    """Return the folder of a sweep over two algorithms, two rates and two seeds."""
    folder = runs / "sweep"
    if not folder.exists():
        words = ["-m", "algo=maml,reptile", "algo.inner_lr=0.01,0.02", "seed=0,1"]
        words += ["data=sinusoid", "train.steps=4", *TINY, f"hydra.sweep.dir={folder}"]
        assert main(words) == 0
    return folder
