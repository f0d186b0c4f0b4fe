"""Tests of the command line: exit codes, one-line errors, and the files of a run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarun import __version__
from metarun.cli import report
from metarun.cli.main import main
from metarun.config.build import build_experiment
from metarun.config.catalogue import GROUPS, conf_dir, entries
from metarun.jobs import estimate, train
from tests.conftest import Command
from tests.helpers import composed

TINY = [
    "train.steps=2", "train.tasks_per_step=2", "eval.episodes=4", "eval.val_episodes=4",
    "eval.tasks_per_batch=4", "eval.curve_steps=1", "device=cpu",
]  # fmt: skip

OWN = """\
from metarun.algorithms.optimization.maml import MAML

class Mine(MAML):
    pass

class Fails(MAML):
    def update(self, batch, progress):
        raise {error}
"""


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "metarun", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **environment},
        timeout=120,
    )


def runs(folder: Path) -> list[Path]:
    """Return the run folders below outputs/, sorted by name."""
    return sorted(path.parent for path in (folder / "outputs").rglob("results.json"))


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


def check_refused(done: subprocess.CompletedProcess[str], folder: Path, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr
    assert list(folder.iterdir()) == []


# Commands that run nothing.


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"metarun {__version__}\n")


def test_the_words_help_and_version_mean_the_options(metarun: Command) -> None:
    assert metarun("version").out == f"metarun {__version__}\n"
    assert metarun("help").out == metarun("--help").out


def test_an_estimate_names_what_every_run_takes_and_writes_nothing(
    metarun: Command, tmp_path: Path
) -> None:
    words = ["-m", "algo=maml,nearest", "data=sinusoid", "train.steps=1000", "device=cpu"]
    answer = metarun(*words, "eval.episodes=20", "eval.val_episodes=20", "--estimate")
    assert answer.code == 0, answer.err
    # What the runs have in common is in the heading, in any order.
    for word in ("run", "a step", "training", "meta-val", "meta-test", "memory", "disk"):
        assert word in answer.out
    lines = answer.out.splitlines()
    assert [line.split("  ")[0] for line in lines if " on sinusoid" in line] == [
        "maml on sinusoid",
        "nearest on sinusoid",
    ]
    assert "in all, one run after the other" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_counts_every_option_that_meta_val_chooses_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "_seconds_of", lambda *_: 10.0)
    monkeypatch.setattr(estimate, "_seconds_of_step", lambda _: 1.0)
    words = ["algo=oml", "data=stream_incremental_sine", "algo.online_lr=[0.1,0.2,0.3]"]
    words += ["train.steps=200", "train.eval_every=100", "device=cpu"]
    found = estimate.estimate(build_experiment(composed(*words)))
    # Two evaluations of three rates, and a meta-test.
    assert (found.training, found.validation, found.test) == (200.0, 60.0, 10.0)
    found = estimate.estimate(build_experiment(composed(*words, "train.rehearse=30")))
    assert (found.training, found.validation) == (30.0, 30.0)
    nothing = estimate.estimate(build_experiment(composed("algo=nearest", "data=linear")))
    assert (nothing.step, nothing.training, nothing.validation) == (0.0, 0.0, 10.0)


@pytest.mark.parametrize("option", ["--estimate", "--rehearse"])
@pytest.mark.parametrize("verb", ["resume", "test"])
def test_a_stored_run_is_neither_estimated_nor_rehearsed(
    metarun: Command, option: str, verb: str
) -> None:
    answer = metarun(f"{verb}=last", option)
    assert answer.code == 2
    assert answer.err == f"error: {option} is for new runs: type it without {verb}=\n"


def test_a_rehearsal_goes_through_all_of_a_run_in_little_time(
    metarun: Command, tmp_path: Path
) -> None:
    words = ["experiment=finn2017_sinusoid_5shot", "device=cpu", "train.rehearse=0.1"]
    answer = metarun(*words, "--rehearse", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["steps"] < 70000
    assert results["val"]["episodes"] == 20
    assert results["test"]["episodes"] == 50
    assert "(partial)" in answer.out
    # `last` stands for a run below outputs/.
    assert "next: `metarun report run` draws it, `metarun test=run shot=10` tests" in answer.out


def test_help_names_every_form_and_every_word_to_choose(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in (
        "resume=",
        "test=",
        "compare",
        "metarun list",
        "metarun list runs",
        "metarun diff RUN RUN",
        "metarun data",
        "metarun predict RUN",
        "metarun export RUN",
        "init=RUN|FILE",
        "metarun report PATH",
        "bench",
        "protonet",
        "-m",
    ):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "for_sinusoid" not in done.stdout


def test_cfg_shows_the_configuration_and_runs_nothing(tmp_path: Path) -> None:
    done = run("--cfg", "job", "--resolve", "shot=7", cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(r"^shot: 7$", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--info", "defaults"],
        ["--hydra-help"],
        ["--hydra-help", "algo=maml"],
        ["-sc", "query=bash"],
    ],
)
def test_hydras_own_flags_work(words: list[str], tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path, COMP_LINE="metarun algo=", COMP_POINT="13")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_completion_offers_the_algorithms(tmp_path: Path) -> None:
    line = "metarun algo=proton"
    done = run("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.stdout.split() == ["algo=protonet"]


def test_list_names_everything_with_one_line_each_in_80_columns(tmp_path: Path) -> None:
    done = run("list", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("maml", "protonet", "sinusoid", "omniglot_small", "resnet12", "quick_start"):
        assert re.search(rf"^ *{word}\s+\w", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not re.search(r" $", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("words", [["--help"], ["list"]], ids=" ".join)
def test_what_there_is_fits_a_terminal_with_room_to_read(
    words: list[str], columns: int, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = metarun(*words).out.splitlines()
    assert max(map(len, lines)) <= columns
    # Text squeezed into the right half would leave most of each line blank.
    assert all(len(line) - len(line.lstrip()) <= columns // 2 + 1 for line in lines)


def test_a_narrow_help_says_every_word_that_the_wide_one_says(
    metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    wide = metarun("--help").out
    monkeypatch.setenv("COLUMNS", "60")
    narrow = metarun("--help").out
    assert narrow != wide
    assert narrow.split() == wide.split()


def test_every_listed_yaml_has_a_line_about_it() -> None:
    for group in GROUPS:
        for word, text in entries([conf_dir()], group).items():
            assert text, f"{group}/{word}.yaml has no comment that says what it is"


# Invalid requests.


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["algo=mmal"], ["algo=mmal", "did you mean maml?"]),
        (["train.stpes=3"], ["did you mean train.steps?"]),
        (["+new=3"], ["there is no key new"]),
        (["-m", "algo=maml", "seed=1,x"], ["seed=x: expected a whole number"]),
        (["-m", "experiment=glob(nothing*)"], ["selects nothing"]),
        (["lsit"], ["did you mean `metarun list`?"]),
        (["algo=maml", "list"], ["type the subcommand first, as in `metarun list …`"]),
        (["resume", "outputs"], ["type resume=RUN, with the folder of a run"]),
        (["--mutlirun"], ["did you mean --multirun?"]),
        (["--cfg", "jbo"], ["'jbo'"]),
        (["--cfg", "job", "shto=3"], ["did you mean shot?"]),
        (["--resolve"], ["type --cfg job --resolve"]),
        (["-m", "--cfg", "job"], ["type them without -m"]),
        (["data", "hydra.searchpath=[mine]"], ["unknown data set hydra.searchpath=[mine]"]),
        (["predict"], ["required: RUN, --support, --query"]),
        (["export"], ["required: RUN, --format"]),
        (["--config-dir", "nowhere"], ["there is no such folder"]),
        (["--experimental-rerun", "x.pickle"], ["resume="]),
        (["algo=protonet", "data=sinusoid"], ["ProtoNet learns classification"]),
        (["backbone=conv4"], ["conv4"]),
        (["data=omniglot_small", "way=500"], ["500"]),
        (["data=omniglot_small", "shot=15", "query=15"], ["15"]),
        (["-m", "data=omniglot_small", "way=5,500"], ["500"]),
        (["hydra.output_subdir=.hydra"], ["cannot be changed"]),
        (["list", "everything"], ["list everything: unknown group, expected one of algo, data"]),
        (["resume=nowhere"], ["nowhere"]),
        (["resume=last"], ["last: there is no run below outputs/"]),
        (["diff", "last", "last"], ["last: there is no run below outputs/"]),
        (["seed=1", "sweep.name=mine"], ["sweep.name=mine is for sweeps: add -m"]),
        (["-m", "seed=1,2", "sweep.name=a/b"], ["sweep.name=a/b: expected letters, digits"]),
        (["-m", "seed=1,2", "sweep.name=last"], ["sweep.name=last: expected"]),
        (["-m", "seed=1,2", "sweep.name=a,b"], ["sweep.name=a,b: it belongs to the sweep"]),
        (["list", "runs", "algo"], ["list runs algo: expected `metarun list runs` alone"]),
        (["algo=maml", "--config-dir", ".", "list"], ["type the subcommand first"]),
        (["test=nowhere"], ["nowhere"]),
        (["resume="], ["resume= is empty: expected the folder of a run"]),
        (["test=", "shot=5"], ["test= is empty"]),
        (["resume=a", "test=b"], ["resume= and test= exclude each other"]),
        (["resume=a", "-m", "seed=1,2"], ["resume= takes one run: type it without -m"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_is_one_line_and_exit_code_2_and_makes_nothing(
    words: list[str], parts: list[str], metarun: Command, tmp_path: Path
) -> None:
    answer = metarun(*words)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    for part in parts:
        assert part in answer.err
    assert list(tmp_path.iterdir()) == []


def test_the_process_itself_says_no_more_than_that(tmp_path: Path) -> None:
    done = run("algo=protonet", "data=sinusoid", cwd=tmp_path)
    check_refused(done, tmp_path, "ProtoNet learns classification")


def test_missing_data_are_answered_at_once_with_the_command(tmp_path: Path) -> None:
    done = run("algo=maml", "data=omniglot", cwd=tmp_path, METARUN_DATA=str(tmp_path / "no"))
    check_refused(done, tmp_path, "metarun data omniglot")


def test_a_run_is_never_written_over_what_is_there(metarun: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    answer = metarun("algo=maml", "hydra.run.dir=mine")
    assert answer.code == 2
    assert "mine exists and is not empty" in answer.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine"]


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_a_tilde_after_an_equals_sign_is_the_home_folder(
    quote: str, metarun: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "me"))
    answer = metarun("data=folder", "algo=protonet", f"data.root={quote}~/photos{quote}")
    assert f"data.root={tmp_path / 'me/photos'}: there is no such folder" in answer.err


def test_batches_of_no_run_in_a_sweep_are_refused(metarun: Command, tmp_path: Path) -> None:
    answer = metarun("-m", "seed=1,2", "hydra.sweeper.max_batch_size=0")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "hydra.sweeper.max_batch_size=0: expected 1 or more, or null" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_outputs_belong_is_refused(metarun: Command, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("precious")
    answer = metarun(*TINY)
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert (tmp_path / "outputs").read_text() == "precious"


def test_a_disk_without_space_is_refused_before_anything_is_made(
    metarun: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    answer = metarun(*TINY)
    assert answer.code == 2
    assert "free" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_came_from(metarun: Command) -> None:
    with pytest.raises(ValueError, match="way=0"):
        metarun("way=0", "debug=true")


def test_a_reader_that_stops_reading_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m metarun list | true"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)


@given(words=st.lists(TEXT | st.builds("{}={}".format, TEXT, TEXT), max_size=3))
@settings(max_examples=30, deadline=None)
def test_hostile_words_get_an_answer_and_never_a_traceback(words: list[str]) -> None:
    before = sorted(Path.cwd().iterdir())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--cfg", "job", *words])
    assert code in (0, 2)
    if code == 2:
        assert err.getvalue().startswith("error: ")
        assert err.getvalue().count("\n") == 1
    assert sorted(Path.cwd().iterdir()) == before


# Commands that run.


def test_a_run_trains_tests_and_says_where_its_files_are(tmp_path: Path) -> None:
    done = run("algo=maml", "data=sinusoid", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = runs(tmp_path)
    assert re.fullmatch(
        r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-maml-sinusoid-[0-9a-f]{6}",
        folder.relative_to(tmp_path).as_posix(),
    )
    assert folder.name in "".join(done.stdout.split())
    assert status(folder)["state"] == "finished"
    results = json.loads((folder / "results.json").read_text())
    assert (results["algo"], results["data"], results["shot"]) == ("maml", "sinusoid", 5)
    assert not (folder / ".hydra").exists()
    assert not list(folder.glob("cli.log"))


def test_a_bare_command_says_that_it_is_the_quick_start(
    metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[dict[str, Any]] = []
    drawn: list[list[str]] = []
    monkeypatch.setattr(train, "train", lambda config, *_: trained.append(config))
    monkeypatch.setattr(train, "tell_next", lambda _: None)
    monkeypatch.setattr(report, "run", lambda args: drawn.append(args.paths) or 0)
    answer = metarun()
    assert answer.code == 0, answer.err
    assert answer.out.startswith("quick start: ")
    assert [config["names"]["experiment"] for config in trained] == ["quick_start"]
    assert len(drawn) == 1
    assert not metarun("algo=maml").out.startswith("quick start: ")
    assert len(drawn) == 1


def test_options_and_words_mix_in_any_order(metarun: Command, tmp_path: Path) -> None:
    answer = metarun("algo=maml", "-m", "seed=1,2", *TINY)
    assert answer.code == 0, answer.err
    first, second = runs(tmp_path)
    assert first.parent == second.parent
    seeds = [json.loads((f / "results.json").read_text())["seed"] for f in (first, second)]
    assert sorted(seeds) == [1, 2]


@pytest.mark.slow
def test_runs_that_start_together_have_folders_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "metarun", "algo=maml", "data=sinusoid", *TINY]
    started = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    assert len(runs(tmp_path)) == 2


def own(folder: Path, error: str = "AssertionError('never')") -> list[str]:
    """Write a user's algorithm into a folder; return the options that make it available."""
    # A unique name, since all tests of this process share the imported modules.
    module = re.sub(r"\W", "_", f"own_{folder.parent.name}_{folder.name}")
    (folder / "conf/algo").mkdir(parents=True)
    (folder / f"{module}.py").write_text(OWN.format(error=error))
    for name in ("Mine", "Fails"):
        (folder / f"conf/algo/{name.lower()}.yaml").write_text(
            f"# One of my own\ndefaults:\n  - maml\n  - _self_\n_target_: {module}.{name}\n"
        )
    return ["--config-dir", "conf"]


