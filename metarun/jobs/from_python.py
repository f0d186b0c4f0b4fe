"""Runs and tasks from Python: `metarun.run` and `metarun.episodes`.

Shapes: N lines of a log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarun.config.build import build_source
from metarun.config.composition import Job, composer
from metarun.config.initialization import with_path_of_init
from metarun.config.naming import QUICK_START, root_of
from metarun.core.console import Screen, silent_screen
from metarun.core.results import Results
from metarun.core.statistics import Floats, curve
from metarun.core.types import Split, TaskBatch
from metarun.jobs.checks import check_data, check_jobs
from metarun.jobs.train import train
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    from metarun.inference.learner import Learner


class TrainedRun:
    """A run in its folder: results, metrics, report and learner.

    Attributes:
        path: Folder of the run.
    """

    def __init__(self, path: str | Path, config_dir: str | None = None) -> None:
        self._folder = RunFolder.open(path)
        self._config_dir = config_dir
        self.path = self._folder.path

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.path)!r})"

    @cached_property
    def results(self) -> Results:
        """The content of `results.json`, such as `results["test"]["mean"]`."""
        return self._folder.read_results()

    @cached_property
    def metrics(self) -> dict[str, tuple[Floats, Floats]]:
        """Steps (N,) and values (N,) of each metric of the log, such as `val/accuracy`."""
        lines = self._folder.read_lines("metrics.jsonl")
        names = dict.fromkeys(name for line in lines for name in line if name != "step")
        return {name: curve(lines, name) for name in names}

    def report(self) -> Path:
        """Write `report.html` into the folder of the run and return its path.

        Raises:
            ValueError: A file of that name is not a page of metarun.
        """
        from metarun.reporting.published import read_runs
        from metarun.reporting.writing import write_page

        return write_page(list(read_runs([self.path])), self.path, self._config_dir)

    def learner(self, **options: Any) -> Learner:
        """Return the trained learner; the options are those of `metarun.load`."""
        from metarun.inference.learner import load

        return load(self.path, **options)


def run(*words: str, config_dir: str | None = None, quiet: bool = False) -> TrainedRun:
    """Train, validate and test a run as `metarun WORD…` does.

    Args:
        *words: Overrides, such as `algo=maml` and `data=sinusoid`; none is the quick start.
            `hydra.run.dir=FOLDER` sets the folder of the run.
        config_dir: Folder of your own YAML files.
        quiet: Whether to show no progress.

    Returns:
        The finished run.

    Raises:
        ValueError: The words are no valid request for one run; no file has been written.
        RunError: The run stopped: a value is not finite, the disk or the memory is full, or the
            time of `train.max_minutes` is over.
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; the run is saved.
    """
    job = _job(words or (f"experiment={QUICK_START}",), config_dir)
    check_jobs([job])
    # As in the command, where Hydra's own options are no part of a run.
    own = [word for word in job.overrides if root_of(word) != "hydra"]
    train(job.config, job.folder, own, silent_screen() if quiet else Screen(), config_dir)
    return TrainedRun(job.folder, config_dir)


def episodes(
    *words: str,
    split: Split = "train",
    num_tasks: int = 1,
    start: int = 0,
    config_dir: str | None = None,
) -> Iterator[TaskBatch]:
    """Return an endless iterator over the tasks of a run with these words, in their order.

    Args:
        *words: Overrides, such as `data=omniglot_small`, `way=5` and `seed=1`. The recipe of the
            algorithm applies, which is `algo=maml` unless another is named.
        split: `train`, `val` or `test`.
        num_tasks: Number of tasks T in each batch. Where sizes vary, training tasks of a batch
            share one, and tasks of `val` and `test` come one by one.
        start: Index of the first task.
        config_dir: Folder of your own YAML files.

    Returns:
        Batches of tasks: `support_x` (T, S, *input_shape), `support_y` (T, S), and queries alike.

    Raises:
        ValueError: A word is invalid, a number is out of range, or the data are missing.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split={split!r}: expected 'train', 'val' or 'test'")
    if num_tasks < 1 or start < 0:
        raise ValueError(f"num_tasks={num_tasks}, start={start}: expected 1 or more, 0 or more")
    config = _job(words, config_dir).config
    check_data(config)
    # Training tasks of one batch share what a step draws: their size, and the source of a mixture.
    config["train"]["tasks_per_step"] = num_tasks
    source = build_source(config)

    def batches() -> Iterator[TaskBatch]:
        first = start
        while True:
            yield source.batch(split, first, num_tasks)
            first += num_tasks

    return batches()


def _job(words: Sequence[str], config_dir: str | None) -> Job:
    """Compose one run.

    Raises:
        ValueError: A word is invalid, or asks for something else than one run.
    """
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f"{word!r} is no text: give words such as 'algo=maml' one by one")
    for word in words:
        if word.partition("=")[0] in ("resume", "test"):
            raise ValueError(
                f"{word}: a stored run is used by metarun.load, or on the command line"
            )
    words = with_path_of_init(words)
    with composer(config_dir) as compose:
        if compose.is_sweep(words, multirun=False):
            raise ValueError("a sweep has several runs: start it on the command line")
        return compose.job(words)
