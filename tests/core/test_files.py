"""Tests of writing into a folder, and reading archives, that come from somebody else."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from metarun.core.archives import read_arrays
from metarun.core.files import csv_cell, inner_folder, open_inside, to_npz, write_atomically


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of the user, to which a link in a run's folder leads."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/link").symlink_to(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("mode", ["a", "ab", "a+", "r+b"])
def test_a_file_is_not_opened_through_a_link(mode: str, mine: Path) -> None:
    link = mine.parent / "run/link"
    with pytest.raises(ValueError, match="link is a link, and metarun writes through no link"):
        open_inside(link, mode)  # type: ignore[arg-type]
    assert mine.read_text() == "mine"
    link.unlink()
    link.write_text("own")
    with open_inside(link, mode) as file:  # type: ignore[arg-type]
        file.seek(0, os.SEEK_END)
        file.write(b"+" if "b" in mode else "+")
    assert link.read_text() == "own+"


def test_a_link_is_replaced_and_what_it_leads_to_stays(mine: Path) -> None:
    link = mine.parent / "run/link"
    temporary = link.with_name(f".link.{os.getpid()}.tmp")
    temporary.symlink_to(mine)
    write_atomically(link, b"new")
    assert (mine.read_text(), link.read_text()) == ("mine", "new")
    assert not link.is_symlink()
    assert not temporary.is_symlink()


def test_a_folder_is_not_entered_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link is a link"):
        inner_folder(tmp_path / "link")
    assert inner_folder(tmp_path / "a/b").is_dir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(ValueError, match="lock is not an ordinary file"):
        open_inside(tmp_path / "lock", "a+")


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("+x", "'+x"), ("-cmd|' /C calc'!A0", None),
        ("\tx", "'\tx"), ("\rx", "'\rx"), ("-", "'-"), ("-1.5", "-1.5"), ("+1e-3", "+1e-3"),
        ("-inf", "-inf"), ("cat", "cat"), ("a=b", "a=b"), ("", ""), (-1.5, -1.5),
    ],
)  # fmt: skip
def test_a_cell_that_a_spreadsheet_would_run_is_quoted(value: object, cell: object) -> None:
    assert csv_cell(value) == (f"'{value}" if cell is None else cell)


def test_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5.0), "b": np.array(["x", "y"]), "c": np.zeros((0, 3))}
    (tmp_path / "x.npz").write_bytes(to_npz(arrays))
    found = read_arrays(tmp_path / "x.npz")
    assert list(found) == ["a", "b", "c"]
    assert all((found[name] == arrays[name]).all() for name in arrays)
    assert list(read_arrays(tmp_path / "x.npz", lambda name: name == "b")) == ["b"]


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.npy", bytes(10**7), "would unpack to 10.0 MB, more than 20 times its size"),
        ("a.npy", header("(10000000000,)") + bytes(80), "is not as its header says"),
        ("a.npy", b"no array", "a.npy is no array"),
        ("a.npy", header("nothing"), "a.npy is no array"),
    ],
)
def test_an_archive_that_is_larger_than_it_looks_is_refused(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    with pytest.raises(ValueError, match=message):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("data", [b"", b"PK", b"\x80\x04N."])
def test_what_is_no_archive_is_damaged(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.npz is damaged"):
        read_arrays(tmp_path / "x.npz")


def test_objects_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="array a holds Python objects, which are never unpickled"):
        read_arrays(tmp_path / "x.npz")
