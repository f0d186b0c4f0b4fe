"""Access to the files of a run for its report; missing files are read as empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from metarun.core.archives import read_arrays
from metarun.core.results import Results
from metarun.core.sizes import most, size_text
from metarun.core.statistics import Floats, curve
from metarun.core.types import Record
from metarun.reporting.figures.drawing import colors
from metarun.runs.folder import EPISODES, RunFolder


@dataclass(frozen=True)
class RunFiles:
    """The files of one finished or unfinished run.

    Attributes:
        path: Folder of the run.
        config: Resolved configuration.
        words: Command-line overrides.
        status: Contents of `status.json`.
        color: Color of the run's algorithm in all figures of a report.
    """

    path: Path
    config: Mapping[str, Any]
    words: Sequence[str]
    status: Mapping[str, Any]
    color: str

    @classmethod
    def read(cls, path: Path) -> RunFiles:
        """Open the folder of a run.

        Raises:
            ValueError: The folder is not a run, or is damaged.
        """
        run = RunFolder.open(path)
        config = run.configuration()
        algo = str(config["names"]["algo"])
        return cls(path, config, run.overrides(), run.status(), colors([algo])[algo][0])

    @classmethod
    def of_test(cls, path: Path) -> RunFiles:
        """Open a folder with `results.json`, of a run or of a later meta-test."""
        results = RunFolder(path).read_results()
        algo = str(results["algo"])
        config = {
            "names": {"algo": algo, "data": results["data"]},
            **{key: results[key] for key in ("way", "shot", "seed")},
            "sizes": results.get("sizes"),
        }
        return cls(path, config, (), {"state": "finished"}, colors([algo])[algo][0])

    @cached_property
    def results(self) -> Results | None:
        """Contents of `results.json`; None if it is missing."""
        run = RunFolder(self.path)
        return run.read_results() if run.has("results.json") else None

    @cached_property
    def environment(self) -> Record:
        """Contents of `environment.json`; empty if it is missing."""
        return RunFolder(self.path).environment()

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """The arrays of `episodes.npz`; empty if it is missing."""
        run = RunFolder(self.path)
        return run.read_episodes() if run.has(EPISODES) else {}

    @cached_property
    def samples(self) -> dict[str, Any]:
        """The arrays of `samples.npz`; empty if nothing was generated."""
        path = self.path / "samples.npz"
        return read_arrays(path) if path.exists() else {}

    @cached_property
    def metrics(self) -> list[Record]:
        """The lines of `metrics.jsonl`, except one that is still being written."""
        return RunFolder(self.path).read_lines("metrics.jsonl")

    def curve(self, name: str) -> tuple[Floats, Floats]:
        """Return the steps and values of a training or meta-val metric; null values are NaN."""
        return curve(self.metrics, name)

    @property
    def algo(self) -> str:
        """The value of `algo`."""
        return str(self.config["names"]["algo"])

    @property
    def title(self) -> str:
        """One line that names the experiment, algorithm, data, task and seed."""
        results, config = self.results, self.config
        size = f"{config['shot']} points"
        if results is not None and "layout" in results:
            size = f"{max(results['layout']['visits']) + 1} tasks"
        elif (results and results.get("kind") == "classification") or most(config["way"]) > 1:
            size = size_text(config)
        experiment = config["names"].get("experiment")
        named = f"{experiment}: " if experiment else ""
        return f"{named}{self.algo} on {config['names']['data']}, {size}, seed {config['seed']}"

    @property
    def metric(self) -> str | None:
        """The name of the run's metric; None if nothing was measured yet."""
        if self.results is not None:
            return str(self.results["metric"])
        names = {name for line in self.metrics for name in line}
        found = [m for m in ("accuracy", "mse") if {f"train/{m}", f"val/{m}"} & names]
        return found[0] if found else None
