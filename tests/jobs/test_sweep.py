"""Tests of sweeps: repeated, resumed, concurrent, killed, and their summaries."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metarun.config import composition, configurations, naming
from metarun.config.build import build_experiment
from metarun.core.console import Screen
from metarun.jobs import ensure, sweep
from metarun.jobs.ensure import ensure_finished
from metarun.jobs.sweep import Journal
from metarun.runs import sweeps
from tests.cli.test_main import own
from tests.conftest import Answer, Command

TINY = [
    "data=linear", "train.steps=4", "train.tasks_per_step=2", "train.eval_every=2",
    "train.log_every=1", "train.checkpoint_every=1", "eval.episodes=4", "eval.val_episodes=4",
    "eval.curve_steps=0", "device=cpu", "threads=1",
]  # fmt: skip

RAY = ["num_cpus=1", "include_dashboard=false"]
"""A cluster of Ray that begins and ends with the sweep, in fewer processes."""

Inside = Callable[[Path, Sequence[str]], Answer]


def start(words: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "metarun", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
    )


def run(words: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    process = start(words, cwd)
    out, err = process.communicate(timeout=900)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def inside(metarun: Command, monkeypatch: pytest.MonkeyPatch) -> Inside:
    """The command in this process, in another folder, which is created if missing."""

    def call(place: Path, words: Sequence[str]) -> Answer:
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        return metarun(*words)

    return call


def folders(place: Path) -> dict[str, Path]:
    """Return the run folders of a sweep, by name."""
    sweeps = place / "outputs/sweeps"
    return {path.parent.name: path.parent for path in sweeps.rglob("config.yaml")}


def states(place: Path) -> list[str]:
    return sorted(
        json.loads((path / "status.json").read_text())["state"] for path in folders(place).values()
    )


def numbers(folder: Path) -> tuple[str, Any, Any, Any]:
    """Return all numbers that a run has computed."""
    results = json.loads((folder / "results.json").read_text())
    metrics = (folder / "metrics.jsonl").read_text()
    return metrics, results["test"], results["val"], results["episodes_hash"]


def test_a_sweep_again_skips_what_is_finished_and_makes_what_is_missing(
    metarun: Command, tmp_path: Path
) -> None:
    assert metarun("-m", "algo=maml", "seed=1,2", *TINY).code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    answer = metarun("-m", "seed=1,2,3", *TINY, "algo=maml", "threads=2")
    assert answer.code == 0, answer.err
    assert "3 of 3 runs are finished, 2 of them before" in answer.out
    assert len(folders(tmp_path)) == 3
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


@pytest.mark.slow
def test_the_folder_that_is_checked_is_the_folder_that_hydra_makes(
    metarun: Command, tmp_path: Path
) -> None:
    """Hydra normalizes the values of a sweep: 1e-3 becomes 0.001."""
    words = ["-m", "algo.inner_lr=1e-3,0.5", "optim.lr=1e-2", *TINY]
    with composition.composer() as compose:
        planned = {job.folder.name for job in compose.jobs(words[1:], sweep=True)}
    assert metarun(*words).code == 0
    assert set(folders(tmp_path)) == planned


def test_the_end_of_a_sweep_is_a_table_of_its_runs(metarun: Command) -> None:
    answer = metarun("-m", "algo=maml,anil", "seed=1,2", *TINY)
    assert "over 2 seeds" in answer.out
    assert "on the same episodes, paired" in answer.out


def test_a_run_that_fails_leaves_its_traceback_and_its_reason_and_the_others(
    metarun: Command, tmp_path: Path
) -> None:
    conf = own(tmp_path, error="RuntimeError('out of luck')")
    words = [*conf, "-m", "algo=fails,mine", *TINY]
    answer = metarun(*words)
    assert answer.code == 1
    assert states(tmp_path) == ["failed", "finished"]
    (failed,) = (path for name, path in folders(tmp_path).items() if "fails" in name)
    assert "Traceback" in (failed / "metarun.log").read_text()
    assert "out of luck" in json.loads((failed / "status.json").read_text())["why"]
    assert f"error: outputs/sweeps/{failed.name}: failed: RuntimeError: out of luck" in answer.err
    assert f"to complete the sweep, repeat the command: metarun {' '.join(words)}" in answer.err


@pytest.mark.slow
def test_a_run_that_cannot_even_begin_leaves_its_traceback_too(
    metarun: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(ensure, "train", refuse)
    answer = metarun("-m", "seed=1,2", *TINY)
    assert answer.code == 1
    assert states(tmp_path) == ["failed", "failed"]
    for folder in folders(tmp_path).values():
        assert "Traceback" in (folder / "metarun.log").read_text()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert metarun("-m", "seed=1,2", *TINY).code == 0
    assert states(tmp_path) == ["finished", "finished"]


@pytest.mark.slow
def test_fail_fast_starts_no_further_run(metarun: Command, tmp_path: Path) -> None:
    conf = own(tmp_path, error="RuntimeError")
    answer = metarun(*conf, "-m", "algo=fails,mine", "sweep.fail_fast=true", *TINY)
    assert answer.code == 1
    assert states(tmp_path) == ["failed"]
    assert "0 of 2 runs are finished" in answer.out


def test_a_false_start_is_begun_again(tmp_path: Path) -> None:
    """The process was killed between the first and the last file of a new folder."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").touch()
    os.utime(folder / "config.yaml", (0, 0))
    with composition.composer() as compose:
        job = compose.job(TINY)
    outcome = ensure_finished(job.config, folder, TINY, None, Screen())
    assert outcome.state == "finished", outcome.why


