"""Tests that every shipped experiment and paper composes, fits its data, trains and is tested.

Small data sets are generated in the original file formats and imported as usual. A run of an
experiment is reduced to one small update.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console

from metarun.config.build import build_experiment
from metarun.config.catalogue import conf_dir, experiment
from metarun.config.checks import check_config
from metarun.config.composition import composer
from metarun.config.loading import names_of, opened, plain
from metarun.config.trust import locate
from metarun.core.console import Screen
from metarun.core.types import SPLITS
from metarun.data import omniglot
from metarun.data.storage import miniimagenet_files, omniglot_files
from metarun.data.storage.image_sets import Arrays, groups_of, store_images
from metarun.data.storage.miniimagenet_files import NUM_CLASSES, import_miniimagenet
from metarun.data.storage.omniglot_files import Character, import_omniglot
from metarun.jobs.train import train
from tests.data import sources
from tests.data.sources import write_omniglot_zips
from tests.helpers import slow

Config = dict[str, Any]

CONF = conf_dir()
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def first_of_each(parts: int) -> list[Any]:
    """The experiments, of which all but the first with these parts of a name are slow."""
    first = {min(g) for _, g in groupby(EXPERIMENTS, lambda name: name.split("_")[:parts])}
    return [name if name in first else slow(name) for name in EXPERIMENTS]


# Experiments that are not from a paper.
OWN = {"quick_start", "omniglot_small_best", "iris"}
# Cells after the code of Finn et al. 2017.
AFTER_MAML = (
    "finn2017",
    "raghu2020",
    "li2017",
    "zhang2018_omniglot_maml",
    "zhang2018_miniimagenet_maml",
)
PAPERS = sorted(path.stem for path in (CONF / "paper").glob("*.yaml"))

# Twenty in each split, the largest number of ways; 60 training classes are 15 in 4 rotations.
CHARACTERS = (
    *(
        Character("images_background", split.title(), number, split)
        for split in SPLITS
        for number in range(1, 21)
    ),
    *(Character("images_evaluation", "More", number, "test") for number in range(1, 21)),
)
# The largest number of images of one class in a task.
PHOTOGRAPHS = 21
# Of each class, so that a twentieth has the images of a small task.
DIGITS = 140


def text(group: str, name: str) -> str:
    return (CONF / group / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small copies of Omniglot, miniImageNet, CIFAR-100 and MNIST, where metarun looks for them."""
    folder = tmp_path_factory.mktemp("data_sets")
    with pytest.MonkeyPatch.context() as patch:
        for module in (omniglot, omniglot_files, sources):
            patch.setattr(module, "characters", lambda: CHARACTERS)
        patch.setattr(miniimagenet_files, "IMAGES_PER_CLASS", PHOTOGRAPHS)
        write_omniglot_zips(folder / "zips")
        write_photographs(folder / "pickles")
        import_omniglot(folder / "zips", folder / "root")
        import_miniimagenet(folder / "pickles", folder / "root")
        pixels = np.random.default_rng(1).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
        names = sorted(groups_of("cifar100"))
        images = Arrays("", names * PHOTOGRAPHS, list(pixels) * PHOTOGRAPHS)
        store_images("cifar100", images, folder / "root", 32, 3, "")
        digits = [str(number) for number in range(10)]
        blank = [np.zeros((28, 28), np.uint8)] * 10 * DIGITS
        store_images("mnist", Arrays("", digits * DIGITS, blank), folder / "root", 28, 1, "")
        patch.setenv("METARUN_DATA", str(folder / "root"))
        yield


def write_photographs(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split in SPLITS:
        num_images = NUM_CLASSES[split] * PHOTOGRAPHS
        coarse = generator.integers(0, 256, (num_images, 4, 4, 3), dtype=np.uint8)
        rows = np.arange(num_images).reshape(-1, PHOTOGRAPHS).tolist()
        content = {
            "image_data": coarse.repeat(21, 1).repeat(21, 2),
            "class_dict": {f"{split}{number:02d}": places for number, places in enumerate(rows)},
        }
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))


@cache
def composed(name: str) -> Config:
    """Compose an experiment without checking its overrides, which takes much longer."""
    with opened() as hydra:
        cfg = hydra.compose_config("config", [f"experiment={name}"], RunMode.RUN)
    choices = cast("Config", OmegaConf.to_container(cfg.hydra.runtime.choices))
    config = plain(cfg)
    return {**config, "names": names_of(choices, config)}


