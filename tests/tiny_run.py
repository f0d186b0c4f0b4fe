"""A run of a few seconds that the tests of the trainer share and that can be killed anywhere.

`python -m tests.tiny_run FOLDER SEED` makes the run in FOLDER/whole. It then makes the same run
in FOLDER/killed, kills it by SIGKILL at random lines of the trainer and of the run folder, and
resumes it until it finishes. It prints the number of kills.
"""

from __future__ import annotations

import importlib
import io
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from metarun.algorithms.optimization.maml import MAML
from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.backbones.mlp import MLP
from metarun.core.console import Screen
from metarun.core.settings import EvalSettings, TrainSettings
from metarun.core.types import EpisodeSize, Metrics, Progress, Record, SourceSetup, Split, TaskBatch
from metarun.data.synthetic import Linear
from metarun.runs import checkpoints, records
from metarun.runs import folder as run_folder
from metarun.runs.folder import RunFolder
from metarun.trackers.base import Trackers
from metarun.training import run_state, trainer
from tests.helpers import make

STEPS = 60
RUN_INFO = {"algo": "noisy", "data": "linear", "way": 1, "shot": 4, "query": 6, "seed": 3}


class NoisyMAML(MAML):
    """MAML that draws from torch's global generator, as a user's algorithm may."""

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        query_y = batch.query_y + 0.1 * torch.randn_like(batch.query_y)
        noisy = TaskBatch(batch.support_x, batch.support_y, batch.query_x, query_y)
        return super().update(noisy, progress)


class Watched(Linear):
    """A data set that records its calls and calls a function of the test.

    Attributes:
        asked: Split and index of every batch.
        on_batch: Called with split and index before each batch.
    """

    def __init__(self, on_batch: Callable[[Split, int], None] | None = None) -> None:
        size = EpisodeSize(1, 4, 6)
        super().__init__(
            SourceSetup(
                sizes={"train": size, "val": size, "test": size},
                seed=3,
                eval_seed=1,
                device=torch.device("cpu"),
                dtype=torch.float64,
            )
        )
        self.asked: list[tuple[Split, int]] = []
        self.on_batch = on_batch

    def layout(self, split: Split, index: int) -> Hashable:  # noqa: ARG002
        """Say that tasks differ from step to step, so that each step asks for its own."""
        return "of a step" if split == "train" else None

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        self.asked.append((split, index))
        if self.on_batch is not None:
            self.on_batch(split, index)
        return super().batch(split, index, num_tasks)


def make_algorithm(hidden: int = 6, **options: Any) -> NoisyMAML:
    algorithm: NoisyMAML = make(
        NoisyMAML,
        Watched().spec,
        partial(MLP, hidden=[hidden]),
        optim=partial(OuterOptimizer, method="adam", lr=0.01, schedule="cosine"),
        engine="vmap",
        **{"inner_lr": 0.1, **options},
    )
    return algorithm


def settings(**changes: float) -> TrainSettings:
    # Log lines, evaluations and checkpoints happen at different steps.
    values: dict[str, Any] = {"steps": STEPS, "tasks_per_step": 2, "way": 1, "shot": 4, "query": 6}
    values |= {"log_every": 7, "eval_every": 10, "checkpoint_every": 9, **changes}
    return TrainSettings(**values)


def silent() -> Screen:
    return Screen(Console(file=io.StringIO()))


def folder(path: Path) -> RunFolder:
    if not (path / "status.json").exists():
        # Killed before the folder was complete: start again, as a user would in a new folder.
        shutil.rmtree(path, ignore_errors=True)
        return RunFolder.create(path, "algo: noisy\n")
    return RunFolder.open(path)


def go(
    path: Path,
    source: Watched | None = None,
    algorithm: MAML | None = None,
    screen: Screen | None = None,
    run_info: Record | None = None,
    trackers: Trackers | None = None,
    **changes: float,
) -> Record:
    return trainer.train(
        algorithm or make_algorithm(),
        source or Watched(),
        settings(**changes),
        EvalSettings(episodes=6, val_episodes=4, curve_steps=2, tasks_per_batch=2),
        folder(path),
        run_info or RUN_INFO,
        screen or silent(),
        3,
        trackers,
    )


def same_state(one: Any, other: Any) -> bool:
    """Return whether two nested containers of tensors are equal bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(one == other)


def kill_after(lines: int) -> None:
    """Kill this process by SIGKILL after a number of executed lines of these modules."""
    files = {module.__file__ for module in (run_folder, checkpoints, records, trainer, run_state)}
    left = lines

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def attempt(path: Path, lines: int) -> int:
    """Start or resume the run in a new process, killed after `lines` lines if not 0."""
    process = os.fork()
    if process == 0:
        if lines:
            kill_after(lines)
        go(path)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(root: Path, seed: int) -> None:
    # torch imports it late, which would cost every forked process a second.
    importlib.import_module("torch._dynamo")
    assert attempt(root / "whole", 0) == 0
    draw = random.Random(seed)
    kills = 0
    # The possible number of lines grows with the kills, so that the run finishes eventually.
    while (code := attempt(root / "killed", draw.randrange(1, 600 + 250 * kills))) != 0:
        assert code == -signal.SIGKILL, code
        kills += 1
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
