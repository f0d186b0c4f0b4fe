"""Trackers do not change a run, and a failing tracker does not stop it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from metarun.config.build import keywords
from metarun.config.catalogue import conf_dir
from metarun.config.composition import composer
from metarun.config.naming import HOW_IT_RUNS
from metarun.config.trust import locate
from metarun.core.nested import flat
from metarun.runs.folder import RunFolder
from metarun.trackers.base import Start, State, Tracker, Trackers, Values, final, require
from metarun.trackers.mlflow import MLflow
from tests.conftest import Command
from tests.tiny_run import folder, go
from tests.training.test_kill_and_resume import assert_same_run

NAMES = ("tensorboard", "wandb", "mlflow")
TINY = (
    "train.steps=4", "train.log_every=2", "train.eval_every=2", "eval.episodes=4",
    "eval.val_episodes=4", "eval.curve_steps=0", "hydra.run.dir=run",
)  # fmt: skip


class Fake(Tracker):
    """Tracker that records its calls and fails where a test requires it."""

    def __init__(self, fails: str = "", error: BaseException | None = None, after: int = 0) -> None:
        self.notes: Mapping[str, Any] = {}
        self.told: list[tuple[Any, ...]] = []
        self._fails = fails
        self._error = error or RuntimeError("no answer\nfrom http://me:secret@host/path")
        self._after = after

    def begin(self, start: Start) -> Mapping[str, int]:
        self._tell("begin", start.step)
        return {}

    def metrics(self, step: int, values: Values) -> None:
        self._tell("metrics", step, values)

    def figures(self, step: int, paths: Sequence[Path]) -> None:
        self._tell("figures", step, paths)

    def finish(self, step: int, values: Values, results: Mapping[str, Any]) -> None:
        self._tell("finish", step, values, results)

    def close(self, state: State) -> None:
        self._tell("close", state)

    def _tell(self, *what: Any) -> None:
        self.told.append(what)
        if what[0] == self._fails and len(self.told) > self._after:
            raise self._error


def followed(path: Path, trackers: Trackers) -> None:
    with trackers.closing():
        results = go(path, trackers=trackers)
        trackers.finish(results, [])


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "run"
    go(path)
    return path


@pytest.mark.parametrize("call", ["begin", "metrics", "figures", "finish", "close"])
def test_a_tracker_that_fails_is_left_alone_after_one_line(
    call: str, plain_run: Path, tmp_path: Path
) -> None:
    broken, whole = Fake(call, after=5 if call == "metrics" else 0), Fake()
    followed(tmp_path / "run", Trackers({"broken": broken, "whole": whole}))
    assert broken.told[-1][0] == call
    assert whole.told[-1] == ("close", "finished")
    warned = (tmp_path / "run" / "metarun.log").read_text().count("WARNING logger=broken")
    assert warned == 1
    assert_same_run(plain_run, tmp_path / "run")


def test_a_library_that_exits_does_not_end_the_run(tmp_path: Path) -> None:
    followed(tmp_path / "run", Trackers({"broken": Fake("metrics", SystemExit(1))}))
    assert RunFolder.open(tmp_path / "run").status()["state"] == "finished"


def test_a_warning_is_one_line_without_a_password(tmp_path: Path) -> None:
    followed(tmp_path / "run", Trackers({"broken": Fake("begin")}))
    (line,) = [
        line
        for line in (tmp_path / "run" / "metarun.log").read_text().splitlines()
        if "WARNING" in line
    ]
    assert line.endswith(
        "logger=broken has failed and is dropped, the run continues: "
        "RuntimeError: no answer from http://host/path"
    )


def test_a_folder_that_cannot_keep_the_trackers_costs_the_trackers_alone(
    plain_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    folder(path)
    (path / "trackers.json").write_text("{")
    tracker = Fake()
    followed(path, Trackers({"fake": tracker}))
    assert tracker.told == []
    assert_same_run(plain_run, path)


def test_a_tracker_is_told_every_line_once_and_how_it_ended(tmp_path: Path) -> None:
    tracker = Fake()
    followed(tmp_path / "run", Trackers({"fake": tracker}))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    told = [what for what in tracker.told if what[0] == "metrics"]
    assert [what[1] for what in told] == [json.loads(line)["step"] for line in lines]
    assert tracker.told[-1] == ("close", "finished")
    with pytest.raises(ZeroDivisionError), Trackers({"fake": tracker}).closing():
        raise ZeroDivisionError
    # The tracker was not opened, so it is not closed.
    assert tracker.told[-1] == ("close", "finished")


def test_a_run_is_the_same_with_and_without_trackers(metarun: Command) -> None:
    assert metarun(*TINY).code == 0
    assert metarun(*TINY[:-1], "hydra.run.dir=other", "logger=tensorboard").code == 0
    one, other = Path("run"), Path("other")
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    results = [json.loads((path / "results.json").read_text()) for path in (one, other)]
    for record in results:
        for key in ("seconds", "train_seconds", "tasks_per_second"):
            del record[key]
    assert results[0] == results[1]
    assert not (one / "trackers.json").exists()


def test_trackers_leave_the_name_of_a_run_alone() -> None:
    assert "logger" in HOW_IT_RUNS
    with composer() as compose:
        names = [
            compose.job(["seed=1", *words], sweep=True).folder
            for words in ([], ["logger=[mlflow,tensorboard]", "logger.mlflow.experiment=x"])
        ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logger=tensorbord"], "logger=tensorbord: did you mean tensorboard?"),
        (["logger=nonsense"], "logger=nonsense: expected one of mlflow, tensorboard, wandb"),
        (["logger=[mlflow,wand]"], "logger=wand: did you mean wandb?"),
        (["logger=null"], "logger=null: type logger=[]"),
        (["-m", "logger=wand", "seed=1,2"], "logger=wand: did you mean wandb?"),
        (["-m", "logger=mlflow,wandb"], "to use several in one run, type logger=[A,B]"),
        (["logger.wandb.mode=online"], "there is no key logger.wandb.mode"),
        (["logger=wandb", "logger.wandb.mod=online"], "did you mean logger.wandb.mode?"),
        (["logger=wandb", "logger.wandb.mode=on"], "logger.wandb.mode=on: expected offline or"),
        (["logger=mlflow", "logger.mlflow.uri=http://a:b@c"], "export MLFLOW_TRACKING_URI"),
        (["logger=mlflow", "logger.mlflow.uri=env"], "MLFLOW_TRACKING_URI is not set"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_end_with_one_line_and_make_nothing(
    metarun: Command, words: list[str], message: str
) -> None:
    answer = metarun(*words)
    assert answer.code == 2
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_told_before_anything_is_made(
    name: str, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metarun.trackers.base.find_spec", lambda _: None)
    answer = metarun(*TINY, f"logger={name}")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"error: logger={name} needs {name}: pip install 'metarun[{name}]'\n"
    assert list(Path().iterdir()) == []


def test_a_folder_with_the_name_of_a_package_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"needs a_tracker: pip install 'metarun\[mine\]'"):
        require("mine", "a_tracker")


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_has_the_options_and_defaults_of_its_class(name: str) -> None:
    from omegaconf import OmegaConf

    path = conf_dir() / "logger" / f"{name}.yaml"
    header, described = path.read_text().splitlines()[:2]
    assert (header, described[:2]) == (f"# @package logger.{name}", "# ")
    loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
    target = locate("logger._target_", loaded.pop("_target_"))
    assert set(keywords(target)) == set(loaded)
    for key, parameter in inspect.signature(target).parameters.items():
        default = parameter.default
        assert loaded[key] == (list(default) if isinstance(default, tuple) else default), key


def test_they_are_listed(metarun: Command) -> None:
    answer = metarun("list", "logger")
    assert answer.code == 0
    assert all(name in answer.out for name in NAMES)
    assert "logger=     mlflow, tensorboard, wandb" in metarun("--help").out


@pytest.mark.slow
def test_no_package_is_imported_unless_it_is_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; from metarun.cli.main import main; assert main(sys.argv[1:]) == 0; "
        f"sys.exit(any(name in sys.modules for name in {NAMES}))"
    )
    done = subprocess.run([sys.executable, "-c", code, *TINY], cwd=tmp_path, check=False)
    assert done.returncode == 0


def test_a_resume_refuses_a_tracker_that_there_is_not_and_may_drop_all(metarun: Command) -> None:
    assert metarun(*TINY, "logger=tensorboard").code == 0
    before = Path("run/config.yaml").read_bytes()
    for words, message in (
        (["logger=tensorbord"], "error: logger=tensorbord: did you mean tensorboard?\n"),
        (["logger.wandb.mode=online"], "error: there is no key logger.wandb.mode"),
    ):
        answer = metarun("resume=run", "train.steps=6", *words)
        assert (answer.code, answer.err.startswith(message)) == (2, True)
    assert Path("run/config.yaml").read_bytes() == before
    assert metarun("resume=run", "train.steps=6", "logger=[]").code == 0
    assert RunFolder(Path("run")).configuration()["logger"] == {}


def test_a_run_is_tested_where_its_trackers_are_not_installed(
    metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert metarun(*TINY, "logger=tensorboard").code == 0
    monkeypatch.setattr("metarun.trackers.base.find_spec", lambda _: None)
    assert metarun("test=run", "eval.episodes=4").code == 0


def test_a_tracker_of_ones_own_is_a_file_and_a_class(metarun: Command) -> None:
    Path("conf/logger").mkdir(parents=True)
    Path("conf/logger/mine.yaml").write_text(
        "# @package logger.mine\n_target_: tests.trackers.test_trackers.Fake\n"
    )
    Path("conf/logger/not.yaml").write_text(
        "# @package logger.not\n_target_: metarun.runs.folder.RunFolder\npath: x\n"
    )
    assert metarun(*TINY, "--config-dir", "conf", "logger=mine").code == 0
    answer = metarun(*TINY[:-1], "--config-dir", "conf", "logger=not")
    assert (answer.code, "is not a subclass of metarun's Tracker" in answer.err) == (2, True)


def test_no_password_stands_in_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="which would be stored in"):
        MLflow(uri="postgresql://me:secret@host/db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host")
    tracker = MLflow(uri="env")
    assert "secret" not in str(vars(tracker))


def test_the_final_figures_have_the_names_of_their_metrics() -> None:
    results = {
        "metric": "accuracy", "test": {"mean": 0.9, "ci95": 0.01, "episodes": 600},
        "val": {"mean": 0.8, "ci95": None, "episodes": 200, "step": 40}, "curve": None,
        "coverage": {"mean": 0.95, "ci95": 0.02}, "stream": {"forgetting": {"mean": 1, "ci95": 2}},
        "parameters": 10, "seconds": 1.5, "steps": 50, "names": {"mean": "no interval"},
    }  # fmt: skip
    del results["names"]
    assert final(results) == {
        "test/accuracy": 0.9, "test/accuracy_ci95": 0.01, "best/val_accuracy": 0.8,
        "best/step": 40.0, "test/coverage": 0.95, "test/coverage_ci95": 0.02,
        "stream/forgetting": 1.0, "stream/forgetting_ci95": 2.0, "run/parameters": 10.0,
        "run/seconds": 1.5,
    }  # fmt: skip


def test_leaves_are_named_by_dots() -> None:
    assert flat({"a": {"b": [1], "c": {}}, "d": None}) == {"a.b": [1], "d": None}
