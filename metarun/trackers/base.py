"""Experiment trackers: what they are told of a run, and why none of them can stop one.

A tracker mirrors a run's folder. When a run begins or goes on, a back end says what it holds
already, and `Trackers` hands it whatever else stands in `metrics.jsonl` and `timing.jsonl`: so a
kill loses nothing, a line that was cut back is not there twice, and a tracker that is added when
a run is resumed has the run's past.
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
from metarun.runs.folder import RunFolder

State = Literal["finished", "failed", "interrupted"]
Values = Mapping[str, float]
Line = tuple[int, dict[str, float]]
"""A step and its metrics."""

RATE = "timing/tasks_per_second"
_FILE = "trackers.json"
_PASSWORD = re.compile(r"(?<=//)[^/@\s]+@")
"""And a name before it, in an address."""
_LONGEST = 200
"""Characters of an error that are shown."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a tracker is told when a run begins or goes on.

    Attributes:
        id: Of the run in every back end, the same after any number of resumes.
        folder: The run's.
        config: Its resolved configuration.
        run_info: What the records say of it: names, sizes, seed, device …
        metric: The figure of meta-test, as `test/accuracy`.
        step: From where it goes on.
        lines: What stands in its folder.
        notes: The tracker's own when the run began; None if it was not there.
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
    """One back end. Making it only checks its options; `begin` opens it.

    Attributes:
        notes: What it wants to find again when the run is resumed: no secrets, plain JSON.
    """

    notes: Mapping[str, Any]

    @abstractmethod
    def begin(self, start: Start) -> Mapping[str, int]:
        """Open the run, or the same one again.

        Returns:
            The last step of each metric that the back end holds.
        """

    @abstractmethod
    def metrics(self, step: int, values: Values) -> None:
        """Add metrics, not all of which need be finite; on the disk before it returns."""

    @abstractmethod
    def figures(self, step: int, paths: Sequence[Path]) -> None:
        """Add the run's figures."""

    @abstractmethod
    def finish(self, step: int, values: Values, results: Mapping[str, Any]) -> None:
        """Add the final figures by their names, and the whole of `results.json`.

        Args:
            step: Of the end.
            values: Those figures that the back end does not hold for this step.
            results: The content of the file.
        """

    @abstractmethod
    def close(self, state: State) -> None:
        """Say how the run ended, for now."""


class Trackers:
    """Tells every tracker what happens; one that fails is left alone from then on.

    Args:
        trackers: By the words they were asked for with.
        config: The run's resolved configuration.
        run_info: What the records say of the run.
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
        self._run: RunFolder | None = None

    @property
    def alive(self) -> bool:
        """Whether there is anyone to tell."""
        return bool(self._alive)

    def begin(self, run: RunFolder, step: int, metric: str) -> None:
        """Open every tracker and hand it what stands in the folder and it does not hold."""
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
        """Hand on a line of metrics."""
        self._each(lambda name, tracker: self._send(name, tracker, step, values))

    def finish(self, results: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Hand on what a run came to and its figures."""
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
        """Tell every tracker how the run ended."""
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
        """What a back end does not hold: a step that was cut back and made again is the same."""
        held = self._held[name]
        return {key: value for key, value in values.items() if held.get(key, -1) < step}

    def _each(self, act: Callable[[str, Tracker], None]) -> None:
        """Do something that may fail in any way, which costs the tracker and not the run."""
        for name, tracker in list(self._alive.items()):
            try:
                act(name, tracker)
            # SystemExit is how a library may give up.
            except (Exception, SystemExit) as error:
                self._leave([name], error)

    def _leave(self, names: Sequence[str], error: BaseException) -> None:
        for name in names:
            del self._alive[name]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        what = _PASSWORD.sub("", what)
        what = what if len(what) <= _LONGEST else f"{what[:_LONGEST]}…"
        _log.warning(
            "logger=%s has failed and is left alone, the run goes on: %s", ",".join(names), what
        )


def require(word: str, *packages: str) -> None:
    """Check that packages are there, without importing them.

    Raises:
        ValueError: One is not.
    """
    for package in packages:
        spec = find_spec(package)
        # A folder of the same name in the current folder has no origin.
        if spec is None or spec.origin is None:
            raise ValueError(f"logger={word} needs {package}: pip install 'metarun[{word}]'")


def final(results: Mapping[str, Any]) -> dict[str, float]:
    """The figures of `results.json` by the names that trackers show.

    `test/<metric>` and whatever else was measured there, each with its `_ci95`; the stream's
    figures; `best/…`, the evaluation on meta-val that chose the parameters; and `run/…`.
    """
    metric = results["metric"]
    intervals: dict[str, Any] = {f"test/{metric}": results["test"]}
    if results.get("val"):
        intervals[f"best/val_{metric}"] = results["val"]
    for key, value in results.items():
        if key not in ("test", "val") and isinstance(value, Mapping) and "mean" in value:
            intervals[f"test/{key}"] = value
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
    """Those that are made of pixels."""
    return [path for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg")]


def _identity(run: RunFolder) -> dict[str, Any]:
    """The run's name in the back ends, on the disk before any of them has seen it."""
    if not run.has(_FILE):
        run.write_json(_FILE, {"id": secrets.token_hex(4), "trackers": {}})
    return run.read_json(_FILE)


def _written(run: RunFolder) -> Iterator[Line]:
    """The lines of a run's folder, in their order; what is not finite is not a number."""
    rates = {line["step"]: line["tasks_per_second"] for line in run.read_lines("timing.jsonl")}
    for line in run.read_lines("metrics.jsonl"):
        step = line.pop("step")
        if any(name.startswith("train/") for name in line) and step in rates:
            line[RATE] = rates[step]
        yield step, {name: math.nan if v is None else float(v) for name, v in line.items()}


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """Keep the trackers' libraries from our screen: what they are warned of, and their logs.

    MLflow's alembic gives the root logger a handler, which would say every line again.
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
