"""Tests of the gate: what a stored configuration may name, and what a component is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from metarun.config.trust import (
    check_stored_words,
    locate,
    stored,
    taken_from,
    trusting,
    without_places,
)

MAML = "metarun.algorithms.optimization.maml.MAML"


def refusal(key: str, path: str) -> str:
    with pytest.raises(ValueError) as error:
        locate(key, path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of a user, whose import leaves a file behind."""
    name = f"my_package_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "import pathlib\n"
        "pathlib.Path('IMPORTED').touch()\n"
        f"from {MAML.rpartition('.')[0]} import MAML\n"
        "from torch import nn\n"
        "class Mine(MAML): pass\n"
        "class Net(nn.Linear): pass\n"
        "def net() -> nn.Module: return nn.Linear(1, 1)\n"
        "def anything(): return nn.Linear(1, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    return name


@pytest.mark.parametrize(
    ("key", "path", "what"),
    [
        (
            "algo._target_",
            "metarun.backbones.conv4.Conv4",
            "is not a subclass of metarun's Algorithm",
        ),
        (
            "algo._target_",
            "metarun.core.files.write_atomically",
            "is not a subclass of metarun's Alg",
        ),
        (
            "algo.learner",
            "metarun.data.synthetic.Sinusoid",
            "is not a subclass of metarun's Algorithm",
        ),
        ("data._target_", MAML, "is no data set"),
        ("backbone._target_", MAML, "is not a torch.nn.Module"),
        ("backbone._target_", "metarun.backbones.conv4.nn.Linear", None),
        ("backbone._target_", "metarun.backbones.conv4.Tensor", "is not a torch.nn.Module"),
        ("backbone._target_", "metarun.algorithms.base.own_parameters", "is not a torch.nn.Module"),
        (
            "optim._target_",
            "metarun.backbones.mlp.MLP",
            "is not a subclass of metarun's OuterOptimizer",
        ),
        ("optim._target_", "pydoc.pipepager", "is not a subclass of metarun's OuterOptimizer"),
        ("logger.x._target_", "subprocess.Popen", "is not a subclass of metarun's Tracker"),
        ("eval.measures", "metarun.core.files.csv_cell", "is no measure"),
    ],
)
def test_a_component_is_of_the_kind_of_its_key_even_if_it_is_typed(
    key: str, path: str, what: str | None
) -> None:
    message = refusal(key, path)
    assert what is None or message.startswith(f"{key}={path} {what}")


@pytest.mark.parametrize("path", ["os", "", ".os.system", "os..system", "os.sys tem", "os.system("])
def test_what_is_no_dotted_name_is_refused(path: str) -> None:
    assert "expected the dotted name of a class" in refusal("algo._target_", path)


def test_a_stored_run_imports_metarun_alone(package: str) -> None:
    with stored():
        assert locate("algo._target_", MAML).__name__ == "MAML"
        for key, name in (("algo._target_", "Mine"), ("backbone._target_", "Net")):
            assert refusal(key, f"{package}.{name}") == (
                f"{key}={package}.{name}: the run names code outside metarun, which is not "
                f"imported: type trust={package} if you trust it"
            )
    assert not Path("IMPORTED").exists()
    assert package not in sys.modules
    assert str(Path.cwd()) not in sys.path


@pytest.mark.parametrize("way", ["trust=", "METARUN_TRUST", "typed", "config_dir"])
def test_a_user_can_name_code_in_four_ways(
    way: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, typed, config_dir = f"{package}.Mine", None, None
    if way == "METARUN_TRUST":
        monkeypatch.setenv(way, f"other,{package}")
    if way == "typed":
        typed = {"algo": {"_target_": path}}
    if way == "config_dir":
        (tmp_path / "conf/algo").mkdir(parents=True)
        (tmp_path / "conf/algo/mine.yaml").write_text(f"algo:\n  _target_: {path}\n")
        config_dir = "conf"
    with trusting([package] if way == "trust=" else []), stored(typed, config_dir):
        assert locate("algo._target_", path).__name__ == "Mine"
        assert "the run names code outside" in refusal("algo._target_", f"{package}_2.Mine")
        if way in ("typed", "config_dir"):
            assert "the run names code outside" in refusal("backbone._target_", f"{package}.Net")


def test_a_function_of_a_trusted_package_says_that_it_returns_a_module(package: str) -> None:
    with trusting([package]), stored():
        assert locate("backbone._target_", f"{package}.Net").__name__ == "Net"
        assert locate("backbone._target_", f"{package}.net").__name__ == "net"
        assert "annotated to return one" in refusal("backbone._target_", f"{package}.anything")
    # The word of a user who types it is enough.
    assert locate("backbone._target_", f"{package}.anything").__name__ == "anything"


def test_packages_to_trust_are_taken_from_the_command_line() -> None:
    words = ["test=run", "trust=a,b.c", "shot=5", "trust=d"]
    assert taken_from(words) == (["a", "b.c", "d"], ["test=run", "shot=5"])
    for wrong in ("", "a b", "../x"):
        with pytest.raises(ValueError, match="expected names of packages"), trusting([wrong]):
            pass


@pytest.mark.parametrize(
    "word",
    [
        "seed=${oc.env:HOME}",
        "hydra.searchpath=[pkg://evil]",
        "+hydra.job.env_set.A=b",
        "hydra/launcher=joblib",
        " hydra.run.dir=x",
        "--config-dir=evil",
    ],
)
def test_stored_words_for_hydra_are_not_composed(word: str) -> None:
    check_stored_words(["algo=maml", "train.steps=3"])
    with pytest.raises(ValueError, match="that is stored in a run"):
        check_stored_words(["algo=maml", word])


@pytest.mark.parametrize(
    "node",
    [
        {"uri": "http://evil.example"},
        {"uri": "sqlite:////nowhere/else.db"},
        {"uri": "/nowhere/files"},
        {"mode": "online", "entity": "evil"},
    ],
)
def test_a_stored_tracker_sends_nothing_to_a_place_that_was_not_typed(
    node: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    key, value = next(iter(node.items()))
    assert without_places("logger.x", node) == node
    with stored({f"logger.x.{key}": value}):
        assert without_places("logger.x", node) == node
    with stored(), pytest.raises(ValueError, match=f"logger.x.{key}={value}: the run would send"):
        without_places("logger.x", node)
    with stored():
        assert without_places("algo", {"cache": "/somewhere"}) == {"cache": None}
        assert without_places("logger.x", {"uri": None, "mode": "offline"})["uri"] is None
    assert "the cache of a stored run is not used" in caplog.text
