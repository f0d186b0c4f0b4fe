"""Each back end holds each line of the run's folder once, however often the run was killed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metarun.runs.folder import RunFolder
from metarun.trackers.base import RATE, Start, Tracker
from metarun.trackers.mlflow import MLflow
from metarun.trackers.tensorboard import TensorBoard
from metarun.trackers.wandb import WandB, rows
from tests.conftest import Command
from tests.trackers.back_ends import (
    Series,
    accumulator,
    make_run,
    mlflow_client,
    mlflow_runs,
    of_mlflow,
    of_tensorboard,
    of_the_folder,
    of_wandb,
    own_store,
    wait_for_wandb,
)

READERS: Mapping[str, Callable[[Path], Series]] = {
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
    "wandb": of_wandb,
}
TINY = (
    "train.steps=6", "train.log_every=2", "train.eval_every=3", "train.checkpoint_every=3",
    "eval.episodes=4", "eval.val_episodes=4", "eval.curve_steps=0",
)  # fmt: skip


def assert_holds(found: Series, wanted: Series) -> None:
    for name, line in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in line], name
        # A step that was truncated and repeated has another duration.
        if name != RATE:
            values = [value for _, value in found[name]]
            assert values == pytest.approx([value for _, value in line], rel=1e-6), name


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a run killed after 33 of 60 steps, resumed, and resumed from an older state."""
    if not hasattr(os, "fork"):
        pytest.skip("the run ends itself by a signal")
    run = tmp_path_factory.mktemp("runs") / "killed"
    assert make_run(run, 33) == -9
    figures = run / "figures"
    figures.mkdir()
    Image.new("RGB", (8, 6), (255, 0, 0)).save(figures / "red.png")
    (figures / "curve.svg").write_text("<svg/>")
    assert make_run(run, 0) == 0
    last = run / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-30])
    assert make_run(run, 0) == 0
    wait_for_wandb(run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_killed_run_is_one_run_with_each_step_once(name: str, killed: Path) -> None:
    wanted = of_the_folder(killed)
    assert [step for step, _ in wanted["train/loss"]] == [*range(7, 60, 7), 60]
    assert_holds(READERS[name](killed), wanted)


@pytest.mark.slow
def test_a_killed_run_has_its_figures_in_each(killed: Path) -> None:
    (image,) = accumulator(killed).Images("figures/red")
    assert (image.step, image.width, image.height) == (60, 8, 6)
    (made,) = mlflow_runs(own_store(killed))
    listed = mlflow_client(own_store(killed)).list_artifacts(made.info.run_id, "figures")
    assert [file.path for file in listed] == ["figures/curve.svg", "figures/red.png"]
    assert {row["step"] for row in rows(killed) if "figures/red" in row} == {60}
    assert list((killed / "wandb").glob("*/files/media/images/figures/red_*.png"))
    assert list((killed / "wandb").glob("*/files/figures/curve.svg"))


@pytest.mark.slow
def test_a_killed_run_has_its_final_results_and_configuration_in_each(killed: Path) -> None:
    results = json.loads((killed / "results.json").read_text())
    mean = results["test"]["mean"]
    board = of_tensorboard(killed)
    assert board["test/mse"] == [(60, pytest.approx(mean))]
    assert board["best/step"] == [(60, results["val"]["step"])]
    texts = accumulator(killed).Tensors("config/text_summary")
    assert b"algo.inner_lr | 0.1" in texts[-1].tensor_proto.string_val[0]
    (made,) = mlflow_runs(own_store(killed))
    assert of_mlflow(killed)["test/mse"] == [(60, pytest.approx(mean))]
    assert made.data.params == {"algo.inner_lr": "0.1", "seed": "3"}
    assert made.info.status == "FINISHED"
    client = mlflow_client(own_store(killed))
    listed = {file.path for file in client.list_artifacts(made.info.run_id)}
    assert listed == {"config.yaml", "figures", "results.json"}
    last = max((killed / "wandb").glob("offline-run-*/*.wandb"))
    assert b"test/mse" in last.read_bytes()
    assert b"inner_lr" in last.read_bytes()


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a database of MLflow, which takes seconds."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    mlflow_client(f"sqlite:///{path}")
    return path


def start(folder: Path, **changes: Any) -> Start:
    values: dict[str, Any] = {
        "id": "0123abcd", "folder": folder, "config": {"seed": 1}, "run_info": {},
        "metric": "test/mse", "step": 0, "lines": [], "notes": None, **changes,
    }  # fmt: skip
    return Start(**values)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
@pytest.mark.parametrize("make", [TensorBoard, MLflow, WandB])
@pytest.mark.slow
def test_a_value_that_is_not_finite_is_taken(make: Callable[[], Tracker], tmp_path: Path) -> None:
    tracker = make()
    tracker.begin(start(tmp_path))
    tracker.metrics(1, {"val/mse": math.nan, "train/loss": math.inf})
    tracker.metrics(2, {"val/mse": 0.5})
    tracker.close("finished")
    reader = {TensorBoard: of_tensorboard, MLflow: of_mlflow, WandB: of_wandb}[make]
    assert [step for step, _ in reader(tmp_path)["val/mse"]] == [1, 2]


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
@pytest.mark.slow
def test_mlflow_notes_what_a_resume_has_changed(tmp_path: Path) -> None:
    for seed in (1, 2):
        tracker = MLflow()
        tracker.begin(start(tmp_path, config={"train": {"steps": seed}, "way": 5}))
        tracker.close("interrupted")
    (made,) = mlflow_runs(own_store(tmp_path))
    assert made.data.params == {"train.steps": "1", "way": "5"}
    assert made.data.tags["resumed.train.steps"] == "2"
    assert made.info.status == "KILLED"


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
@pytest.mark.slow
def test_mlflow_finds_a_relative_store_from_another_folder(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all").mkdir()
    shutil.copy(empty_store, tmp_path / "all" / "runs.db")
    first = MLflow(uri="sqlite:///all/runs.db", experiment="mine")
    first.begin(start(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    second = MLflow(uri="sqlite:///all/runs.db", experiment="mine")
    second.begin(start(tmp_path, notes=first.notes))
    assert list(Path().iterdir()) == []
    assert len(mlflow_runs(f"sqlite:///{tmp_path}/all/runs.db", "mine")) == 1


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_mlflow_prints_nothing_itself_when_its_store_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = MLflow()
    tracker.begin(start(tmp_path))
    shutil.rmtree(tmp_path / "mlflow")
    with pytest.raises(Exception, match="sqlite3"):
        tracker.metrics(1, {"val/mse": 0.5})
    assert capsys.readouterr() == ("", "")


def test_rows_of_wandb_are_read_to_where_a_kill_has_cut_them(tmp_path: Path) -> None:
    tracker = WandB()
    tracker.begin(start(tmp_path))
    for step in range(600):  # several blocks of the log
        tracker.metrics(step, {"train/loss": step / 7, "train/accuracy": 0.5})
    tracker.close("finished")
    assert of_wandb(tmp_path)["train/loss"] == [(step, step / 7) for step in range(600)]
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert path.stat().st_size > 3 * 32768
    path.write_bytes(path.read_bytes()[:50_000])
    left = of_wandb(tmp_path)["train/loss"]
    assert 0 < len(left) < 600
    assert left == [(step, step / 7) for step in range(len(left))]


def test_wandb_online_without_a_key_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wandb.login", lambda **_: False)
    with pytest.raises(ValueError, match="run `wandb login`, or set WANDB_API_KEY"):
        WandB(mode="online").begin(start(tmp_path))


def test_settings_of_wandb_that_came_with_a_run_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nbase_url = http://evil.example\n")
    with pytest.raises(ValueError, match="settings could change where W&B sends the run"):
        WandB().begin(start(tmp_path))


def test_all_of_them_follow_a_run_of_the_command_line(metarun: Command) -> None:
    answer = metarun(*TINY, "hydra.run.dir=run", "logger=[tensorboard,mlflow,wandb]")
    assert (answer.code, answer.err) == (0, "")
    for word in ("wandb", "mlflow", "alembic", "tensorboard"):
        assert word not in answer.out.lower()
    assert sorted(path.name for path in Path().iterdir()) == ["run"]
    run = Path("run")
    for reader in READERS.values():
        assert_holds(reader(run), of_the_folder(run))
    hyperparameters = accumulator(run).summary_metadata["_hparams_/session_start_info"]
    assert b"train.steps" in hyperparameters.plugin_data.content


@pytest.mark.slow
def test_a_tracker_that_is_added_on_a_resume_has_the_runs_past(
    metarun: Command, empty_store: Path
) -> None:
    run = Path("run")
    uri = f"sqlite:///{shutil.copy(empty_store, Path.cwd() / 'all.db')}"
    assert metarun(*TINY, "hydra.run.dir=run", "logger=tensorboard").code == 0
    words = ("resume=run", "train.steps=9", "logger=[mlflow,tensorboard]")
    answer = metarun(*words, f"logger.mlflow.uri={uri}")
    assert (answer.code, answer.err) == (0, "")
    assert_holds(of_tensorboard(run), of_the_folder(run))
    assert_holds(of_mlflow(run, uri), of_the_folder(run))
    assert [step for step, _ in of_tensorboard(run)["test/mse"]] == [9]
    # A resume keeps the options that it does not name, and drops the trackers that it leaves out.
    for words, left in (["train.steps=10"], 2), (["train.steps=11", "logger=mlflow"], 1):
        assert metarun("resume=run", *words).code == 0
        stored = RunFolder(run).configuration()["logger"]
        assert (len(stored), stored["mlflow"]["uri"]) == (left, uri)
    assert_holds(of_mlflow(run, uri), of_the_folder(run))


@pytest.mark.slow
def test_runs_of_a_sweep_share_a_store(metarun: Command, empty_store: Path) -> None:
    uri = f"sqlite:///{shutil.copy(empty_store, Path.cwd() / 'all.db')}"
    words = ("logger=[tensorboard,mlflow]", f"logger.mlflow.uri={uri}")
    answer = metarun("-m", "seed=0,1", *TINY, *words)
    assert (answer.code, answer.err) == (0, "")
    assert {run.data.params["seed"] for run in mlflow_runs(uri)} == {"0", "1"}
    folders = list(Path("outputs/sweeps").glob("*seed=*"))
    assert len(folders) == 2
    for folder in folders:
        assert_holds(of_tensorboard(folder), of_the_folder(folder))
