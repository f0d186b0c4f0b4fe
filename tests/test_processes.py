"""One run that several processes make together."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metarun import config, processes
from metarun.types import Progress, Share
from tests import together
from tests.algorithms.test_contract import classes

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "multitask": ["algo.fit_steps=3"],
    "selector": ["algo.learners=[centroid,knn]", "algo.processes=1"],
    "relation": ["data.image_size=24", "algo.clip_norm=0.01"],
    "metagan_relation": ["data.image_size=24", "algo.clip_norm=0.01"],
    "reptile": ["algo.carry_moments=false"],
    "baseline": ["backbone.norm=none"],
    "baselinepp": ["backbone.norm=instance"],
    "simpleshot": ["backbone.norm=none"],
}
MORE = [
    "mixture sinusoid algo.prior=crp algo.components=3",
    "maml omniglot_small backbone=resnet12 backbone.widths=[2,2,2,2] backbone.drop_rate=0.3 way=3 ~recipe",
]


def data_for(algo: str) -> str:
    kind = classes()[algo]
    images = "classification" in kind.kinds
    if kind.lives_online:
        return "stream_omniglot_small" if images else "stream_linear"
    if algo == "selector":
        return "tables"
    return "omniglot_small" if images else "sinusoid"


def meta_learners() -> list[str]:
    return [a for a, kind in classes().items() if kind.meta_trains]


CASES = [" ".join([a, data_for(a), *OPTIONS.get(a, [])]) for a in meta_learners()] + MORE


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The outcome of every case in one process, and in two."""
    path = tmp_path_factory.mktemp("together") / "two.pt"
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "tests.together", str(path), *CASES]
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment(rank, 2, port)))
            for rank in range(2)
        ]
        for process in started:
            stack.callback(process.kill)
        alone = {case: together.outcome(*case.split()) for case in CASES}
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    return alone, pickle.loads(path.read_bytes())


def furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    gaps = [(one[name] - other[name]).abs().max() for name in one if one[name].numel()]
    return float(torch.stack([gap.double() for gap in gaps]).max())


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(
    case: str, both: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    alone, two = (found[case] for found in both)
    assert furthest(alone["state"], two["state"]) < 1e-10
    for one, other in zip(alone["metrics"], two["metrics"], strict=True):
        assert furthest(one, other) < 1e-10


@pytest.mark.parametrize("case", [c for c in CASES if c.split()[0] in together.EVALUATED])
def test_two_processes_measure_what_one_does(
    case: str, both: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    alone, two = (found[case] for found in both)
    assert two["measured"].keys() == alone["measured"].keys()
    for name, values in alone["measured"].items():
        assert np.array_equal(two["measured"][name], values, equal_nan=True), name


def test_what_is_a_sequence_or_one_mini_batch_is_not_to_be_shared() -> None:
    for algo in ("reptile", "baseline", "simpleshot"):
        assert together.made(algo, "omniglot_small").algorithm.needs_whole_batch is not None
