"""Tests of the names that stand for a run: a path, `last`, a part of a folder's name, a sweep."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from metarun.runs import sweeps
from metarun.runs.find import endings, find_run, find_runs, newest_first, run_folders
from metarun.runs.folder import RunFolder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_run(path: str, time: str = "2026-11-21T09:30:00") -> Path:
    run = RunFolder.create(path, config="names: {}\n")
    (run.path / "status.json").write_text(json.dumps({"state": "finished", "time": time}))
    return run.path


def test_last_is_the_run_at_work_last_also_one_of_a_sweep() -> None:
    a_run("outputs/2026-11-22/09-00-00-maml-sinusoid-aaaaaa", "2026-11-22T09:05:00")
    in_sweep = a_run("outputs/sweeps/algo=anil-12345678", "2026-11-22T10:00:00")
    a_run("outputs/2026-11-21/23-00-00-maml-sinusoid-bbbbbb", "2026-11-21T23:05:00")
    assert find_run("last") == in_sweep
    assert RunFolder.open("last").path == in_sweep


def test_of_runs_in_the_same_second_the_one_written_last_is_newer() -> None:
    one, other = a_run("outputs/b"), a_run("outputs/a")
    os.utime(one / "status.json", (1, 1))
    assert newest_first([one, other]) == [other, one]


def test_a_damaged_status_has_the_time_of_its_file() -> None:
    one, other = a_run("outputs/one", "2026-11-21T09:30:00"), a_run("outputs/other")
    (other / "status.json").write_text("{")
    os.utime(other / "status.json", (1, 1))
    assert newest_first([other, one]) == [one, other]


def test_a_part_of_the_name_of_one_folder_stands_for_it() -> None:
    one = a_run("outputs/2026-11-22/09-00-00-maml-sinusoid-a1b2c3")
    other = a_run("outputs/2026-11-22/09-00-00-maml-omniglot-d4e5f6")
    a_run("outputs/2026-11-23/09-00-00-maml-omniglot-d4aaaa")
    assert find_run("a1b2") == one
    assert find_run("22/09-00-00-maml-omni") == other
    assert find_run(other.name) == other


def test_the_shown_end_of_a_name_stands_for_its_run_alone() -> None:
    long = "outputs/sweeps/algo=maml_data=sinusoid_eval.episodes=20_seed="
    runs = [
        *(a_run(f"{long}{seed}-a1b2c3{seed}{seed}") for seed in range(3)),
        a_run("outputs/mine"),
        a_run("outputs/2026-11-22/run-1"),
        a_run("outputs/2026-11-22/run-10"),
        a_run("outputs/twice/mine-too"),
        a_run("outputs/once/mine-too"),
    ]
    ends = endings(runs, runs)
    assert ends[:3] == ["a1b2c300", "a1b2c311", "a1b2c322"]
    assert ends[3:6] == ["mine", "run-1", "run-10"]
    # The same name twice: the whole path is needed.
    assert ends[6:] == ["outputs/twice/mine-too", "outputs/once/mine-too"]
    assert [find_run(end) for end in ends] == runs


def test_each_shown_end_is_the_shortest_that_no_other_name_contains() -> None:
    generator = random.Random(0)
    runs = [
        Path("-".join("".join(generator.choices("ab", k=3)) for _ in range(4))) for _ in range(60)
    ]
    for run, shown in zip(runs, endings(runs, runs), strict=True):
        words = run.name.split("-")
        ends = ["-".join(words[start:]) for start in (2, 1)]
        alone = [end for end in ends if sum(end in other.name for other in runs) == 1]
        assert shown == (alone[0] if alone else run.name)


def test_naming_all_runs_takes_work_in_proportion_to_their_number() -> None:
    def lines_executed(number: int) -> int:
        runs = [Path(f"09-00-00-maml-sinusoid-{index:06x}") for index in range(number)]
        executed = 0

        def trace(_: FrameType, event: str, __: object) -> Any:
            nonlocal executed
            executed += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            endings(runs, runs)
        finally:
            sys.settrace(before)
        return executed

    assert lines_executed(200) < 2.2 * lines_executed(100)


def test_a_whole_name_is_not_a_part_of_another() -> None:
    one = a_run("outputs/sweeps/seed=1")
    a_run("outputs/sweeps/seed=11")
    assert find_run("seed=1") == one


def test_an_existing_path_stands_for_itself() -> None:
    a_run("outputs/2026-11-22/09-00-00-maml-sinusoid-a1b2c3")
    for name in ("last", "a1b2c3"):
        assert find_run(name) != Path(name)
        Path(name).mkdir()
        assert find_run(name) == Path(name)


def test_of_several_runs_the_five_newest_are_named_first() -> None:
    for day in range(1, 8):
        a_run(f"outputs/2026-11-0{day}/maml-{day}", f"2026-11-0{day}T09:00:00")
    with pytest.raises(ValueError, match="maml is a part of the names of 7 runs") as error:
        find_run("maml")
    listed = str(error.value).partition("one: ")[2]
    named = [Path(part).name for part in listed.removesuffix(" and 2 older ones").split(", ")]
    assert named == ["maml-7", "maml-6", "maml-5", "maml-4", "maml-3"]
    assert listed.endswith(" and 2 older ones")


def test_a_name_of_no_run_is_answered_with_the_nearest() -> None:
    a_run("outputs/sweeps/algo=protonet_seed=1-abcd1234")
    with pytest.raises(ValueError, match=r"such as algo=protonet_seed=1-abcd1234$") as error:
        find_run("algo=protonte_seed=1")
    assert str(error.value).startswith("algo=protonte_seed=1: there is no such folder: expected")


def test_without_runs_there_is_no_last_one() -> None:
    with pytest.raises(ValueError, match="last: there is no run below outputs/: type"):
        find_run("last")


def test_a_meta_test_inside_a_run_is_no_run() -> None:
    run = a_run("outputs/one")
    (run / "tests/shot=5").mkdir(parents=True)
    (run / "tests/shot=5/config.yaml").touch()
    assert run_folders(Path("outputs")) == [run]


# Sweeps.


def test_a_sweep_stands_for_its_runs_that_have_begun() -> None:
    one = a_run("outputs/sweeps/seed=1-aaaa")
    a_run("outputs/sweeps/seed=3-cccc")
    runs = ["outputs/sweeps/seed=1-aaaa", "outputs/sweeps/seed=2-bbbb"]
    sweeps.Sweep("rates", "2026-11-21T09:30:00", ["-m", "seed=1,2"], runs).store()
    assert find_runs("rates") == [one]
    with pytest.raises(ValueError, match="rates is a sweep: expected one run"):
        find_run("rates")
    assert find_runs("cccc") == [Path("outputs/sweeps/seed=3-cccc")]
    assert find_runs("outputs") == [Path("outputs")]
    assert run_folders(Path("outputs")) == [one, Path("outputs/sweeps/seed=3-cccc")]


def test_a_sweep_without_folders_says_so() -> None:
    sweeps.Sweep("rates", "2026-11-21T09:30:00", [], ["outputs/sweeps/seed=2-bbbb"]).store()
    with pytest.raises(ValueError, match="sweep rates: none of its 1 runs has a folder"):
        find_runs("rates")


def test_a_name_is_taken_by_other_runs_alone() -> None:
    assert sweeps.free_name("day-seed", ["a", "b"]) == "day-seed"
    sweeps.Sweep("day-seed", "", [], ["a", "b"]).store()
    assert sweeps.free_name("day-seed", ["a", "b"]) == "day-seed"
    assert sweeps.free_name("day-seed", ["a"]) == "day-seed-2"


@pytest.mark.parametrize("text", ["{", "[]", '{"time": ""}', '{"command": 1, "runs": 2}'])
def test_a_damaged_file_of_a_sweep_is_named(text: str) -> None:
    sweeps.Sweep("rates", "", [], []).store()
    (sweeps.INDEX / "rates.json").write_text(text)
    with pytest.raises(ValueError, match=r"rates\.json is damaged .*: remove it and repeat"):
        find_runs("rates")


def test_the_name_of_a_sweep_is_no_path() -> None:
    Path("outputs/sweeps/.index").mkdir(parents=True)
    Path("outputs/sweeps/other.json").write_text("{")
    assert sweeps.find("../other") is None
