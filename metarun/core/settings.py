"""Typed nodes of the configuration: train, eval, sweep, published. Plain data, without torch.

`Reference` is in the files of experiments too, but belongs to no configuration of a run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from metarun.core.sizes import Count, SizeRule


@dataclass
class TrainSettings:
    """Settings of meta-training.

    Attributes:
        steps: Number of meta-updates.
        tasks_per_step: Number of tasks in one meta-update (the meta-batch size).
        way, shot, query: Size of a training task; by default that of an evaluation task.
        sizes: Rule that draws the size of each step's tasks; None takes way, shot and query.
        log_every: Number of updates between two lines of metrics.
        eval_every: Number of updates between two evaluations on meta-val.
        checkpoint_every: Number of updates between two checkpoints.
        patience: Number of evaluations on meta-val without a better one after which training
            ends; None trains all steps.
        rehearse: Seconds of training after which it ends and is tested; None trains all steps.
        max_minutes: Minutes of training in one process after which the run is saved and stops.
    """

    steps: int = 10000
    tasks_per_step: int = 4
    way: Count = 5
    shot: Count = 1
    query: Count = 15
    sizes: SizeRule | None = None
    log_every: int = 100
    eval_every: int = 1000
    checkpoint_every: int = 1000
    patience: int | None = None
    rehearse: float | None = None
    max_minutes: float | None = None


@dataclass
class EvalSettings:
    """Settings of meta-validation and meta-test.

    Attributes:
        episodes: Number of test episodes.
        val_episodes: Number of episodes of one evaluation on meta-val.
        val_way: Number of ways on meta-val; None takes the smaller of `way` and the number of
            classes of meta-val.
        inner_steps: Number of adaptation steps at evaluation; None takes that of training.
        curve_steps: Length of the adaptation curve, which reports the metric after 0 to this
            many steps.
        tasks_per_batch: Number of episodes evaluated together.
        views: Number of views of each image over which a prediction on meta-test is averaged.
            1 is the image alone; the further views are slightly rotated, shifted, scaled and
            sheared.
        seed: Seed of the val and test episodes, so that all runs are evaluated on the same ones.
        proficiency: Value of the metric from which on a task of a stream counts as learned. None
            omits the number of rows needed to reach it.
        temperature: `val` divides the logits of a classifier by the temperature that minimizes
            the negative log-likelihood on meta-val; `none` leaves them as they are.
        measures: Dotted names of further measures of the meta-test.
    """

    episodes: int = 600
    val_episodes: int = 200
    val_way: Count | None = None
    inner_steps: int | None = None
    curve_steps: int = 10
    tasks_per_batch: int = 25
    views: int = 1
    seed: int = 1
    proficiency: float | None = None
    temperature: Literal["none", "val"] = "none"
    measures: tuple[str, ...] = ()


@dataclass
class SweepSettings:
    """Settings of a sweep.

    Attributes:
        fail_fast: Whether the first failed run ends the sweep.
        name: Name by which `table` and `report` find its runs; None is the date and the keys that
            vary.
    """

    fail_fast: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        """Check the name, which becomes that of a file.

        Raises:
            ValueError: It has other characters.
        """
        fits = self.name is None or re.fullmatch(r"\w[\w.=+-]{0,99}", self.name)
        # `last` stands for the last run.
        if not fits or self.name == "last":
            raise ValueError(
                f"sweep.name={self.name}: expected letters, digits and . _ = + -, but not last, "
                "such as sweep.name=rates"
            )


@dataclass
class PublishedCell:
    """One published value; an accuracy is in percent.

    Attributes:
        value: Published value.
        inner_steps: Number of adaptation steps at which it was measured; None if the paper prints
            one value only.
        presentation: Presentation of a class (from 1) at which it was measured, for a learner
            that predicts along a sequence. None means the value of the query rows.
        unverified: Whether this value was recalled and not yet verified in the paper, while the
            experiment's others were.
        ci95: Half-width of its 95 % interval over episodes; None if none is printed.
        spread: Half-width of another spread (over seeds or runs), which is not comparable with
            an interval over episodes.
    """

    value: float
    inner_steps: int | None = None
    presentation: int | None = None
    unverified: bool = False
    ci95: float | None = None
    spread: float | None = None


@dataclass
class Published:
    """Published results of an experiment.

    Attributes:
        paper: Authors and year, such as `Finn et al. 2017`.
        table: Table or section of the paper.
        row: Name of the method in that table.
        cells: Values with which one run of the recipe is compared.
        steps: Number of meta-updates of the recipe. A run with fewer is a rehearsal.
        confidence: `verified` for values read in a source, `unverified` for values recalled and
            not yet verified.
        source: Document in which the values were read.
    """

    paper: str
    table: str
    row: str
    cells: list[PublishedCell]
    steps: int
    confidence: Literal["verified", "unverified"]
    source: str


Outcome = Literal["reproduced", "above", "below", "reached", "partial"]
"""How a measured value compares with a published one, see `reporting.references.outcome_of`."""


@dataclass
class ReferenceCell:
    """Our value for one published cell; an accuracy is in percent.

    Attributes:
        value: Mean over test episodes, which are averaged over the seeds first.
        ci95: Half-width of the 95 % interval over episodes.
        outcome: How it compares with the published value.
        over_seeds: Half-width of the 95 % interval over seeds; None for a single seed.
    """

    value: float
    ci95: float
    outcome: Outcome
    over_seeds: float | None = None


@dataclass
class Reference:
    """What we measured for an experiment.

    Attributes:
        cells: One for each cell of `published`, in the same order.
        episodes: Number of test episodes.
        seeds: Seeds of the runs.
        steps: Number of meta-updates made, out of `published.steps`.
        command: Command that repeats the runs.
        minutes: Mean time of a run; None if it was not recorded.
        processor: Processor, and number of threads; None if it was not recorded.
        version: Version and commit of metarun; None if it was not recorded.
        trained_as: Experiment whose runs were meta-tested in the setting of this one; None for
            runs of its own.
        note: What was looked into where the value is not reproduced, or other replications.
    """

    cells: list[ReferenceCell]
    episodes: int
    seeds: list[int]
    steps: int
    command: str
    minutes: float | None = None
    processor: str | None = None
    version: str | None = None
    trained_as: str | None = None
    note: str | None = None
