"""Plug-ins: installed packages whose `conf/` joins the search path."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from metarun.config.composition import composer
from metarun.config.search_path import own_folders, plugins
from metarun.config.trust import locate, stored

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "metarun-{name}"
version = "1.0"

[project.entry-points."metarun.plugins"]
{name} = "{name}"

[tool.hatch.build.targets.wheel]
packages = ["{name}"]
"""
MODULE = """\
from torch import nn
from metarun.algorithms.metric.protonet import ProtoNet

class Mine(ProtoNet):
    pass

class Net(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 5, 5)

    def forward(self, x):
        return self.conv(x)
"""
TINY = [
    "data=omniglot_small", "way=3", "query=2", "train.steps=2", "train.tasks_per_step=2",
    "eval.episodes=4", "eval.val_episodes=4", "eval.curve_steps=1", "device=cpu", "threads=1",
]  # fmt: skip


def write(folder: Path, name: str) -> Path:
    """The sources of a plug-in with an algorithm and a backbone; return its package."""
    package = folder / name
    for group, target in (("algo", "Mine"), ("backbone", "Net")):
        (package / "conf" / group).mkdir(parents=True)
        text = f"# A {group} of {name}\n_target_: {name}.parts.{target}\n"
        (package / "conf" / group / f"{name}_{group}.yaml").write_text(text)
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    (package / "parts.py").write_text(MODULE)
    (folder / "pyproject.toml").write_text(PROJECT.format(name=name))
    return package


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A plug-in as pip would install it, by its files alone; what finds the folders is fresh."""
    package = write(tmp_path, "plug_a")
    facts = tmp_path / "metarun_plug_a-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: metarun-plug-a\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[metarun.plugins]\nplug_a = plug_a\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.cache_clear()
    yield package
    plugins.cache_clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == "plug_a"]:
        del sys.modules[module]


def test_the_folder_of_a_plug_in_is_searched_and_nothing_of_it_is_imported(
    installed: Path,
) -> None:
    assert plugins() == {"plug_a": installed / "conf"}
    assert own_folders(None) == [installed / "conf"]
    with composer() as compose:
        assert "plug_a_algo" in compose.options("algo")
        config = compose.job([*TINY, "algo=plug_a_algo", "backbone=plug_a_backbone"]).config
    assert config["algo"]["_target_"] == "plug_a.parts.Mine"
    assert "plug_a" not in sys.modules


def test_a_stored_run_may_name_the_package_of_a_plug_in_and_no_other(installed: Path) -> None:
    (installed / "__init__.py").write_text("")
    with stored():
        assert locate("algo._target_", "plug_a.parts.Mine").__name__ == "Mine"
        with pytest.raises(ValueError, match="the run names code outside metarun"):
            locate("algo._target_", "plug_b.parts.Mine")


def test_a_plug_in_without_its_folder_is_left_out_with_a_warning(
    installed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (installed / "conf").rename(installed / "config")
    assert plugins() == {}
    assert "plug-in plug_a: its package plug_a has no folder conf/" in caplog.text


def test_a_plug_in_cannot_take_the_name_of_a_shipped_file(installed: Path) -> None:
    (installed / "conf/algo/maml.yaml").write_text("_target_: plug_a.parts.Mine\n")
    with pytest.raises(ValueError, match=r"plug_a/conf/algo/maml\.yaml has the name of a shipped"):
        composer().__enter__()


@pytest.mark.slow
def test_a_wheel_with_an_algorithm_and_a_backbone_is_used_once_it_is_installed(
    tmp_path: Path,
) -> None:
    package = write(tmp_path / "sources", "plug_wheel")
    (package / "__init__.py").write_text("")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path[1:]])}

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            cwd=work, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("build", "--wheel", "--no-isolation", "--outdir", tmp_path, tmp_path / "sources")
    (wheel,) = tmp_path.glob("*.whl")
    run("pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    assert "A algo of plug_wheel" in run("metarun", "list", "algo")
    run("metarun", "algo=plug_wheel_algo", "backbone=plug_wheel_backbone", *TINY)
    # A stored run names the package, which is trusted since it is installed as a plug-in.
    run("metarun", "test=last", "shot=2")
    run("metarun", "resume=last", "train.steps=3")