def test_a_run_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    with composition.composer() as compose:
        job = compose.job(TINY)
    folder = tmp_path / "run"
    assert ensure_finished(job.config, folder, TINY, None, Screen()).state == "finished"
    (folder / "results.json").unlink()
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "state": "running"}))
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from metarun.runs.folder import RunFolder\n"
            "with RunFolder.open(sys.argv[1]).locked(): print('held', flush=True); time.sleep(60)",
            str(folder),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        outcome = ensure_finished(job.config, folder, TINY, None, Screen())
        assert outcome.state == "elsewhere"
        assert f"in use by process {holder.pid}" in outcome.why
    finally:
        holder.kill()
        holder.communicate()


def test_a_run_that_another_process_has_just_begun_or_finished_is_not_marked_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with composition.composer() as compose:
        job = compose.job(TINY)
    folder = tmp_path / "run"

    def make() -> str:
        return ensure_finished(job.config, folder, TINY, None, Screen()).state

    assert make() == "finished"
    # As seen by a process that checked before the other one started or finished.
    monkeypatch.setattr(ensure, "_begun", lambda _: False)
    assert make() == "elsewhere"
    monkeypatch.undo()
    monkeypatch.setattr(ensure, "continuation", lambda *_: build_experiment(job.config))
    assert make() == "kept"
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_sweep_killed_three_times_ends_with_the_numbers_of_one_never_killed(
    tmp_path: Path, inside: Inside
) -> None:
    words = ["-m", "algo=maml,anil,reptile", "seed=1,2", *TINY, "train.steps=20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    assert inside(whole, words).code == 0
    draw = random.Random(0)
    for target in sorted(draw.sample(range(1, 5), 3)):
        process = start(words, killed)
        # Wait for a random number of results and a random time, to kill a run at any point.
        while process.poll() is None and len(list(killed.rglob("results.json"))) < target:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.4))
        process.kill()
        process.communicate()
    done = inside(killed, words)
    assert done.code == 0, done.err
    expected, found = folders(whole), folders(killed)
    assert set(expected) == set(found)
    assert len(found) == 6
    for name, folder in found.items():
        assert numbers(folder) == numbers(expected[name]), name
    # The journals of the killed sweeps remain and do no harm.
    assert "6 of 6 runs are finished" in done.out


