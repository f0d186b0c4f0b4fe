"""Interface of experiment trackers, and their connection to a run.

A tracker mirrors the folder of a run. When a run starts or resumes, each back end reports the steps
that it holds. `Trackers` then sends the missing lines of `metrics.jsonl` and `timing.jsonl`. So
a kill loses no line, no step appears twice after a resume, and a tracker that is added at a resume
gets all earlier lines. A failing tracker is dropped and never stops a run.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from metarun.core.errors import Interrupted
from metarun.runs.folder import Run

State = Literal["finished", "failed", "interrupted"]
Values = Mapping[str, float]
Line = tuple[int, dict[str, float]]
"""Step and its metrics."""

RATE = "timing/tasks_per_second"
_FILE = "trackers.json"
_PASSWORD = re.compile(r"(?<=//)[^/@\s]+@")
"""User name and password in a URL."""
_LONGEST = 200
"""Number of characters of an error that are shown."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Information for a tracker when a run starts or resumes.

    Attributes:
        id: Identifier of the run in every back end, the same after every resume.
        folder: Folder of the run.
        config: Resolved configuration of the run.
        run_info: Description of the run in its records: names, sizes, seed, device …
        metric: Name of the metric of meta-test, such as `test/accuracy`.
        step: Step from which the run starts or resumes.
        lines: Metrics in the run's folder.
        notes: Notes that the tracker saved earlier; None if it is new to the run.
    """

    id: str
    folder: Path
    config: Mapping[str, Any]
    run_info: Mapping[str, Any]
    metric: str
    step: int
    lines: Sequence[Line]
    notes: Mapping[str, Any] | None


class Tracker(ABC):
    """Back end of experiment tracking. The constructor only checks options; `begin` opens it.

    Attributes:
        notes: JSON values that the tracker needs at a resume; they must not contain secrets.
    """

    notes: Mapping[str, Any]

    @abstractmethod
    def begin(self, start: Start) -> Mapping[str, int]:
        """Open the run in the back end; after a resume, the same run.

        Returns:
            Last step of each metric that the back end holds.
        """

    @abstractmethod
    def metrics(self, step: int, values: Values) -> None:
        """Add metrics, which may be not finite; they are on the disk when the method returns."""

    @abstractmethod
    def figures(self, step: int, paths: Sequence[Path]) -> None:
        """Add the figures of the run."""

    @abstractmethod
    def finish(self, step: int, values: Values, results: Mapping[str, Any]) -> None:
        """Add the final results.

        Args:
            step: Last step of the run.
            values: Final values by name, without those that the back end holds for this step.
            results: Content of `results.json`.
        """

    @abstractmethod
    def close(self, state: State) -> None:
        """Set the state of the run, which may be resumed later, and close the back end."""


class Trackers:
    """All trackers of a run. A tracker that fails is not used again.

    Args:
        trackers: Trackers by their names in `logger=`.
        config: Resolved configuration of the run.
        run_info: Description of the run in its records.
    """

    def __init__(
        self,
        trackers: Mapping[str, Tracker] | None = None,
        config: Mapping[str, Any] | None = None,
        run_info: Mapping[str, Any] | None = None,
    ) -> None:
        self._alive = dict(trackers or {})
        self._config = dict(config or {})
        self._run_info = dict(run_info or {})
        self._held: dict[str, Mapping[str, int]] = {}
        self._run: Run | None = None

    @property
    def alive(self) -> bool:
        """Whether any tracker is in use."""
        return bool(self._alive)

    def begin(self, run: Run, step: int, metric: str) -> None:
        """Open every tracker and send it the lines of the run's folder that it does not hold."""
        if not self._alive:
            return
        try:
            record, lines = _identity(run), list(_written(run))
        except (OSError, ValueError, KeyError) as error:
            self._leave(list(self._alive), error)
            return

        def catch_up(name: str, tracker: Tracker) -> None:
            start = Start(
                id=record["id"],
                folder=run.path,
                config=self._config,
                run_info=self._run_info,
                metric=f"test/{metric}",
                step=step,
                lines=lines,
                notes=record["trackers"].get(name),
            )
            self._held[name] = tracker.begin(start)
            record["trackers"][name] = dict(tracker.notes)
            run.write_json(_FILE, record)
            for at, values in lines:
                self._send(name, tracker, at, values)

        self._run = run
        with _libraries_quiet():
            self._each(catch_up)

    def metrics(self, step: int, values: Values) -> None:
        """Send a line of metrics to every tracker."""
        self._each(lambda name, tracker: self._send(name, tracker, step, values))

    def finish(self, results: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Send the results and the figures of a run to every tracker."""
        if self._run is None:
            return
        step, values = int(results["steps"]), final(results)

        def finish(name: str, tracker: Tracker) -> None:
            tracker.figures(step, figures)
            tracker.finish(step, self._missing(name, step, values), results)

        with self._run.logging(), _libraries_quiet():
            self._each(finish)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close every tracker at the end of the context, with the state of the run."""
        state: State = "failed"
        try:
            yield
            state = "finished"
        except (Interrupted, KeyboardInterrupt):
            state = "interrupted"
            raise
        finally:
            if self._run is not None:
                with self._run.logging(), _libraries_quiet():
                    self._each(lambda _, tracker: tracker.close(state))

    def _send(self, name: str, tracker: Tracker, step: int, values: Values) -> None:
        missing = self._missing(name, step, values)
        if missing:
            tracker.metrics(step, missing)

    def _missing(self, name: str, step: int, values: Values) -> Values:
        """Return the values that a back end lacks; repeated steps after a resume are equal."""
        held = self._held[name]
        return {key: value for key, value in values.items() if held.get(key, -1) < step}

    def _each(self, act: Callable[[str, Tracker], None]) -> None:
        """Call a function for every tracker; any failure drops the tracker, not the run."""
        for name, tracker in list(self._alive.items()):
            try:
                act(name, tracker)
            # Some libraries raise SystemExit when they give up.
            except (Exception, SystemExit) as error:
                self._leave([name], error)

    def _leave(self, names: Sequence[str], error: BaseException) -> None:
        for name in names:
            del self._alive[name]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        what = _PASSWORD.sub("", what)
        what = what if len(what) <= _LONGEST else f"{what[:_LONGEST]}…"
        _log.warning(
            "logger=%s has failed and is dropped, the run continues: %s", ",".join(names), what
        )


def require(word: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        word: Name of the tracker in `logger=` and of the extra that installs the packages.
        packages: Names of the packages.

    Raises:
        ValueError: A package is not installed.
    """
    for package in packages:
        spec = find_spec(package)
        # A folder with the package's name in the current folder has no origin.
        if spec is None or spec.origin is None:
            raise ValueError(f"logger={word} needs {package}: pip install 'metarun[{word}]'")


def final(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of `results.json` by the names that trackers show.

    These are `test/<metric>` and the other test measures, each with its `_ci95`; the measures
    `stream/…` of a stream; `best/…`, the evaluation on meta-val that chose the parameters; and
    `run/…`.
    """
    metric = results["metric"]
    intervals: dict[str, Any] = {f"test/{metric}": results["test"]}
    if results.get("val"):
        intervals[f"best/val_{metric}"] = results["val"]
    for key, value in results.items():
        if key not in ("test", "val") and isinstance(value, Mapping) and "mean" in value:
            intervals[f"test/{key}"] = value
    intervals |= {f"test/{key}": value for key, value in results.get("measures", {}).items()}
    intervals |= {f"stream/{key}": value for key, value in results.get("stream", {}).items()}
    found: dict[str, float] = {}
    for name, value in intervals.items():
        found |= {name: value["mean"], f"{name}_ci95": value["ci95"]}
    if results.get("val"):
        found["best/step"] = results["val"]["step"]
    for key in ("parameters", "train_seconds", "seconds", "tasks_per_second"):
        if key in results:
            found[f"run/{key}"] = results[key]
    return {name: float(value) for name, value in found.items() if value is not None}


def pictures(paths: Sequence[Path]) -> list[Path]:
    """Return the paths of raster images."""
    return [path for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg")]


def _identity(run: Run) -> dict[str, Any]:
    """Return the record of the run's id; a new id is on the disk before a back end uses it."""
    if not run.has(_FILE):
        run.write_json(_FILE, {"id": secrets.token_hex(4), "trackers": {}})
    return run.read_json(_FILE)


def _written(run: Run) -> Iterator[Line]:
    """Yield the lines of metrics in a run's folder, in order; values that were null are NaN."""
    rates = {line["step"]: line.get("tasks_per_second") for line in run.read_lines("timing.jsonl")}
    for line in run.read_lines("metrics.jsonl"):
        step = line.pop("step")
        if any(name.startswith("train/") for name in line) and step in rates:
            line[RATE] = rates[step]
        yield step, {name: math.nan if v is None else float(v) for name, v in line.items()}


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """Suppress warnings of the trackers' libraries, and restore the root logger afterwards.

    MLflow's alembic adds a handler to the root logger, which would print every line twice.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
