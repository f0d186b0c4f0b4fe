"""Tests of the wheel, the sdist and an editable install, outside any source tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ["conf", "metarun", "tests", "README.md", "LICENSE", "CONTRIBUTING.md", "pyproject.toml"]
TINY = [
    "train.steps=2", "train.tasks_per_step=2", "query=2", "train.query=2", "eval.episodes=4",
    "eval.val_episodes=4", "device=cpu",
]  # fmt: skip

OWN = """\
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.features import FeatureLearner
from metarun.algorithms.functional import prototypes

class Mine(FeatureLearner):
    capabilities = Capabilities(kinds=("classification",), accepts_any_way=True)

    def logits(self, support, labels, query, ways):
        return query @ prototypes(support, labels, ways).T
"""


def run(*words: str | Path, cwd: Path) -> str:
    """Return the output of a command that must succeed, in an environment without our paths."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "METARUN"))}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, so that building leaves nothing behind in it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def files_below(folder: Path) -> list[Path]:
    """The files of a folder, without what Python compiles."""
    return [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, sources, cwd=folder)
    return folder


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """The bin folder of a new environment with our dependencies but without metarun."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    # A folder named in a .pth file is searched, but its own .pth files are not read: one of them
    # may lead to an editable metarun.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.fixture
def wheel(built: Path, clean: Path, tmp_path: Path) -> Path:
    """The bin folder of an environment with the wheel installed."""
    (path,) = built.glob("*.whl")
    run(clean / "pip", "install", "--no-deps", "--no-index", path, cwd=tmp_path)
    return clean


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_the_wheel_is_pure_and_carries_configurations_and_characters(built: Path) -> None:
    (path,) = built.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(path).namelist())
    ours = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    # Every file of the package and of conf/, and no other.
    package = {file.relative_to(ROOT).as_posix() for file in files_below(ROOT / "metarun")}
    conf = {f"metarun/{file.relative_to(ROOT).as_posix()}" for file in files_below(ROOT / "conf")}
    assert ours == package | conf
    assert {"metarun/py.typed", "metarun/conf/config.yaml"} <= ours
    assert any(name.startswith("metarun/data/files/") for name in ours)


def test_the_sdist_carries_what_the_tests_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "conf/config.yaml",
        "tests/cli/test_main.py",
    ):
        assert name in names


def test_the_installed_command_runs_from_an_empty_folder(wheel: Path, empty: Path) -> None:
    where = run(wheel / "python", "-c", "import metarun; print(metarun.__file__)", cwd=empty)
    assert str(wheel.parent) in where
    assert run(wheel / "metarun", "--version", cwd=empty).startswith("metarun ")
    assert "omniglot_small" in run(wheel / "metarun", "list", cwd=empty)
    assert list(empty.iterdir()) == []
    run(wheel / "metarun", "algo=protonet", "data=omniglot_small", *TINY, cwd=empty)
    (path,) = empty.glob("outputs/*/*/results.json")
    assert json.loads(path.read_text())["data"] == "omniglot_small"
    run(wheel / "metarun", f"test={path.parent}", "shot=2", cwd=empty)
    run(wheel / "metarun", "report", path.parent, cwd=empty)
    assert "</html>" in (path.parent / "report.html").read_text(encoding="utf-8")


def test_the_installed_command_runs_an_algorithm_of_ones_own(wheel: Path, empty: Path) -> None:
    (empty / "my_conf/algo").mkdir(parents=True)
    (empty / "my_conf/algo/mine.yaml").write_text(
        "# @package _global_\n# Mine\nbn: running\nalgo:\n  _target_: my_package.Mine\n"
    )
    (empty / "my_package.py").write_text(OWN)
    words = ["--config-dir", "my_conf", "algo=mine", "data=omniglot_small", *TINY]
    run(wheel / "metarun", *words, cwd=empty)
    (path,) = empty.glob("outputs/*/*/results.json")
    assert json.loads(path.read_text())["algo"] == "mine"
    run(wheel / "metarun", "report", path.parent, cwd=empty)
    page = (path.parent / "report.html").read_text(encoding="utf-8")
    assert "metarun --config-dir my_conf algo=mine" in page


def test_an_editable_install_sees_an_edited_yaml(clean: Path, sources: Path, empty: Path) -> None:
    install = ["install", "--no-deps", "--no-index", "--no-build-isolation", "-e", sources]
    run(clean / "pip", *install, cwd=empty)
    assert "shot: 7" not in run(clean / "metarun", "--cfg", "job", "data=linear", cwd=empty)
    path = sources / "conf/data/linear.yaml"
    path.write_text(path.read_text().replace("shot: 5", "shot: 7"))
    assert "shot: 7" in run(clean / "metarun", "--cfg", "job", "data=linear", cwd=empty)