@pytest.mark.slow
def test_two_sweeps_share_a_folder_without_harm(tmp_path: Path, inside: Inside) -> None:
    words = ["-m", "seed=1,2,3,4", *TINY, "train.steps=40"]
    first, second = start(words, tmp_path), start(words, tmp_path)
    for process in (first, second):
        _, err = process.communicate(timeout=300)
        assert "Traceback" not in err
    assert inside(tmp_path, words).code == 0
    assert states(tmp_path) == ["finished"] * 4
    found, alone = folders(tmp_path), tmp_path / "alone"
    assert inside(alone, words).code == 0
    for name, folder in folders(alone).items():
        assert numbers(folder) == numbers(found[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("joblib", ["hydra.launcher.n_jobs=2"]),
        ("submitit_local", ["hydra.launcher.timeout_min=5"]),
        ("ray", [f"+hydra.launcher.ray.init.{word}" for word in RAY]),
    ],
    ids=["joblib", "submitit_local", "ray"],
)
def test_runs_of_other_processes_are_reported_and_computed_alike(
    launcher: str, options: list[str], tmp_path: Path, inside: Inside
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    words = [*own(tmp_path, error="RuntimeError('out of luck')"), "-m", "seed=1,2", *TINY]
    done = run([*words, "algo=mine,fails", f"hydra/launcher={launcher}", *options], tmp_path)
    assert done.returncode == 1
    assert states(tmp_path) == ["failed", "failed", "finished", "finished"]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("failed: RuntimeError: out of luck") == 2
    assert done.stdout.count("test mse") >= 2
    assert "step 1/4" not in done.stdout
    here = inside(tmp_path, [*words, "algo=mine"])
    assert "2 of 2 runs are finished, 2 of them before" in here.out
    found, alone = folders(tmp_path), tmp_path / "alone"
    shutil.copytree(tmp_path / "conf", alone / "conf")
    assert inside(alone, [*words, "algo=mine"]).code == 0
    for name, folder in folders(alone).items():
        assert numbers(folder) == numbers(found[name])


@pytest.mark.slow
def test_a_signal_saves_the_runs_of_other_processes_and_starts_no_more(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["-m", "seed=1,2,3,4", *TINY, "train.steps=1000000"]
    process = start([*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], tmp_path)
    while len(list(tmp_path.rglob("metrics.jsonl"))) < 2 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert states(tmp_path) == ["interrupted", "interrupted"]
    assert "0 of 4 runs are finished" in out
    assert "to complete the sweep, repeat the command: metarun -m seed=1,2,3,4" in err


@pytest.mark.parametrize("place", [(sweep, "ensure_finished"), (Journal, "add")])
def test_a_signal_while_a_run_is_being_built_starts_neither_it_nor_the_next(
    place: tuple[Any, str], inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = place
    called = getattr(owner, name)

    def interrupted(*args: Any, **options: Any) -> Any:
        if name not in sent:
            sent.append(name)
            os.kill(os.getpid(), signal.SIGTERM)
        return called(*args, **options)

    sent: list[str] = []
    monkeypatch.setattr(owner, name, interrupted)
    words = ["-m", "algo=maml", "seed=1,2", *TINY]
    answer = inside(tmp_path, words)
    assert answer.code == 128 + signal.SIGTERM, answer.err
    assert "0 of 2 runs are finished" in answer.out
    assert "interrupted; to complete the sweep, repeat the command" in answer.err
    assert states(tmp_path) == []
    assert "2 of 2 runs are finished" in inside(tmp_path, words).out


@pytest.mark.slow
def test_optuna_searches_by_meta_val(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    words += ["hydra.sweeper.sampler.seed=1", "algo.inner_lr=interval(0.001,0.1)", *TINY]
    # In separate processes, since Optuna keeps the first standard error that it gets.
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.rglob("optimization_results.yaml")
    best = min(numbers(folder)[2]["mean"] for folder in folders(tmp_path).values())
    assert f"best_value: {best}" in found.read_text()
    assert len(folders(tmp_path)) == 3
    again = run(words, tmp_path)
    assert "3 of 3 runs are finished, 3 of them before" in again.stdout


@pytest.mark.slow
def test_a_search_survives_a_run_that_fails(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    conf = own(tmp_path, error="RuntimeError('out of luck')")
    words = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=1"]
    words += ["hydra.sweeper.sampler.seed=1", "algo=mine,fails", *TINY]
    done = run([*conf, *words], tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert set(states(tmp_path)) == {"failed", "finished"}


@pytest.mark.slow
def test_processes_whose_sweep_was_killed_save_their_runs_and_end(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2,3,4", *TINY]
    sweep = start([*words, "train.steps=1000000"], tmp_path)
    while len(list(tmp_path.rglob("metrics.jsonl"))) < 2 and sweep.poll() is None:
        time.sleep(0.05)
    sweep.kill()
    # Waits for the worker processes, which hold the other end of the pipe.
    sweep.communicate(timeout=120)
    assert states(tmp_path) == ["interrupted", "interrupted"]


@pytest.mark.slow
def test_a_search_for_the_worst_is_refused(metarun: Command, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["-m", "hydra/sweeper=optuna", "optim.lr=interval(0.001,0.1)", *TINY]
    answer = metarun(*words, "hydra.sweeper.direction=maximize")
    assert answer.code == 2
    assert "searches for the worst mse: type hydra.sweeper.direction=minimize" in answer.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["hydra/sweeper=optuna", "seed=1,2", "optim.lr=interval(0.001,0.1)"],
            "seed=1,2: a search would choose the luckiest seed",
        ),
        (["seed=1,2", "hydra.sweep.subdir=x"], "hydra.sweep.subdir=x cannot be changed: metarun"),
    ],
)
def test_what_would_mix_up_runs_is_refused(
    words: list[str], message: str, metarun: Command, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    answer = metarun("-m", *words, *TINY)
    assert answer.code == 2
    assert message in answer.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_damaged_status_fails_its_run_alone(metarun: Command, tmp_path: Path) -> None:
    assert metarun("-m", "seed=1,2", *TINY).code == 0
    broken, _ = sorted(tmp_path.rglob("status.json"))
    broken.write_text('{"state": "fin')
    answer = metarun("-m", "seed=1,2,3", *TINY)
    assert answer.code == 1
    assert "Hydra" not in answer.err
    assert "2 of 3 runs are finished, 1 of them before" in answer.out
    assert "status.json is damaged" in answer.err


def test_every_listed_value_of_a_search_is_looked_up_first(metarun: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    answer = metarun("-m", "hydra/sweeper=optuna", "algo=maml,mml", "optim.lr=interval(0.001,0.1)")
    assert (answer.code, answer.err) == (2, "error: algo=mml: did you mean maml?\n")


@pytest.mark.parametrize(
    ("word", "extra"),
    [
        ("hydra/launcher=joblib", "joblib"),
        ("hydra/launcher=submitit_slurm", "slurm"),
        ("hydra/launcher=ray", "ray"),
        ("hydra/sweeper=optuna", "optuna"),
    ],
)
def test_a_plugin_that_is_missing_is_named_by_its_extra(
    word: str, extra: str, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = configurations.Configurations.options

    def without_plugins(self: configurations.Configurations, group: str) -> list[str]:
        return ["basic"] if group.startswith("hydra/") else options(self, group)

    monkeypatch.setattr(configurations.Configurations, "options", without_plugins)
    answer = metarun("-m", word, "seed=1,2", *TINY)
    assert answer.code == 2
    assert answer.err == (f"error: {word} needs a plugin: type pip install 'metarun[{extra}]'\n")


def test_a_line_of_the_journal_that_is_cut_is_not_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.add("stop")
    assert not journal.path.exists()
    journal.path.touch()
    journal.add("start", folder="a", host="h", process=1)
    journal.add("end", folder="a", state="finished", why="", signum=0)
    journal.add("start", folder="b", host="h", process=1)
    with journal.path.open("a") as file:
        file.write('{"event": "sto')
    assert not journal.stopped()
    assert list(journal.running()) == ["b"]
    assert list(journal.ends()) == ["a"]
    with journal.path.open("a") as file:
        file.write('p"}\n')
    assert journal.stopped()


def test_each_line_of_the_journal_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def loads(line: bytes) -> object:
        read.append(line)
        return json.loads(line)

    monkeypatch.setattr(sweep, "json", SimpleNamespace(loads=loads, dumps=json.dumps))
    journal = Journal(tmp_path / "journal")
    journal.path.touch()
    for number in range(20):
        journal.add("start", folder=str(number))
        assert list(journal.running()) == [str(number)]
        journal.add("end", folder=str(number))
        assert (len(journal.ends()), journal.stopped()) == (number + 1, False)
    assert len(read) == 40


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["hydra.launcher.tasks_per_node=3"],
            "train.tasks_per_step=2 is fewer than the 3 processes",
        ),
        (
            ["hydra.launcher.tasks_per_node=0"],
            "hydra.launcher.tasks_per_node=0: expected 1 or more",
        ),
        (["hydra.launcher.nodes=2"], "hydra.launcher.nodes=2: expected 1, since hydra/launcher="),
        (
            ["hydra.launcher.tasks_per_node=2", "algo=reptile", "algo.inner_optimizer=adam"],
            "algo=reptile cannot share its tasks over 2 processes",
        ),
    ],
    ids=["few tasks", "no task", "machines", "sequence"],
)
def test_a_job_that_cannot_share_its_tasks_is_refused(
    words: list[str], told: str, metarun: Command, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    answer = metarun("-m", "hydra/launcher=submitit_local", "seed=1,2", *TINY, *words)
    assert answer.code == 2
    assert answer.err.startswith(f"error: {told}")
    assert answer.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SUBMITIT = [
    "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2",
    "hydra.launcher.timeout_min=5",
]  # fmt: skip


@pytest.mark.slow
def test_the_tasks_of_a_job_are_the_processes_of_one_run(tmp_path: Path, inside: Inside) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["-m", "algo=maml", "seed=1,2", *TINY, "precision=float64", "train.tasks_per_step=3"]
    done = run([*words, *SUBMITIT], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("test mse") == 2
    alone = tmp_path / "alone"
    assert inside(alone, words).code == 0
    found, expected = folders(tmp_path), folders(alone)
    assert found.keys() == expected.keys()
    assert len(found) == 2
    for name, folder in found.items():
        assert json.loads((folder / "results.json").read_text())["processes"] == 2
        two, one = numbers(folder), numbers(expected[name])
        assert two[3] == one[3]
        for ours, theirs in zip(two[0].splitlines(), one[0].splitlines(), strict=True):
            assert json.loads(ours) == pytest.approx(json.loads(theirs), rel=1e-10)
        for ours, theirs in zip(two[1:3], one[1:3], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10)


@pytest.mark.slow
def test_a_job_of_which_a_task_is_killed_goes_on_when_repeated(
    tmp_path: Path, inside: Inside
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["-m", "algo=maml", "seed=1", *TINY, "precision=float64", "train.steps=30"]
    process = start([*words, *SUBMITIT], tmp_path)
    while not list(tmp_path.rglob("last.pt")) and process.poll() is None:
        time.sleep(0.05)
    (journal,) = tmp_path.rglob(".sweep-*.jsonl")
    (begun,) = Journal(journal).running().values()
    os.kill(begun["process"], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "to complete the sweep, repeat the command" in err
    assert states(tmp_path) == ["running"]
    done = run([*words, *SUBMITIT], tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = folders(tmp_path).values()
    assert "continuing" in (folder / "metarun.log").read_text()
    alone = tmp_path / "alone"
    assert inside(alone, words).code == 0
    (expected,) = folders(alone).values()
    assert numbers(folder)[1] == pytest.approx(numbers(expected)[1], rel=1e-8)


@pytest.mark.slow
def test_a_sweep_out_of_time_goes_on_with_the_limit_that_is_typed_now(
    metarun: Command, tmp_path: Path
) -> None:
    words = ["-m", "algo=maml", "seed=1,2", *TINY]
    answer = metarun(*words, "train.max_minutes=1e-9")
    assert answer.code == 1
    assert answer.err.count("max_minutes=1e-09 is over") == 2
    assert "error:" not in answer.err
    before = folders(tmp_path)
    answer = metarun(*words)
    assert answer.code == 0, answer.err
    assert "2 of 2 runs are finished" in answer.out
    assert folders(tmp_path) == before


# Names.


def test_a_sweep_is_found_by_its_name_with_its_own_runs_alone(
    metarun: Command, tmp_path: Path
) -> None:
    assert metarun("-m", "algo=maml", "seed=1,2", *TINY).code == 0
    answer = metarun("-m", "algo=maml", "seed=2,3", "sweep.name=rates", *TINY)
    assert answer.code == 0, answer.err
    assert "2 of 2 runs are finished, 1 of them before" in answer.out
    assert "sweep rates: see `metarun table rates` and `metarun report rates`" in answer.out
    assert len(folders(tmp_path)) == 3
    sweep = sweeps.find("rates")
    assert sweep is not None
    seeds = [json.loads((path / "results.json").read_text())["seed"] for path in sweep.existing()]
    assert sorted(seeds) == [2, 3]
    assert json.loads(metarun("table", "rates", "--format", "json").out)[0]["rows"][0]["seeds"] == 2
    assert metarun("report", "rates").out == "outputs/reports/rates/report.html\n"
    page = (tmp_path / "outputs/reports/rates/report.html").read_text()
    assert "2 runs: maml on linear" in page


def test_a_sweep_without_a_name_has_the_date_and_what_varies(metarun: Command) -> None:
    for _ in range(2):
        assert metarun("-m", "algo=maml,anil", "seed=1", *TINY).code == 0
    assert metarun("-m", "algo=maml,fomaml", "seed=1", *TINY).code == 0
    names = sorted(sweep.name for sweep in sweeps.stored())
    assert [name[10:] for name in names] == ["-algo", "-algo-2"]
    assert all(re.match(r"20\d\d-\d\d-\d\d-", name) for name in names)


@pytest.mark.slow
def test_the_name_of_a_sweep_is_no_part_of_its_runs(metarun: Command, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert metarun("-m", "algo=maml", "seed=1,2", f"sweep.name={name}", *TINY).code == 0
    assert len(folders(tmp_path)) == 2
    assert [sweep.name for sweep in sweeps.stored()] == ["two", "one"]


@pytest.mark.slow
def test_a_run_with_the_long_name_of_earlier_versions_is_kept(
    metarun: Command, tmp_path: Path
) -> None:
    words = ["-m", "algo=maml", "seed=1,2", *TINY]
    assert metarun(*words).code == 0
    with composition.composer() as compose:
        jobs = compose.jobs(words[1:], sweep=True)
    for job in jobs:
        named = [word for word in job.overrides if word not in ("device=cpu", "threads=1")]
        earlier = naming.slug(sorted(named), 160)
        job.folder.rename(job.folder.with_name(f"{earlier}-{job.folder.name[-8:]}"))
    answer = metarun(*words)
    assert answer.code == 0, answer.err
    assert "2 of 2 runs are finished, 2 of them before" in answer.out
    assert len(folders(tmp_path)) == 2