def cut_down(config: Config) -> Config:
    """Reduce a configuration to one small update: fewer ways, rows, tasks and filters."""
    small = deepcopy(config)
    for sizes in (small, small["train"]):
        for key, most in (("way", 5), ("shot", 5), ("query", 1)):
            # A range is drawn from anew for each step.
            sizes[key] = most if isinstance(sizes[key], str) else min(sizes[key], most)
    small["train"] |= {"steps": 1, "tasks_per_step": 1, "log_every": 1, "eval_every": 1}
    small["eval"] |= {"episodes": 2, "val_episodes": 2, "curve_steps": 1}
    if small["eval"]["inner_steps"] is not None:
        small["eval"]["inner_steps"] = min(small["eval"]["inner_steps"], 2)
    if "filters" in small["backbone"]:
        small["backbone"]["filters"] = 4
    if "inner_steps" in small["algo"]:
        small["algo"]["inner_steps"] = min(small["algo"]["inner_steps"], 2)
    if "pool" in small["data"]:
        small["data"] |= {"tasks": 2, "rows": 5}
    if "head_epochs" in small["algo"]:
        small["algo"]["head_epochs"] = 1
    return {**small, "device": "cpu", "threads": 1}


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - OWN))
def test_a_published_cell_leaves_out_the_recipe_of_its_pair(name: str) -> None:
    groups = experiment([CONF], name)["names"]
    assert "recipe" in groups
    assert groups["recipe"] is None


def test_a_cell_without_the_recipe_of_its_pair_has_none_of_its_values() -> None:
    with composer() as compose_jobs:
        recipe = compose_jobs.job(["algo=maml", "data=omniglot"])
        cell = compose_jobs.job(["experiment=finn2017_omniglot_5way_1shot"])
    assert recipe.has_recipe
    assert not cell.has_recipe
    assert recipe.config["data"]["resize"] == "antialias"
    assert cell.config["data"]["resize"] == "paper"


# Learners of a paper, such as `finn2017_omniglot_5way` or `chen2019_omniglot_baseline`.
@pytest.mark.parametrize("name", first_of_each(3))
def test_an_experiment_can_be_made(name: str) -> None:
    config = composed(name)
    # Streams need hundreds of test characters, more than the small copy has.
    made = cut_down(config) if config["names"]["data"].startswith("stream_") else config
    experiment = build_experiment({**made, "device": "cpu"})
    assert experiment.run_info["experiment"] == name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains_for_as_long_as_its_paper(name: str) -> None:
    settings = check_config(composed(name))
    if name not in OWN:
        assert settings.published is not None
        trains = locate("algo._target_", settings.algo["_target_"]).capabilities.meta_trains
        assert settings.published.steps == (settings.train.steps if trains else 0)
        assert settings.published.cells


@pytest.mark.parametrize(
    "name", [n for n in EXPERIMENTS if "miniimagenet" in n and n.startswith(AFTER_MAML)]
)
def test_the_bound_of_mamls_outer_gradient_is_that_of_its_code_for_a_mean(name: str) -> None:
    """MAML's code clips to 10 the gradient of a sum over query rows, divided by the shots."""
    config = composed(name)
    scale = config["way"] * config["train"]["query"] / config["shot"]
    assert config["optim"]["clip_value"] == pytest.approx(10 / scale, rel=1e-4)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_cell_after_tensorflow_code_has_its_batch_norm(name: str) -> None:
    config = composed(name)
    after = (*AFTER_MAML, "nichol2018", "ravi2017")
    normed = config["data"]["_target_"].endswith(("Omniglot", "MiniImageNet"))
    if "norm_eps" in config["backbone"]:
        expected = 1e-3 if normed and name.startswith(after) else 1e-5
        assert config["backbone"]["norm_eps"] == expected
    if name.startswith((*AFTER_MAML, "nichol2018")) and normed and "adapt_norm" in config["algo"]:
        assert not config["algo"]["adapt_norm"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_what_it_is(name: str) -> None:
    first, title, *rest = text("experiment", name).splitlines()
    assert first == "# @package _global_"
    assert title.startswith("# ")
    assert name == "quick_start" or f"# metarun experiment={name} seed=0" in rest


# A cell of each paper.
@pytest.mark.parametrize("name", first_of_each(1))
def test_an_experiment_trains_and_is_tested(name: str, tmp_path: Path) -> None:
    screen = Screen(Console(file=io.StringIO()))
    train(cut_down(composed(name)), tmp_path / "run", [], screen)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["experiment"] == name
    assert math.isfinite(results["test"]["mean"])
    assert results["test"]["episodes"] == 2


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_is_a_list_of_experiments(name: str) -> None:
    lines = text("paper", name).splitlines()
    assert lines[0] == "# @package _global_"
    assert f"# metarun paper={name}" in lines
    named = cast("Config", OmegaConf.to_container(OmegaConf.load(CONF / "paper" / f"{name}.yaml")))
    assert named["hydra"]["mode"] == "MULTIRUN"
    chosen = named["hydra"]["sweeper"]["params"]["experiment"].split(",")
    assert set(chosen) <= set(EXPERIMENTS)
    assert len(set(chosen)) == len(chosen) > 0
    with composer() as look_up:
        assert look_up.is_sweep([f"paper={name}"], multirun=False)


def test_a_paper_and_an_experiment_are_found_by_the_command() -> None:
    with composer() as look_up:
        assert look_up.options("experiment") == EXPERIMENTS
        assert look_up.options("paper") == PAPERS
        config = look_up.job(["experiment=raghu2020_omniglot_anil_20way_5shot"]).config
    assert config == composed("raghu2020_omniglot_anil_20way_5shot")