def test_an_algorithm_of_ones_own_runs_from_the_current_folder(tmp_path: Path) -> None:
    done = run(*own(tmp_path), "algo=mine", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: there is no recipe for algo=mine data=sinusoid" in done.stderr
    (folder,) = runs(tmp_path)
    assert json.loads((folder / "results.json").read_text())["algo"] == "mine"


def test_a_run_that_fails_is_one_line(metarun: Command, tmp_path: Path) -> None:
    conf = own(tmp_path, error="RuntimeError('out of\\nluck')")
    answer = metarun(*conf, "algo=fails", *TINY)
    assert answer.code == 1
    assert "error: RuntimeError: out of luck (debug=true shows where)\n" in answer.err
    assert "Traceback" not in answer.err


def test_a_constructor_of_ones_own_that_fails_is_one_line(metarun: Command, tmp_path: Path) -> None:
    conf = own(tmp_path)
    (module,) = tmp_path.glob("own_*.py")
    module.write_text(
        OWN.format(error="AssertionError").replace(
            "    pass",
            "    def __init__(self, setup, **options):\n        raise RuntimeError('no luck')",
        )
    )
    answer = metarun(*conf, "algo=mine", *TINY)
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert "RuntimeError: no luck" in answer.err
    assert not (tmp_path / "outputs").exists()


def test_a_pair_without_a_recipe_says_so_once(metarun: Command, tmp_path: Path) -> None:
    answer = metarun(*own(tmp_path), "-m", "algo=mine", "seed=1,2", *TINY)
    assert answer.err.count("note: there is no recipe") == 1


def test_an_experiment_is_itself_the_recipe(metarun: Command, tmp_path: Path) -> None:
    words = own(tmp_path)
    (tmp_path / "conf/experiment").mkdir()
    (tmp_path / "conf/experiment/ours.yaml").write_text(
        "# @package _global_\n# Ours\ndefaults:\n  - override /algo: mine\n  - _self_\n"
    )
    answer = metarun(*words, "experiment=ours", *TINY)
    assert answer.code == 0, answer.err
    assert "no recipe" not in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_run_and_ends_the_whole_sweep_with_its_code(
    number: signal.Signals, tmp_path: Path
) -> None:
    words = ["-m", "algo=maml", "data=sinusoid", "seed=1,2", "train.steps=1000000", "device=cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "metarun", *words, "train.log_every=10"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    (folder,) = (path.parent for path in (tmp_path / "outputs").rglob("status.json"))
    assert status(folder)["state"] == "interrupted"
    assert f"metarun resume={folder.relative_to(tmp_path)}" in err


@pytest.mark.parametrize(
    "command",
    [
        "bench",
        "compare",
        "data",
        "diff",
        "export",
        "features",
        "list",
        "predict",
        "report",
        "table",
    ],
)
def test_an_option_that_a_command_has_not_is_answered_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--optoin", "x"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert f": expected `metarun {command} " in line


def test_modules_in_the_current_folder_are_not_imported_unless_named(tmp_path: Path) -> None:
    for name in ("yaml", "hydra", "rich", "hydra_plugins/evil", "torch"):
        path = tmp_path / name / "__init__.py"
        path.parent.mkdir(parents=True)
        path.write_text("raise AssertionError('it was imported')\n")
    for words in (["list", "algo"], ["algo=maml", "--cfg", "job"]):
        done = run(*words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
