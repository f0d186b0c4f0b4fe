"""Tests of `hydra.searchpath`: it finds a user's YAML files wherever `--config-dir` does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from metarun.config.search_path import as_config_dir, own_folders
from metarun.reporting.single_run import _config_dir
from tests.conftest import Command
from tests.helpers import slow

SMALL = [
    "train.steps=1", "train.tasks_per_step=1", "eval.episodes=2", "eval.val_episodes=2",
    "eval.curve_steps=0", "threads=1",
]  # fmt: skip
FILE = "hydra.searchpath=[file://mine]"
PACKAGE = "hydra.searchpath=[pkg://third_party.conf]"
FILES = {
    "algo/myalgo.yaml": "# My algorithm\ndefaults:\n  - maml\n  - _self_\ninner_steps: 2\n",
    "backbone/mynet.yaml": "# My network\ndefaults:\n  - mlp\n  - _self_\nhidden: [3]\n",
    "data/mydata.yaml": "# @package _global_\n# My data\ndefaults:\n  - sinusoid\n  - _self_\n"
    "data:\n  amplitude: [1.0, 2.0]\n",
}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The same files in a folder, mine, and in a package, third_party.conf."""
    places = [tmp_path / "mine", tmp_path / "third_party/conf"]
    for place in places:
        for name, text in FILES.items():
            (place / name).parent.mkdir(parents=True)
            (place / name).write_text(text)
    # That of an earlier test is in another folder.
    monkeypatch.delitem(sys.modules, "third_party", raising=False)
    (tmp_path / "third_party/__init__.py").touch()
    (tmp_path / "third_party/conf/__init__.py").touch()
    return places


@pytest.mark.parametrize("place", [FILE, PACKAGE])
def test_files_compose_as_with_a_config_dir(place: str, metarun: Command) -> None:
    words = ["algo=myalgo", "data=mydata", "backbone=mynet", "--cfg", "job"]
    expected = metarun("--config-dir", "mine", *words)
    assert expected.code == 0, expected.err
    assert "inner_steps: 2" in expected.out
    assert metarun(place, *words) == expected
    assert metarun(*words, place) == expected


@pytest.mark.parametrize("place", [FILE, PACKAGE])
def test_files_are_listed_and_suggested(place: str, metarun: Command) -> None:
    assert "My algorithm" in metarun("list", "algo", place).out
    assert "algo.inner_steps = 2" in metarun("list", place, "algo", "myalgo").out
    assert "myalgo" in metarun(place, "--help").out
    assert metarun(place, "algo=myalgoo").err == "error: algo=myalgoo: did you mean myalgo?\n"


@pytest.mark.parametrize("place", [FILE, PACKAGE])
def test_a_file_with_a_shipped_name_is_refused(
    place: str, folders: list[Path], metarun: Command
) -> None:
    for folder in folders:
        (folder / "algo/maml.yaml").write_text("_target_: mine.Mine\n")
    for words in (["algo=maml", "--cfg", "job"], ["list", "algo"]):
        answer = metarun(*words, place)
        assert answer.code == 2
        assert "algo/maml.yaml has the name of a shipped file" in answer.err


@pytest.mark.parametrize("place", [FILE, slow(PACKAGE)])
def test_a_sweep_and_a_resumed_run_find_the_files(
    place: str, metarun: Command, tmp_path: Path
) -> None:
    words = [*SMALL, "algo=myalgo", "backbone=mynet"]
    assert metarun("-m", "data=mydata,sinusoid", *words, place).code == 0
    found = sorted(path.parent for path in (tmp_path / "outputs/sweeps").glob("*/results.json"))
    assert len(found) == 2
    stored = (found[0] / "overrides.yaml").read_text()
    assert "searchpath" not in stored
    resumed = metarun(f"resume={found[0]}", "train.steps=2", place)
    assert (resumed.code, resumed.err) == (0, "")
    without = metarun(f"resume={found[0]}", "train.steps=3")
    assert "repeat --config-dir if the run had one" in without.err
    repeated = metarun("-m", "data=mydata,sinusoid", *words, place)
    assert "2 of 2 runs are finished, 2 of them before" in repeated.out


def test_a_comparison_finds_the_files(metarun: Command) -> None:
    answer = metarun("compare", "algo=myalgo", "data=mydata", "backbone=mynet", "--table", PACKAGE)
    assert answer.code == 0, answer.err
    assert "myalgo" in answer.out


def test_the_command_of_a_report_finds_the_files_again() -> None:
    typed = ["metarun", "algo=mine", "hydra.searchpath=[file://a b]", "--config-dir", "mine"]
    assert _config_dir(typed) == ["hydra.searchpath=[file://a b]", "--config-dir", "mine"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra.searchpath=[file://no]", "there is no folder no; check the path"),
        ("hydra.searchpath=[pkg://no.conf]", "there is no package no.conf"),
        ("hydra.searchpath=[pkg://os]", "there is no package os"),
        ("hydra.searchpath=[s3://bucket]", "expected file://FOLDER or pkg://PACKAGE"),
        ("hydra.searchpath=mine", "expected a list, such as hydra.searchpath=[file://my_conf]"),
        ("hydra.searchpath=a,b", "expected a list"),
        ("hydra.searchpath=[", "cannot read"),
    ],
)
def test_a_place_that_is_not_there_is_refused_in_one_line(
    word: str, message: str, metarun: Command
) -> None:
    answer = metarun("algo=maml", word, "--cfg", "job")
    assert answer.code == 2
    assert message in answer.err
    assert answer.err.count("\n") == 1


def test_several_places_are_one_config_dir(
    metarun: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more/optim").mkdir(parents=True)
    (tmp_path / "more/optim/slow.yaml").write_text("defaults:\n  - adam\n  - _self_\nlr: 1e-9\n")
    argv = ["list", "--config-dir=mine", "hydra.searchpath=[more]", "algo"]
    words = as_config_dir(argv)
    assert words == ["list", "algo", "--config-dir", f"mine{os.pathsep}more"]
    assert own_folders(words[-1]) == [Path("mine"), Path("more")]
    both = metarun("--config-dir", "mine", "hydra.searchpath=[more]", "algo=myalgo", "optim=slow",
                   "--cfg", "job", "--package", "optim.lr")  # fmt: skip
    assert both.out.strip() == "1e-09"
    assert as_config_dir(["algo=maml", "-cd", "mine"]) == ["algo=maml", "-cd", "mine"]
