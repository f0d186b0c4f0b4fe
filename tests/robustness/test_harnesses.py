"""A seeded sample of each harness, and whether those of this folder find a planted fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robustness import full_disks
from tests.robustness.disks import can_mount
from tests.robustness.forked import Answer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the harnesses fork")


def check(harness: str, number: int, seed: int) -> None:
    """Run a harness, and fail with all that it prints if a case fails."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            f"tests.robustness.{harness}",
            f"--number={number}",
            f"--seed={seed}",
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harness", "number"),
    [("kills", 20), ("corruption", 200), ("command_lines", 300), ("pairs", 16)],
)
def test_a_sample_of_a_harness_has_no_failures(harness: str, number: int) -> None:
    check(harness, number, seed=1)


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="this user may mount no disks: `unshare -rm` fails")
@pytest.mark.parametrize(
    ("harness", "number"), [("full_disks", 20), ("no_inodes", 10), ("failing_trackers", 9)]
)
def test_a_sample_on_small_disks_has_no_failures(harness: str, number: int) -> None:
    check(harness, number, seed=1)


@pytest.mark.parametrize(
    ("code", "err", "said"),
    [
        (0, "", None),
        (1, "error: no space is left for a.json: free some and repeat the command", None),
        (1, "error: no room for more files is left for a.json: remove some", None),
        (1, "error: No space left on device", "no word of a full disk"),
        (1, "error: no space is left for a.json", "no word of what to do"),
    ],
)
def test_a_line_about_a_full_disk_says_so_and_what_to_do(
    code: int, err: str, said: str | None
) -> None:
    found = full_disks.unclear(Answer(code, "", err))
    assert said in found if said and found else found is said


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (".a.json.7.tmp", b"", ".a.json.7.tmp is left behind"),
        ("lock", b"", "lock is left behind"),
        ("results.json", b'{"a": ', "results.json is torn"),
        ("episodes.npz", b"PK", "episodes.npz is torn"),
        ("report.html", b"", "report.html is empty"),
    ],
)
def test_a_file_that_is_half_written_is_found(
    name: str, data: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / "whole.json").write_bytes(b"{}")
    (tmp_path / name).write_bytes(data)
    assert list(full_disks.torn(tmp_path)) == [said]


def test_a_file_that_is_lost_or_changed_is_found(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("1")
    before = full_disks.contents(tmp_path)
    assert full_disks.lost(before, tmp_path, "test", tmp_path) is None
    (tmp_path / "a.csv").write_text("2")
    assert full_disks.lost(before, tmp_path, "test", tmp_path) == "a.csv has changed"
    (tmp_path / "a.csv").unlink()
    assert full_disks.lost(before, tmp_path, "test", tmp_path) == "a.csv is gone"


def test_two_folders_that_are_not_the_same_are_told_apart(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "list.csv").write_text(folder[0])
    one, other = tmp_path / "one", tmp_path / "other"
    assert list(full_disks.unlike(one, other)) == []
    (other / "list.csv").write_text("b")
    assert list(full_disks.unlike(one, other)) == ["list.csv differs"]
    (other / "list.csv").unlink()
    assert list(full_disks.unlike(one, other)) == ["list.csv is missing"]
