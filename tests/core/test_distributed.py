"""Runs that are distributed over several processes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from metarun.cli.main import main
from metarun.core import distributed
from metarun.core.types import Progress, Share
from tests import together
from tests.algorithms.test_contract import classes
from tests.data.sources import write_class_folders
from tests.data.test_row_streams import series
from tests.helpers import slow

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "multitask": ["algo.fit_steps=3"],
    "selector": ["algo.learners=[centroid,knn]", "algo.processes=1"],
    "relation": ["data.image_size=24", "algo.clip_norm=0.01"],
    "metagan_relation": ["data.image_size=24", "algo.clip_norm=0.01"],
    "reptile": ["algo.carry_moments=false"],
    "baseline": ["backbone.norm=none"],
    "baselinepp": ["backbone.norm=instance"],
    "simpleshot": ["backbone.norm=none"],
}
MORE = [
    "protomaml omniglot_small way=3..5 shot=1..3 train.tasks_per_step=3",
    "protonet omniglot_small sizes=meta_dataset train.tasks_per_step=3",
    "mixture sinusoid algo.prior=crp algo.components=3",
    *(
        f"{algo} {data}"
        for algo in ("oml", "anml")
        for data in (
            "stream_sinusoid",
            "stream_incremental_sine",
            "stream_rotated",
            "stream_permuted",
            "stream_rainbow",
        )
    ),
    *(
        f"{algo} mixed data.sources=[omniglot_small] train.tasks_per_step=3"
        for algo in ("protonet", "maml", "protomaml")
    ),
    "maml omniglot_small ~recipe way=3 backbone=resnet12 backbone.widths=[2,2,2,2]",
]


def data_for(algo: str) -> str:
    kind = classes()[algo]
    images = "classification" in kind.capabilities.kinds
    if kind.capabilities.learns_online:
        return "stream_omniglot_small" if images else "stream_linear"
    if algo == "selector":
        return "tables"
    return "omniglot_small" if images else "sinusoid"


def meta_learners() -> list[str]:
    return [a for a, kind in classes().items() if kind.capabilities.meta_trains]


CASES = [" ".join([a, data_for(a), *OPTIONS.get(a, [])]) for a in meta_learners()] + MORE
FEW = ["maml", "metagan_maml", "mixture", "multitask", "np", "reptile", "selector", "simpleshot"]
"""One algorithm for each way in which a quantity depends on all tasks."""
FEW_CASES = [case for case in CASES if case.split()[0] in FEW]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a process."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


Outcomes = tuple[dict[str, Any], dict[str, Any]]


def made_by_both(cases: list[str], path: Path) -> Outcomes:
    """Return the outcome of every case in one process, and in two."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "tests.together", str(path), *cases]
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment(rank, 2, port)))
            for rank in range(2)
        ]
        for process in started:
            stack.callback(process.kill)
        alone = {case: together.outcome(*case.split()) for case in cases}
        assert [process.wait(timeout=600) for process in started] == [0, 0]
    return alone, pickle.loads(path.read_bytes())


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return made_by_both(FEW_CASES, tmp_path_factory.mktemp("together") / "few")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return made_by_both(CASES, tmp_path_factory.mktemp("together") / "every")


def furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    gaps = [(one[name] - other[name]).abs().max() for name in one if one[name].numel()]
    return max((float(gap) for gap in gaps), default=0.0)


def check_learning(case: str, both: Outcomes) -> None:
    alone, two = (found[case] for found in both)
    assert furthest(alone["state"], two["state"]) < 1e-10
    for one, other in zip(alone["metrics"], two["metrics"], strict=True):
        assert furthest(one, other) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW_CASES)
def test_two_processes_learn_what_one_does(case: str, few: Outcomes) -> None:
    check_learning(case, few)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does_with_every_algorithm(case: str, every: Outcomes) -> None:
    check_learning(case, every)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in FEW_CASES if c.split()[0] in together.EVALUATED])
def test_two_processes_measure_what_one_does(case: str, few: Outcomes) -> None:
    alone, two = (found[case] for found in few)
    assert two["measured"].keys() == alone["measured"].keys()
    for name, values in alone["measured"].items():
        assert np.array_equal(two["measured"][name], values), name


def test_what_is_a_sequence_or_one_mini_batch_is_not_to_be_shared() -> None:
    for algo in ("reptile", "baseline", "simpleshot"):
        assert (
            together.made(algo, "omniglot_small").algorithm.capabilities.needs_whole_batch
            is not None
        )


SMALL_RUN = [
    "algo=maml", "data=sinusoid", "precision=float64", "device=cpu", "threads=1",
    "backbone.hidden=[6]", "train.tasks_per_step=3", "train.log_every=2", "train.eval_every=2",
    "train.checkpoint_every=3", "eval.episodes=7", "eval.val_episodes=5", "eval.curve_steps=1",
    "eval.tasks_per_batch=2",
]  # fmt: skip


