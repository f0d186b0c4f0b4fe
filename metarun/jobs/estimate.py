"""`--estimate`: how long runs take and what they need, from a few seconds of each.

Nothing is written, and no metric is shown: of meta-val and meta-test only the time is taken.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from metarun.algorithms.capabilities import HasOptions
from metarun.config.build import Experiment, build_experiment
from metarun.core import seeding
from metarun.core.console import duration, main_screen
from metarun.core.files import size_text
from metarun.core.types import Progress
from metarun.evaluation.evaluation import Evaluation
from metarun.evaluation.on_split import meta_test, meta_validation
from metarun.reporting.tables import Table, render
from metarun.training.state import required_bytes

if TYPE_CHECKING:
    from metarun.config.composition import Job

_SECONDS = 2.0
"""Seconds after which a part of a run has been measured."""
_WARM_UP = 2
"""First steps that are not counted: they allocate memory and compile."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        step: Seconds of a step.
        training, validation, test: Seconds of all steps, of all evaluations on meta-val, and of
            the meta-test.
        memory: Largest memory of the process so far, in bytes.
        disk: Upper bound of the space for the run's files, in bytes.
    """

    step: float
    training: float
    validation: float
    test: float
    memory: int
    disk: int

    @property
    def total(self) -> float:
        """Seconds of the run."""
        return self.training + self.validation + self.test


class _EnoughError(Exception):
    """An evaluation has been measured for long enough."""


def print_estimates(jobs: Sequence[Job]) -> int:
    """Measure each run for a few seconds, print a table, and return the exit code."""
    if not jobs:
        print("all runs are finished")
        return 0
    lines, total = [], 0.0
    screen = main_screen()
    with screen.attached(), screen.bar("estimate", len(jobs)) as bar:
        for number, job in enumerate(jobs, 1):
            found = estimate(build_experiment(job.config))
            lines.append(_line(_named(job), found))
            total += found.total
            bar.to(number)
    text = "longer on a busy machine"
    if len(lines) > 1:
        text = f"{duration(total)} in all, one run after the other; {text}"
    print(render("terminal", [Table("", lines, text)]), end="")
    return 0


def estimate(experiment: Experiment) -> Estimate:
    """Measure a few steps of a run and a few units of its evaluations."""
    algorithm, source, settings = experiment.algorithm, experiment.source, experiment.train
    step = _seconds_of_step(experiment) if settings.steps else 0.0
    training, evaluations = step * settings.steps, -(-settings.steps // settings.eval_every) or 1
    if settings.rehearse is not None and training > settings.rehearse:
        training, evaluations = settings.rehearse, 1
    # Each of the options among which meta-val chooses is evaluated.
    options = len(algorithm.options) if isinstance(algorithm, HasOptions) else 1
    val = _seconds_of(meta_validation(algorithm, source, experiment.eval), algorithm.device)
    return Estimate(
        step=step,
        training=training,
        validation=val * evaluations * max(options, 1),
        test=_seconds_of(meta_test(algorithm, source, experiment.eval), algorithm.device),
        memory=_memory(algorithm.device),
        disk=required_bytes(algorithm),
    )


def _seconds_of_step(experiment: Experiment) -> float:
    algorithm, source, settings = experiment.algorithm, experiment.source, experiment.train
    step, began = 0, time.perf_counter()
    while step < settings.steps:
        if step == _WARM_UP:
            began = time.perf_counter()
        seeding.seed_torch(seeding.key("update", experiment.seed, step))
        batch = source.batch("train", step * settings.tasks_per_step, settings.tasks_per_step)
        algorithm.update(batch, Progress(step, settings.steps))
        _wait(algorithm.device)
        step += 1
        if step > _WARM_UP and time.perf_counter() - began > _SECONDS:
            break
    return (time.perf_counter() - began) / max(step - _WARM_UP, 1)


def _seconds_of(evaluation: Evaluation, device: torch.device) -> float:
    """Return the seconds of a whole evaluation, of which a part is made."""
    began, done = time.perf_counter(), 0

    def tick(count: int) -> None:
        nonlocal done
        _wait(device)
        done = count
        if time.perf_counter() - began > _SECONDS:
            raise _EnoughError

    with suppress(_EnoughError):
        evaluation.run(tick)
    return (time.perf_counter() - began) / max(done, 1) * evaluation.size


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def _named(job: Job) -> str:
    names = job.config["names"]
    return str(names.get("experiment") or f"{names['algo']} on {names['data']}")


def _step_text(found: Estimate) -> str:
    if not found.step:
        return "–"
    return duration(found.step) if found.step >= 1.0 else f"{1000.0 * found.step:.3g} ms"


def _line(name: str, found: Estimate) -> dict[str, Any]:
    shown: dict[str, Callable[[Estimate], str]] = {
        "a step": _step_text,
        "training": lambda e: duration(e.training),
        "meta-val": lambda e: duration(e.validation),
        "meta-test": lambda e: duration(e.test),
        "in all": lambda e: duration(e.total),
        "memory": lambda e: size_text(e.memory),
        "disk, at most": lambda e: size_text(e.disk),
    }
    return {"run": name, **{head: text(found) for head, text in shown.items()}}
