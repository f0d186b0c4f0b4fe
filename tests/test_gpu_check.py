"""`tests/gpu/check.py`, rehearsed on a machine without a GPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu import check
from tests.gpu.check import Check, Part, difference

Work = Callable[[Check, Part], None]


@pytest.fixture
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, check.ring)
    yield
    signal.signal(signal.SIGALRM, before)


def checked(folder: Path, monkeypatch: pytest.MonkeyPatch, *works: Work) -> Check:
    """A check that ran these parts, each with a limit of 0.1 seconds."""
    named = {work.__name__: (work, 0.1) for work in works}
    monkeypatch.setattr(check, "PARTS", named)
    made = Check(folder, "cpu", 10.0, [])
    for name in named:
        made.run(name)
    return made


def sleeps(made: Check, part: Part) -> None:
    """Sleeps."""
    made.add(part, begun=True)
    time.sleep(5.0)
    made.add(part, ended=True)


def breaks(made: Check, part: Part) -> None:  # noqa: ARG001
    """Breaks."""
    raise ZeroDivisionError("by nothing")


def differs(made: Check, part: Part) -> None:
    """Differs."""
    made.add(part, gap=0.5)
    part.hold("everything", 0.5)


@pytest.mark.usefixtures("alarm")
def test_a_part_is_cut_or_breaks_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checked(tmp_path, monkeypatch, sleeps, breaks, differs)
    assert made.failures == [
        "breaks: ZeroDivisionError: by nothing",
        "differs: everything differs by 5.0e-01",
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert [part["rows"] for part in report["parts"]] == [[{"begun": True}], [], [{"gap": 0.5}]]
    assert report["parts"][0]["notes"] == ["cut after 0 s: the rest was not run"]
    assert "| gap |\n| --- |\n| 0.5 |" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("alarm")
def test_a_limit_within_a_limit_leaves_the_outer_one_its_time() -> None:
    began = time.monotonic()

    def naps() -> None:
        with check.time_limit(0.3):
            with pytest.raises(check.TimeIsUpError), check.time_limit(0.1):
                time.sleep(5.0)
            assert time.monotonic() - began < 0.3
            time.sleep(5.0)

    with pytest.raises(check.TimeIsUpError):
        naps()
    assert time.monotonic() - began < 2.0


def test_a_difference_is_relative_to_the_largest_number_and_what_is_none_fails() -> None:
    expected = {"a": torch.tensor([1.0, -4.0]), "empty": torch.zeros(0)}
    found = {"a": torch.tensor([1.0, -4.5]), "empty": torch.zeros(0)}
    assert difference(found, expected) == 0.125
    part = Part("", "")
    part.hold("numbers", difference(expected, expected))
    assert not part.failures
    part.hold("no numbers", difference({**found, "a": found["a"] * torch.nan}, expected))
    assert part.failures == ["no numbers differs by nan"]


@pytest.mark.slow
def test_the_check_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    names = ["machine", "episodes", "contract", "replays", "speed", "resnet12", "processes"]
    words = ["--device", "cpu", "--minutes", "30", "--only", ",".join(names)]
    words += ["--output", str(tmp_path), "--learners", "maml,protonet,oml"]
    done = subprocess.run(
        [sys.executable, check.__file__, *words], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert [part["name"] for part in parts] == names
    assert all(part["rows"] for part in parts)
    assert not [note for part in parts for note in part["notes"] if "cut" in note]
    learners = [row["learner"] for row in parts[2]["rows"]]
    assert learners == ["maml", "maml", "protonet", "oml", "oml"]
    assert [row["processes"] for row in parts[6]["rows"]] == [1, 1, 2]
