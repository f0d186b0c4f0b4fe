"""The typed nodes of a configuration: train, eval, sweep, published; plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
        views: Of each image that an answer on meta-test is averaged over: 1 asks once, more also
            ask about the images slightly turned, moved, stretched and slanted.
        seed: Seed of the val and test episodes, so that every run meets the same ones.
        proficiency: The metric from which on a task of a stream counts as learned; None asks
            for no count of the rows that it takes.
    """

    episodes: int = 600
    val_episodes: int = 200
    val_way: int | None = None
    inner_steps: int | None = None
    curve_steps: int = 10
    tasks_per_batch: int = 25
    views: int = 1
    seed: int = 1
    proficiency: float | None = None


@dataclass
class SweepSettings:
    """How the runs of a sweep depend on each other.

    Attributes:
        fail_fast: Start no further run once one has failed.
    """

    fail_fast: bool = False


@dataclass
class PublishedCell:
    """One printed figure, an accuracy in percent.

    Attributes:
        value: The figure.
        inner_steps: Adaptation steps after which it was taken; None where there is one figure.
        presentation: Of a class at which it was taken, from 1, where a learner answers along a
            sequence; None is the figure of the queries.
        recalled: Whether it is from memory where the others of the experiment were read.
        ci95: Half-width of its 95 % interval over episodes; None where none is printed.
        spread: Half-width of another spread (over seeds or runs), which compares with no
            interval over episodes.
    """

    value: float
    inner_steps: int | None = None
    presentation: int | None = None
    recalled: bool = False
    ci95: float | None = None
    spread: float | None = None


@dataclass
class Published:
    """What a paper reports for an experiment.

    Attributes:
        paper: Who and when, as `Finn et al. 2017`.
        table: Where in the paper.
        row: The method, as the table calls it.
        cells: The figures that one run of the recipe is held against.
        steps: Meta-updates of the recipe: a run of fewer is a rehearsal.
        confidence: `verified` was read in a source, `recalled` is from memory.
        source: Where the figures were read.
    """

    paper: str
    table: str
    row: str
    cells: list[PublishedCell]
    steps: int
    confidence: Literal["verified", "recalled"]
    source: str
