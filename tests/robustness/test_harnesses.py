"""A seeded sample of each harness: kills, corrupted files, hostile command lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the harnesses fork")


def failures(harness: str, number: int, seed: int) -> str:
    """Run a harness and return what it prints if a case failed."""
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
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.slow
def test_one_killed_run_equals_the_whole_run() -> None:
    assert not failures("kills", 1, seed=5)


@pytest.mark.slow
def test_some_corrupted_files_are_told() -> None:
    assert not failures("corruption", 5, seed=5)


@pytest.mark.slow
def test_some_hostile_command_lines_are_refused() -> None:
    assert not failures("command_lines", 5, seed=5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("harness", "number"), [("kills", 20), ("corruption", 200), ("command_lines", 300)]
)
def test_a_larger_sample_has_no_failures(harness: str, number: int) -> None:
    assert not failures(harness, number, seed=1)
