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
@pytest.mark.parametrize(
    ("harness", "number"), [("kills", 20), ("corruption", 200), ("command_lines", 300)]
)
def test_a_sample_of_a_harness_has_no_failures(harness: str, number: int) -> None:
    assert not failures(harness, number, seed=1)
