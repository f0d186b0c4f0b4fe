"""The typed root of a configuration: plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from metarun.core.settings import EvalSettings, Published, SweepSettings, TrainSettings
from metarun.core.sizes import Count, SizeRule

Config = dict[str, Any]

NODES = ("algo", "data", "backbone", "optim")
"""The nodes that name a class and its options."""


SEVERAL = ("logger",)
"""Groups that accept a list: a run may have several choices or none."""


@dataclass(frozen=True)
class Settings:
    """The typed root of a configuration.

    Attributes:
        algo, data, backbone, optim: `_target_` and options of a component.
        way, shot, query: Size of a task at evaluation; a range where it varies.
        sizes: Rule that draws the size of each episode; None takes way, shot and query.
        seed: Seed of the initial parameters, the training tasks and all other random draws.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: Precision of parameters and data; `mixed` is float32 with networks that
            compute in bfloat16.
        bn: Source of batch-norm statistics at evaluation.
        engine, tasks_per_chunk, threads, graph: How the tasks of a batch are executed.
        train, eval: See `TrainSettings` and `EvalSettings`.
        init: A run or a file of weights from which the encoder starts; None starts at random.
        init_strict: Whether all weights of the encoder have to fit.
        names: Chosen names of `algo`, `data` and `backbone`, for the records.
        debug: Whether to show the traceback of an error.
        sweep: See `SweepSettings`.
        published: Results that a paper reports for these settings.
        logger: `_target_` and options of each tracker, by its name.
        resume, test: Always None, since they name another run and are handled before.
    """

    algo: Config
    data: Config
    backbone: Config
    optim: Config
    way: Count
    shot: Count
    query: Count
    seed: int
    device: str
    precision: Literal["float32", "float64", "mixed"]
    bn: Literal["transductive", "support", "running"]
    engine: Literal["auto", "vmap", "loop", "threads"]
    tasks_per_chunk: int | None
    threads: int | None
    graph: Literal["auto", "none", "replay", "compile"]
    train: TrainSettings
    eval: EvalSettings
    names: dict[str, str]
    sizes: SizeRule | None = None
    init: str | None = None
    init_strict: bool = True
    debug: bool = False
    sweep: SweepSettings | None = None
    published: Published | None = None
    logger: Config | None = None
    resume: str | None = None
    test: str | None = None
