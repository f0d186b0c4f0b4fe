"""The typed nodes `train` and `eval` of a configuration; plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainSettings:
    """Meta-training.

    Attributes:
        steps: Number of meta-updates.
        tasks_per_step: Tasks in one meta-update (the meta-batch).
        way, shot, query: Size of a training task; the evaluation's unless set.
        log_every: Updates between two lines of metrics.
        eval_every: Updates between two evaluations on meta-val.
        checkpoint_every: Updates between two checkpoints.
    """

    steps: int = 10000
    tasks_per_step: int = 4
    way: int = 5
    shot: int = 1
    query: int = 15
    log_every: int = 100
    eval_every: int = 1000
    checkpoint_every: int = 1000


@dataclass
class EvalSettings:
    """Meta-validation and meta-test.

    Attributes:
        episodes: Test episodes.
        val_episodes: Episodes of one evaluation on meta-val.
        val_way: Ways on meta-val; None takes the smaller of way and the classes there.
        inner_steps: Adaptation steps at evaluation; None takes the training's.
        curve_steps: The adaptation curve reports the metric after 0 … this many steps.
        tasks_per_batch: Episodes that are evaluated together.
        seed: Seed of the val and test episodes, so that every run meets the same ones.
    """

    episodes: int = 600
    val_episodes: int = 200
    val_way: int | None = None
    inner_steps: int | None = None
    curve_steps: int = 10
    tasks_per_batch: int = 25
    seed: int = 1
