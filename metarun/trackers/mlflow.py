"""Tracker for MLflow, with SQLite in the run's folder or any other tracking store."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metarun.core.files import inner_folder, open_inside, refuse_link
from metarun.core.nested import flat
from metarun.trackers.base import Start, State, Tracker, Values, require

try:
    import fcntl
except ImportError:  # not available on Windows
    fcntl = None  # type: ignore[assignment]

_SQLITE = "sqlite:///"
_FROM_ENVIRONMENT = "env"
_TAG = "metarun.id"
_MOST_AT_ONCE = 100
"""Largest number of parameters that MLflow accepts in one call."""

_STATES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MLflow(Tracker):
    """Run of MLflow, which a resume finds by a tag.

    Args:
        uri: URI of the tracking store: `sqlite:///PATH`, `http://…` or any other that MLflow
            accepts. `env` reads MLFLOW_TRACKING_URI. None is a database in the run's folder.
        experiment: Name of the MLflow experiment.

    Raises:
        ValueError: MLflow is not installed, the URI contains a user name or password, or an
            option is empty.
    """

    def __init__(self, *, uri: str | None = None, experiment: str = "metarun") -> None:
        require("mlflow", "mlflow", "sqlalchemy", "alembic")
        if uri is not None and re.search(r"//[^/@]+@", uri):
            raise ValueError(
                "logger.mlflow.uri contains a user name or password, which would be stored in "
                "config.yaml: export MLFLOW_TRACKING_URI and set logger.mlflow.uri=env"
            )
        if uri == _FROM_ENVIRONMENT and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError("logger.mlflow.uri=env: MLFLOW_TRACKING_URI is not set")
        if not experiment:
            raise ValueError("logger.mlflow.experiment is empty: expected a name")
        self.uri = uri
        self.experiment = experiment
        self.notes: Mapping[str, Any] = {}
        self._client: Any = None
        self._run = ""

    def begin(self, start: Start) -> Mapping[str, int]:
        """Find the run by its tag, or create it."""
        # Telemetry is disabled. Without limits, an unreachable store would block for minutes.
        for key, value in (
            ("MLFLOW_DISABLE_TELEMETRY", "true"),
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
        ):
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient

        # It logs what it raises, with a traceback.
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        # Setting the level has no effect, because MLflow resets it for every database.
        logging.getLogger("alembic.runtime.migration").disabled = True
        uri, database = self._store(start)
        with _one_at_a_time(database):
            self._client = MlflowClient(tracking_uri=uri)
            experiment = self._experiment(database)
        found = self._client.search_runs(
            [experiment], filter_string=f"tags.`{_TAG}` = '{start.id}'", max_results=1
        )
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            made = self._client.create_run(
                experiment,
                run_name=start.folder.name,
                tags={_TAG: start.id, "metarun.folder": str(start.folder.resolve())},
            )
            self._run = made.info.run_id
        self._describe(start.config)
        if not found:
            return {}
        return {name: self._last_step(name) for name in found[0].data.metrics}

    def metrics(self, step: int, values: Values) -> None:
        """Log metrics in one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()]
        )

    def figures(self, step: int, paths: Sequence[Path]) -> None:  # noqa: ARG002 - files have none
        """Log the figures as artifacts."""
        for path in paths:
            self._client.log_artifact(self._run, str(path), "figures")

    def finish(self, step: int, values: Values, results: Mapping[str, Any]) -> None:
        """Log the final values, and `results.json` as an artifact."""
        self.metrics(step, values)
        self._client.log_dict(self._run, dict(results), "results.json")

    def close(self, state: State) -> None:
        """Set the status of the run."""
        self._client.set_terminated(self._run, status=_STATES[state])

    def _store(self, start: Start) -> tuple[str, Path | None]:
        """Return the URI of the store, and the database file if it is SQLite."""
        if self.uri is None:
            own = inner_folder(start.folder / "mlflow")
            for name in ("mlflow.db", "artifacts"):
                refuse_link(own / name)
            database = (own / "mlflow.db").resolve()
            return f"{_SQLITE}{database}", database
        uri = os.environ["MLFLOW_TRACKING_URI"] if self.uri == _FROM_ENVIRONMENT else self.uri
        if not uri.startswith(_SQLITE):
            return uri, None
        path = str(Path(uri.removeprefix(_SQLITE)).absolute())
        # A relative path keeps its meaning when the run is resumed from another folder.
        # The notes may come from somebody else: they make no new file.
        if start.notes is not None and start.notes.get("uri") == self.uri:
            noted = str(start.notes.get("path", path))
            path = noted if Path(noted).exists() else path
        self.notes = {"uri": self.uri, "path": path}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return f"{_SQLITE}{path}", Path(path)

    def _experiment(self, database: Path | None) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        # Without a location MLflow would create a folder mlruns/ in the current folder.
        files = None if database is None else (database.parent / "artifacts").as_uri()
        return str(self._client.create_experiment(self.experiment, artifact_location=files))

    def _describe(self, config: Mapping[str, Any]) -> None:
        """Log the configuration. MLflow's parameters are fixed, so later changes become tags."""
        from mlflow.entities import Param, RunTag

        given = {_key(name): str(value) for name, value in flat(config).items()}
        known = self._client.get_run(self._run).data.params
        new = [Param(name, value) for name, value in given.items() if name not in known]
        for first in range(0, len(new), _MOST_AT_ONCE):
            self._client.log_batch(self._run, params=new[first : first + _MOST_AT_ONCE])
        changed = {name for name in given.keys() & known if given[name] != known[name]}
        tags = [RunTag(f"resumed.{name}", given[name]) for name in sorted(changed)]
        self._client.log_batch(self._run, tags=tags)
        self._client.log_dict(self._run, dict(config), "config.yaml")

    def _last_step(self, name: str) -> int:
        history = self._client.get_metric_history(self._run, name)
        return max(int(metric.step) for metric in history)


def _key(name: str) -> str:
    """Replace the characters that MLflow does not accept in a name."""
    return re.sub(r"[^\w.\-/ :]", "_", name)


@contextlib.contextmanager
def _one_at_a_time(database: Path | None) -> Iterator[None]:
    """Lock a database while its tables are created, since the runs of a sweep may share it."""
    if database is None or fcntl is None:
        yield
        return
    with open_inside(database.with_name(f".{database.name}.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
