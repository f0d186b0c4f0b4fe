"""Readers of what real back ends hold of a run, and a short run that is killed.

As a program: `python -m tests.trackers.back_ends FOLDER STEP` runs the tiny run with every
tracker and kills itself with SIGKILL in the update after STEP. With STEP 0 the run finishes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

from metarun.trackers.base import RATE, Trackers
from metarun.trackers.mlflow import MLflow
from metarun.trackers.tensorboard import TensorBoard
from metarun.trackers.wandb import WandB, rows

Series = dict[str, list[tuple[int, float]]]
REPOSITORY = Path(__file__).parent.parent.parent


def of_the_folder(run: Path) -> Series:
    """Return the metrics in `metrics.jsonl` and `timing.jsonl`, by name."""
    found: Series = defaultdict(list)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for name, value in record.items():
            found[name].append((step, value))
    for line in (run / "timing.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[RATE].append((record["step"], record["tasks_per_second"]))
    return dict(found)


def accumulator(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "tensors": 0})
        found.Reload()
    return found


def of_tensorboard(run: Path) -> Series:
    found = accumulator(run)
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def mlflow_client(uri: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)


def mlflow_runs(uri: str, experiment: str = "metarun") -> list[Any]:
    client = mlflow_client(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id]))


def own_store(run: Path) -> str:
    return f"sqlite:///{(run / 'mlflow' / 'mlflow.db').resolve()}"


def of_mlflow(run: Path, uri: str | None = None) -> Series:
    uri = uri or own_store(run)
    (made,) = mlflow_runs(uri)
    client = mlflow_client(uri)
    return {
        name: sorted((m.step, m.value) for m in client.get_metric_history(made.info.run_id, name))
        for name in made.data.metrics
    }


def of_wandb(run: Path) -> Series:
    names = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    assert len(names) == 1, f"W&B has several runs: {names}"
    wait_for_wandb(run)
    found: Series = defaultdict(list)
    for number, row in enumerate(rows(run)):
        assert row["_step"] == number
        step = row["step"]
        for name, value in row.items():
            if name != "step" and not name.startswith("_"):
                found[name].append((step, value))
    return dict(found)


def wait_for_wandb(run: Path) -> None:
    """Wait until W&B's own process has written the end of a file, a moment after the run ended."""
    log = max((run / "wandb").glob("offline-run-*")) / "logs" / "debug-internal.log"
    until = time.monotonic() + 20.0
    while "all finished" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.05)


def make_run(run: Path, step: int) -> int:
    """Start the tiny run in a process of its own and return its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "tests.trackers.back_ends", str(run), str(step)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    ).returncode


def main(run: Path, step: int) -> None:
    from tests.tiny_run import RUN_INFO, Watched, go

    def on_batch(split: str, index: int) -> None:
        if split == "train" and step and index == 2 * step:
            os.kill(os.getpid(), signal.SIGKILL)

    made = {"tensorboard": TensorBoard(), "mlflow": MLflow(), "wandb": WandB()}
    trackers = Trackers(made, {"algo": {"inner_lr": 0.1}, "seed": 3}, RUN_INFO)
    with trackers.closing():
        results = go(run, Watched(on_batch), trackers=trackers)
        trackers.finish(results, sorted((run / "figures").glob("*")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
