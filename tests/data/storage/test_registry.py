"""Tests of where data sets are stored."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from metarun.data.storage.registry import default_root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("METARUN_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="the place on Linux")
def test_the_place_is_the_systems_folder_of_caches(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_root() == home / ".cache/metarun"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "caches"))
    assert default_root() == home / "caches/metarun"


def test_data_sets_of_earlier_versions_are_found(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".cache/metarun").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "caches"))
    assert default_root() == home / ".cache/metarun"


def test_a_place_that_is_named_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".cache/metarun").mkdir(parents=True)
    monkeypatch.setenv("METARUN_DATA", "~/data")
    assert default_root() == home / "data"
