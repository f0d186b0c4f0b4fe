"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from metarun.cli.main import main

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker and its subprocesses, set before torch is imported: OpenMP stalls
    # if more threads than cores wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class Answer(NamedTuple):
    """Exit code, stdout and stderr of a command line."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def metarun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """The command in an empty folder, called in this process, which saves seconds each time."""
    monkeypatch.chdir(tmp_path)
    # The command adds the current folder to sys.path; the copy undoes that.
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words: str) -> Answer:
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Answer(code, *capsys.readouterr())

    return call
