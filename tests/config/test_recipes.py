"""Tests of recipes: what they say of a backbone is applied with that backbone alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from metarun.config.build import option_hints
from metarun.config.catalogue import conf_dir
from metarun.config.checks import check_config
from metarun.config.composition import Composer, Job, composer
from metarun.core.nested import flat
from tests.conftest import Command
from tests.helpers import slow

FILES = sorted((conf_dir() / "recipe").glob("*.yaml"))
IMAGES = ("omniglot", "rotated", "permuted", "rainbow", "folder", "miniimagenet")

OWN = """\
_target_: metarun.backbones.conv4.Conv4
_partial_: true
filters: 8
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composer]:
    """A composer with a backbone and a recipe of the user's own."""
    folder = tmp_path_factory.mktemp("conf")
    files = {
        "backbone/tiny.yaml": OWN,
        "backbone/wide.yaml": "defaults:\n  - conv4\n  - _self_\ndownsample: max_pool_ceil\n",
        "recipe/maml-folder.yaml": "# @package _global_\nfor_backbone:\n  conv4:\n    filters: 5\n"
        "  tiny:\n    filters: 6\n  mlp:\n    hidden: [7, 7]\n",
        "recipe/anil-folder.yaml": "# @package _global_\nfor_backbone: conv4\n",
        "experiment/seven.yaml": "# @package _global_\nbackbone:\n  filters: 7\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with composer(str(folder)) as compose:
        yield compose


@pytest.fixture(scope="module")
def alone(opened: Composer) -> dict[str, Any]:
    """The nodes of backbones without any recipe."""
    names = ("mlp_omniglot", "resnet12", "tiny")
    return {name: opened.job([f"backbone={name}", "~recipe"]).config["backbone"] for name in names}


def pair(path: Path) -> list[str]:
    algo, _, data = path.stem.partition("-")
    return [f"algo={algo}", f"data={data}"]


def for_backbone(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text()).get("for_backbone", {})
    return found


def check_node(job: Job) -> None:
    """Check that the backbone's class accepts every key of its node."""
    node = job.config["backbone"]
    hints = option_hints("backbone", node)
    assert not [key for key in node if key not in hints and not key.startswith("_")]


@pytest.mark.parametrize(
    "path", [p if for_backbone(p) else slow(p) for p in FILES], ids=lambda path: path.stem
)
def test_a_recipe_composes_with_every_backbone(
    path: Path, opened: Composer, alone: dict[str, Any]
) -> None:
    own = for_backbone(path)
    job = opened.job(pair(path))
    check_node(job)
    assert job.left_out == []
    for values in own.values():
        assert flat(values).items() <= flat(job.config["backbone"]).items()
    others = ["mlp_omniglot", "tiny"]
    others += ["resnet12"] if any(kind in path.stem for kind in IMAGES) else []
    for name in others:
        job = opened.job([*pair(path), f"backbone={name}"])
        check_config(job.config)
        check_node(job)
        assert "for_backbone" not in job.config
        assert job.config["backbone"] == alone[name]
        assert len(job.left_out) == len(own)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_names_the_backbone_that_its_values_are_for(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert "backbone" not in content
    for name in content.get("for_backbone", {}):
        assert (conf_dir() / "backbone" / f"{name}.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "filters"),
    [
        (["data=folder"], 5),
        (["data=folder", "backbone=conv4"], 5),
        (["data=folder", "backbone=tiny"], 6),
        (["data=folder", "backbone=wide"], 64),
        (["data=folder", "~recipe"], 64),
        (["data=folder", "experiment=seven"], 7),
        (["data=folder", "experiment=seven", "backbone=tiny"], 7),
        (["backbone.filters=8", "experiment=seven", "data=folder"], 8),
    ],
)
def test_a_value_for_a_backbone_has_the_precedence_of_its_recipe(
    words: list[str], filters: int, opened: Composer
) -> None:
    assert opened.job(["algo=maml", *words]).config["backbone"]["filters"] == filters


def test_a_backbone_that_builds_on_another_keeps_its_own_values(opened: Composer) -> None:
    job = opened.job(["algo=maml", "data=omniglot_small", "backbone=wide"])
    assert job.config["backbone"]["downsample"] == "max_pool_ceil"


def test_what_is_left_out_is_named_with_the_backbone_it_is_for(opened: Composer) -> None:
    small = opened.job(["algo=maml", "data=omniglot_small", "backbone=resnet12"])
    assert small.left_out == [
        "recipe: backbone.downsample=stride is for backbone=conv4 and was left out"
    ]
    sinusoid = opened.job(["algo=reptile", "data=sinusoid", "backbone=mlp_omniglot"])
    assert sinusoid.left_out == [
        "recipe: backbone.hidden=[64,64], backbone.activation=tanh are for backbone=mlp and were "
        "left out"
    ]


def test_values_for_no_named_backbone_are_refused_in_one_line(opened: Composer) -> None:
    with pytest.raises(ValueError, match=r"for_backbone=conv4: expected names of backbones"):
        opened.job(["algo=anil", "data=folder"])


def test_a_run_says_what_its_recipe_leaves_out_and_shows_no_node_of_it(metarun: Command) -> None:
    words = ["algo=maml", "data=omniglot_small", "backbone=mlp_omniglot"]
    shown = metarun(*words, "--cfg", "job")
    assert shown.code == 0
    assert "for_backbone" not in shown.out
    applied = metarun("algo=maml", "data=omniglot_small", "--cfg", "job", "--package", "backbone")
    assert "downsample: stride" in applied.out
    small = ["train.steps=1", "train.tasks_per_step=1", "eval.episodes=2", "eval.val_episodes=2"]
    ran = metarun(*words, *small, "eval.curve_steps=0", "threads=1")
    assert ran.code == 0
    assert ran.err == (
        "note: recipe: backbone.downsample=stride is for backbone=conv4 and was left out\n"
    )