@contextmanager
def pair(folder: Path, *words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start two processes of the command as torchrun would; kill them on exit."""
    port = free_port()
    command = [sys.executable, "-m", "metarun", *words]
    with ExitStack() as stack:
        started = [
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment(rank, 2, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for process in started:
            stack.enter_context(process)
            stack.callback(process.kill)
        yield started


def run_folders(folder: Path) -> list[Path]:
    return sorted((folder / "outputs").glob("*/*"))


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def begun(folder: Path) -> Path:
    """Return the folder of a run once it has written a line of metrics."""
    for _ in range(1200):
        found = [path.parent for path in (folder / "outputs").glob("*/*/metrics.jsonl")]
        if found and lines(found[0]):
            return found[0]
        time.sleep(0.05)
    raise AssertionError("the run has not begun")


@pytest.mark.slow
def test_torchrun_makes_one_run_that_one_process_goes_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *started, "-m", "metarun", *SMALL_RUN, "train.steps=4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test mse") == 1
    (made,) = run_folders(tmp_path)
    assert json.loads((made / "environment.json").read_text())["processes"] == 2

    monkeypatch.chdir(tmp_path)
    assert main([f"resume={made}", "train.steps=6"]) == 0
    assert "processes: 2 when the run began, 1 now" in capsys.readouterr().out
    assert main([*SMALL_RUN, "train.steps=6", "hydra.run.dir=outputs/x/alone"]) == 0
    alone = tmp_path / "outputs/x/alone"
    for one, other in zip(lines(alone), lines(made), strict=True):
        assert other == pytest.approx(one, rel=1e-9)
    one, other = (json.loads((f / "results.json").read_text()) for f in (alone, made))
    assert other["episodes_hash"] == one["episodes_hash"]
    assert other["test"] == pytest.approx(one["test"], rel=1e-9)


SHARED = {
    "oml stream_linear": ["backbone.hidden=[6]", "shot=4", "data.tasks=3"],
    "lamaml stream_linear": ["backbone.hidden=[6]", "shot=4", "data.tasks=3"],
    "oml stream_csv": ["backbone.hidden=[6]", "shot=4", "data.tasks=2", "data.file=a.csv",
        "data.target=y", "data.order=day", "data.task=asset", "data.rows=2"],
    "oml stream_folder": ["way=2", "shot=3", "query=1", "data.root=photos", "data.image_size=28"],
    "oml stream_omniglot_small": ["way=2", "shot=3", "query=1"],
    "protonet mixed": ["way=2", "query=2", "data.sources=[omniglot_small,folder]",
        "data.options={folder:{root:photos}}", "data.image_size=16"],
    "maml mixed": ["way=2", "query=2", "data.sources=[omniglot_small,folder]",
        "data.options={folder:{root:photos}}", "data.image_size=16"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARED)
def test_streams_and_mixed_data_in_two_processes_have_the_results_of_one(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algo, data = case.split()
    words = [
        f"algo={algo}", f"data={data}", *SHARED[case], "precision=float64", "device=cpu",
        "threads=1", "train.tasks_per_step=3", "train.steps=2", "train.log_every=1",
        "eval.episodes=4", "eval.val_episodes=2",
    ]  # fmt: skip
    write_class_folders(tmp_path / "photos", {f"class{number}": 5 for number in range(16)})
    series(tmp_path / "a.csv")
    with pair(tmp_path, *words) as started:
        told = [process.communicate(timeout=900) for process in started]
        assert [process.returncode for process in started] == [0, 0], told
    (made,) = run_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([*words, "hydra.run.dir=outputs/x/alone"]) == 0
    alone = tmp_path / "outputs/x/alone"
    for one, other in zip(lines(alone), lines(made), strict=True):
        assert other == pytest.approx(one, rel=1e-9, abs=1e-9)
    two, one = (json.loads((folder / "results.json").read_text()) for folder in (made, alone))
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["episodes_hash"] == one["episodes_hash"]
    assert two["test"] == pytest.approx(one["test"], rel=1e-9)
    measured, expected = (np.load(folder / "episodes.npz") for folder in (made, alone))
    for name in expected.files:
        if expected[name].dtype.kind == "U":  # Names of the sources.
            assert measured[name].tolist() == expected[name].tolist()
        else:
            np.testing.assert_allclose(measured[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_once_and_nothing_is_made(tmp_path: Path) -> None:
    with pair(tmp_path, *SMALL_RUN, "train.tasks_per_step=1") as started:
        told = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [2, 2]
    assert told == [
        (
            "",
            "error: train.tasks_per_step=1 is fewer than the 2 processes: expected at least one "
            "task for each process\n",
        ),
        ("", ""),
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("words", [["list"], ["-m", "seed=0,1"]], ids=str)
def test_what_is_no_single_run_is_refused_once(words: list[str], tmp_path: Path) -> None:
    with pair(tmp_path, *words) as started:
        told = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [2, 2]
    assert [len(errors.splitlines()) for _, errors in told] == [1, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_of_which_a_process_is_killed_says_so_and_goes_on_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair(tmp_path, *SMALL_RUN, "train.steps=100000") as started:
        made = begun(tmp_path)
        started[1].kill()
        _, errors = started[0].communicate(timeout=60)
        assert started[0].returncode == 1
    (line,) = errors.splitlines()
    assert "another process of the run is gone" in line
    status = json.loads((made / "status.json").read_text())
    assert status["state"] == "failed"
    monkeypatch.chdir(tmp_path)
    steps = status["step"] + 2
    assert main([f"resume={made}", f"train.steps={steps}"]) == 0
    assert json.loads((made / "results.json").read_text())["steps"] == steps


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_at_one_step(tmp_path: Path) -> None:
    with pair(tmp_path, *SMALL_RUN, "train.steps=100000") as started:
        made = begun(tmp_path)
        started[1].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=60)[1] for process in started]
        assert [process.returncode for process in started] == [143, 143]
    assert told[0].startswith("interrupted: saved at step ")
    assert told[1] == ""
    status = json.loads((made / "status.json").read_text())
    assert status["state"] == "interrupted"


def test_shares_are_neighbors_and_miss_no_task() -> None:
    shares = [Share.of(7, rank, 3) for rank in range(3)]
    assert [share.count for share in shares] == [2, 2, 3]
    firsts = [Progress(5, 10, share).first_task(share.count) for share in shares]
    assert firsts == [35, 37, 39]
    assert Progress(5, 10).first_task(7) == 35


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2", "RANK": "two"}, "RANK=two: expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"RANK=2: expected 0 to WORLD_SIZE - 1 = 1"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR is not set"),
    ],
)
def test_half_an_environment_is_refused(
    variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=text):
        distributed.place_from_environment()


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_task_of_a_submitit_job_knows_its_place(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        # So that what submitit exports is undone after the test.
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MASTER_PORT", "23456")
    variables = {
        "local": {
            "LOCAL_JOB_ID": "7", "LOCAL_NTASKS": "2", "LOCAL_JOB_NUM_NODES": "1",
            "LOCAL_NODEID": "0", "LOCAL_GLOBALID": "1", "LOCAL_LOCALID": "1",
        },
        "slurm": {
            "JOB_ID": "7", "NTASKS": "4", "JOB_NUM_NODES": "2", "NODEID": "1", "PROCID": "3",
            "LOCALID": "1", "JOB_NODELIST": "gpu[08-09]",
        },
    }[cluster]  # fmt: skip
    prefix = {"local": "SUBMITIT_", "slurm": "SLURM_"}[cluster]
    monkeypatch.setenv("SUBMITIT_EXECUTOR", cluster)
    for name, value in variables.items():
        monkeypatch.setenv(prefix + name, value)
    place = distributed.place_from_submitit()
    if cluster == "slurm":
        assert place == distributed.Place(rank=3, size=4, local_rank=1, local_size=2)
        assert os.environ["MASTER_ADDR"] == "gpu08"
    else:
        assert place == distributed.Place(rank=1, size=2, local_rank=1, local_size=2)
        assert os.environ["MASTER_ADDR"] == socket.gethostname()


def test_one_process_of_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert distributed.place_from_environment() == distributed.Place()


POISON = """\
from dataclasses import replace

import torch

from metarun.core import distributed
from metarun.algorithms.optimization.maml import MAML


class Poisoned(MAML):
    def update(self, batch, progress):
        if progress.step == 3 and distributed.rank() == 1:
            batch = replace(batch, query_y=batch.query_y * torch.inf)
        return super().update(batch, progress)


class Apart(MAML):
    def update(self, batch, progress):
        metrics = super().update(batch, progress)
        with torch.no_grad():
            next(self.parameters()).add_(distributed.rank())
        return metrics
"""


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        slow("Poisoned", "error: step 3: the gradient of "),
        slow("Apart", "error: step 3: the processes no longer have the same parameters: algo=mine"),
    ],
)
def test_what_goes_wrong_in_one_process_stops_all(kind: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    (tmp_path / "conf/algo").mkdir(parents=True)
    yaml = f"defaults: [maml, _self_]\n_target_: poison.{kind}\n"
    (tmp_path / "conf/algo/mine.yaml").write_text(yaml)
    words = ["--config-dir", "conf", *SMALL_RUN, "algo=mine", "train.steps=9"]
    with pair(tmp_path, *words) as started:
        told = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [1, 1], told
    assert text in told[0], told
    assert told[1] == ""
