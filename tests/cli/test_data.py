"""Tests of `metarun data`, its catalogue, and the configurations of the data sets."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metarun.config.build import keywords
from metarun.config.catalogue import conf_dir
from metarun.config.trust import locate
from metarun.data.storage import omniglot_files, registry
from metarun.data.storage.image_sets import Arrays, store_images
from metarun.data.storage.omniglot_files import FILES
from tests.conftest import Command
from tests.data.sources import write_class_folders, write_omniglot_zips
from tests.data.test_omniglot import TINY

NAMES = sorted(path.stem for path in (conf_dir() / "data").glob("*.yaml"))


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def zips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from metarun.data import omniglot
    from tests.data import sources

    for module in (omniglot, omniglot_files, sources):
        monkeypatch.setattr(module, "characters", lambda: TINY)
    write_omniglot_zips(tmp_path / "zips")
    return tmp_path / "zips"


def test_alone_it_lists_what_is_here_and_how_to_get_the_rest(metarun: Command) -> None:
    answer = metarun("data")
    assert answer.code == 0
    for name in NAMES:
        assert name in answer.out
    assert "metarun data omniglot" in answer.out


@pytest.mark.parametrize("width", [60, 80])
def test_the_list_fits_the_terminal(
    width: int, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = metarun("data").out.splitlines()
    assert len(lines) > 10
    assert max(map(len, lines)) <= width


def test_an_import_is_told_listed_verified_and_not_repeated(
    metarun: Command, zips: Path, own_root: Path
) -> None:
    answer = metarun("data", "omniglot", "--from", str(zips))
    assert answer.code == 0, answer.err
    assert f"omniglot is in {own_root / 'omniglot'}: 10 classes, 200 images" in answer.out
    listed = metarun("data").out
    # A long path is folded over several lines.
    assert f"availablein{own_root / 'omniglot'}" in "".join(listed.split())
    assert registry.missing("omniglot") is None
    answer = metarun("data", "omniglot", "--verify")
    assert (answer.code, "all files verified" in answer.out) == (0, True)
    answer = metarun("data", "omniglot", "--from", str(zips))
    assert answer.code == 2
    assert "is already in" in answer.err
    assert "delete that folder to import it again" in answer.err
    path = own_root / "omniglot" / "paper.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    answer = metarun("data", "omniglot", "--verify")
    assert (answer.code, "was changed since it was imported" in answer.err) == (2, True)
    assert "damaged" in metarun("data", "--verify").out


def test_another_root_can_be_named(metarun: Command, zips: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "other")
    assert metarun("data", "omniglot", "--from", str(zips), "--root", root).code == 0
    assert registry.missing("omniglot") is not None
    assert registry.missing("omniglot", root) is None
    assert (tmp_path / "other" / "omniglot" / "meta.json").is_file()


def test_a_users_folder_is_read_and_summed_up(metarun: Command, tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(10)]
    write_class_folders(tmp_path / "mine", dict.fromkeys(names, 3))
    answer = metarun("data", "folder", "--from", str(tmp_path / "mine"))
    assert answer.code == 0
    assert "train: 6 classes of 3 images" in answer.out
    (tmp_path / "mine" / "c3" / "0001.png").write_bytes(b"?")
    answer = metarun("data", "folder", "--from", str(tmp_path / "mine"))
    assert (answer.code, "0001.png cannot be read" in answer.err) == (2, True)


@pytest.mark.parametrize("name", ["sinusoid", "linear", "omniglot_small"])
def test_what_needs_no_fetching_says_so(metarun: Command, name: str) -> None:
    answer = metarun("data", name, "--verify")
    assert answer.code == 0
    assert re.search(rf"; type `metarun algo=\w+ data={name}`$", answer.out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["omniglt"], "unknown data set omniglt: did you mean omniglot?"),
        (["zzz"], "unknown data set zzz: choose from cifar_fs, csv, cub"),
        (
            ["--from"],
            "argument --from: expected one argument: expected `metarun data [-h] [--from PATH]",
        ),
        (["omniglot", "--form", "x"], "unrecognized arguments: --form x"),
        (["--from", "x"], "--from PATH needs the name of a data set"),
        (["omniglot_small", "--from", "x"], "is shipped with metarun: type it without --from"),
        (["omniglot", "--from", "nowhere"], "there is no such file or folder"),
        (["omniglot", "--verify"], "data=omniglot is not in"),
        (["miniimagenet"], "import files you have with --from PATH"),
        (["folder"], "check them with `metarun data folder --from PATH`"),
    ],
)
def test_bad_requests_end_with_one_line_and_make_nothing(
    metarun: Command, own_root: Path, words: list[str], message: str
) -> None:
    answer = metarun("data", *words)
    assert answer.code == 2
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert not own_root.exists()


def test_a_run_without_its_data_says_how_to_get_them(metarun: Command, tmp_path: Path) -> None:
    answer = metarun("algo=maml", "data=omniglot")
    assert answer.code == 2
    assert "fetch it with `metarun data omniglot`" in answer.err
    assert not (tmp_path / "outputs").exists()


def test_a_stream_without_its_data_says_how_to_get_them(metarun: Command) -> None:
    answer = metarun("algo=oml", "data=stream_omniglot")
    assert answer.code == 2
    assert "fetch it with `metarun data omniglot`" in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_missing_data_are_told_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from metarun.cli.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    words = [sys.executable, "-c", code, "algo=maml", "data=omniglot"]
    answer = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 2, answer.stderr
    assert "metarun data omniglot" in answer.stderr


def test_places_are_those_of_shipped_configurations() -> None:
    assert set(NAMES) >= registry.PLACES.keys()
    assert registry.missing("a users own") is None


def test_a_stream_says_whose_images_it_takes(metarun: Command) -> None:
    answer = metarun("data", "stream_omniglot")
    assert answer.out.startswith("stream_omniglot is made of the images of another data set")
    assert metarun("data", "stream_linear").out.startswith(
        "stream_linear is ready: no files are needed;"
    )


def test_a_stream_says_which_stored_images_it_can_transform(
    metarun: Command, tmp_path: Path
) -> None:
    blank = [np.zeros((28, 28), np.uint8)] * 10
    store_images("kmnist", Arrays("", [*"0123456789"], blank), tmp_path, 28, 1, "")
    answer = metarun("data", "stream_rotated", "--root", str(tmp_path))
    assert "data.source=digits, omniglot_small, kmnist; others" in answer.out
    listed = " ".join(metarun("data", "--root", str(tmp_path)).out.split())
    assert listed.count("data.source=digits, omniglot_small, kmnist; others") == 3


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("stream_")])
def test_a_configuration_has_the_options_and_defaults_of_its_class(name: str) -> None:
    from omegaconf import OmegaConf

    loaded: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "data" / f"{name}.yaml"))
    node = dict(loaded["data"])
    target = locate("data._target_", node.pop("_target_"))
    shared = {"augmentation"} if "defaults" in loaded else set()
    # Includes the keywords that `**options` passes on.
    assert set(keywords(target)) == {"setup", *node, *shared}
    # These say which of the data sets of a class it is.
    chosen = {"name", "split"} if "name" in node else set()
    for key, parameter in inspect.signature(target).parameters.items():
        if key in {"setup", *shared, *chosen} or parameter.kind is parameter.VAR_KEYWORD:
            continue
        default = parameter.default
        assert node[key] == (list(default) if isinstance(default, tuple) else default), key


def test_the_shipped_files_carry_their_licence() -> None:
    assert "Brenden Lake" in (FILES / "LICENSE.omniglot").read_text(encoding="utf-8")
