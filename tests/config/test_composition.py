"""Tests of composition: valid overrides are composed, invalid ones give one clear line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarun.config.catalogue import conf_dir
from metarun.config.checks import check_config
from metarun.config.composition import Composer, Job, composer

CONF = conf_dir()


def job(*words: str, **options: Any) -> Job:
    with composer(**options) as compose:
        found = compose.jobs(list(words), compose.is_sweep(list(words), False))
    assert len(found) == 1
    check_config(found[0].config)
    return found[0]


def sweep(*words: str) -> list[list[str]]:
    with composer() as compose:
        return [found.overrides for found in compose.jobs(list(words), True)]


def refusal(*words: str, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        job(*words, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def words_for(path: Path) -> list[str]:
    """Return the overrides that include a YAML file in a configuration."""
    group, name = path.relative_to(CONF).parent.as_posix(), path.stem
    if group == "recipe":
        algo, _, data = name.partition("-")
        return [f"algo={algo}", f"data={data}"]
    if group == "augmentation":
        return ["data=folder", "algo=protonet", f"{group}@data.{group}={name}"]
    return [] if group == "." else [f"{group}={name}"]


# Experiments and papers are tested in test_experiments.py.
YAMLS = [p for p in sorted(CONF.rglob("*.yaml")) if p.parent.name not in ("experiment", "paper")]


@pytest.fixture(scope="module")
def opened() -> Iterator[Composer]:
    """One open composer, shared by tests that only compose."""
    with composer() as compose:
        yield compose


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_yaml_composes_to_a_valid_configuration(path: Path, opened: Composer) -> None:
    found = opened.job(words_for(path))
    check_config(found.config)
    if path.parent.name == "recipe":
        assert found.has_recipe


@pytest.mark.parametrize(
    "path", sorted((CONF / "recipe").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_recipe_is_for_a_pair_that_exists(path: Path) -> None:
    algo, _, data = path.stem.partition("-")
    assert (CONF / "algo" / f"{algo}.yaml").is_file()
    assert (CONF / "data" / f"{data}.yaml").is_file()


@pytest.fixture
def own_conf(tmp_path: Path) -> Path:
    """A user's configuration folder whose files of each kind set train.steps."""
    files = {
        "algo/mine.yaml": "# @package _global_\nalgo:\n  _target_: mine.Mine\n  depth: 1\n"
        "train:\n  steps: 2\n",
        "recipe/mine-linear.yaml": "# @package _global_\ntrain:\n  steps: 3\n",
        "experiment/cell.yaml": "# @package _global_\ndefaults:\n  - override /algo: mine\n"
        "train:\n  steps: 4\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["algo=mine", "~recipe"], 2),
        (["algo=mine", "data=linear"], 3),
        (["algo=mine", "data=linear", "experiment=cell"], 4),
        (["algo=mine", "data=linear", "experiment=cell", "train.steps=5"], 5),
        (["train.steps=5", "experiment=cell", "data=linear"], 5),
    ],
)
def test_precedence_is_command_line_experiment_recipe_algo_root(
    words: list[str], steps: int, own_conf: Path
) -> None:
    assert job(*words, config_dir=str(own_conf)).config["train"]["steps"] == steps


def test_training_sizes_are_those_of_evaluation_unless_typed() -> None:
    config = job("algo=maml", "data=sinusoid", "~recipe", "shot=7", "train.query=3").config
    assert config["train"]["shot"] == 7
    assert config["train"]["query"] == 3


def test_the_backbone_follows_the_data_unless_typed() -> None:
    assert job("data=omniglot_small").config["names"]["backbone"] == "conv4"
    assert job("data=sinusoid").config["names"]["backbone"] == "mlp"
    assert job("data=omniglot_small", "backbone=resnet12").config["names"]["backbone"] == "resnet12"


def test_data_of_ones_own_without_a_backbone_names_the_choice(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/photos.yaml").write_text("_target_: photos.Photos\n")
    message = refusal("data=photos", config_dir=str(tmp_path))
    assert message.startswith("data=photos has no default backbone: type backbone=NAME, one of")
    assert job("data=photos", "backbone=conv4", config_dir=str(tmp_path)).config["data"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("algo=mmal", "algo=mmal: did you mean maml?"),
        ("algo=MAML", "algo=MAML: did you mean maml?"),
        (
            "experiment=nope",
            "experiment=nope: expected one of antoniou2019_miniimagenet_5way_1shot",
        ),
        ("data=omniglot_smal", "data=omniglot_smal: did you mean omniglot_small?"),
        ("backbone=conv", "backbone=conv: did you mean conv4?"),
        ("optim=adma", "optim=adma: did you mean adam?"),
        ("algo=null", "algo=null: expected one of anil"),
        ("algo=[maml,anil]", "algo=['maml', 'anil']: expected one of anil"),
        ("stpes=3", "there is no key stpes: did you mean train.steps?"),
        ("inner_lr=3", "there is no key inner_lr: did you mean algo.inner_lr?"),
        ("algo.inner_lrr=3", "there is no key algo.inner_lrr: did you mean algo.inner_lr?"),
        ("+algo.foo=3", "there is no key algo.foo; `metarun --cfg job` lists all keys"),
        ("+trian.steps=3", "there is no key trian.steps: did you mean train.steps?"),
        ("++new=3", "there is no key new"),
        ("+algo.new=3", "there is no key algo.new"),
        ("++train={steps:3,new:4}", "there is no key train.new"),
        ("+seed=3", "+seed=3: seed already exists; type it without +"),
        ("+algo=maml", "+algo=maml: type algo=maml without +"),
        ("recipe=null", "recipe=null: type ~recipe instead"),
        ("~algo", "~algo: every run needs this group; type algo=NAME"),
        ("~seed", "~seed: a key cannot be removed; set it to another value or null"),
        ("hydra.rnu.dir=x", "there is no key hydra.rnu.dir"),
        ("hydra/launcher=bsaic", "hydra/launcher=bsaic: did you mean basic?"),
        ("way=five", "way=five: expected a whole number"),
        ("way=1.5", "way=1.5: expected a whole number"),
        ("way=true", "way=true: expected a whole number"),
        ("way=null", "way=null: expected a whole number"),
        ("debug=1", "debug=1: expected true or false"),
        ("engine=vamp", "engine=vamp: expected auto, vmap, loop or threads"),
        ("graph=fast", "graph=fast: expected auto, none, replay or compile"),
        ("bn=batch", "bn=batch: expected transductive, support or running"),
        ("precision=16", "precision=16: expected float32, float64 or mixed"),
        ("train=3", "train=3: expected keys and values"),
        ("algo._target_=null", "algo._target_ is missing"),
        ("way=0", "way=0: expected 1 or more"),
        ("way=99999999999", "way=99999999999: expected at most 2147483647"),
        ("train.steps=-1", "train.steps=-1: expected 0 or more"),
        ("eval.episodes=1", "eval.episodes=1: expected 2 or more"),
        ("device=gpu", "device=gpu: expected auto, cpu, cuda or cuda:N"),
        ("seed=1,2", "seed=1,2 has several values: add -m"),
        ("seed=???", "seed is missing: type seed=…"),
        ("seed=${nothing}", "seed: Interpolation key 'nothing' not found"),
        ("seed=${seed}", "seed: Recursive interpolation detected"),
        ("seed=${train}", "seed="),
        ("a b", "cannot read 'a b': expected KEY=VALUE"),
        ("names.algo=x", "there is no key names.algo"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(words: str, message: str) -> None:
    assert refusal(words).startswith(message)


def test_a_sweep_is_the_product_of_its_words_in_their_order() -> None:
    assert sweep("algo=maml,anil", "seed=range(0,2)", "way=1") == [
        ["algo=maml", "seed=0", "way=1"],
        ["algo=maml", "seed=1", "way=1"],
        ["algo=anil", "seed=0", "way=1"],
        ["algo=anil", "seed=1", "way=1"],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("experiment=glob(nothing_*)", "experiment=glob(nothing_*) selects nothing"),
        ("algo=maml,mmal", "algo=mmal: did you mean maml?"),
        ("sede=1,2", "there is no key sede: did you mean seed?"),
        ("seed=range(0,1000000000)", "the sweep has more than 10000 runs"),
        ("seed=interval(0,1)", "seed=interval(0,1): expected a list, range() or glob()"),
    ],
)
def test_a_sweep_is_looked_up_before_its_first_run(words: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        sweep(words)
    assert str(caught.value).startswith(message)


def test_an_experiment_may_be_a_sweep_by_itself(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/both.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      algo: maml,anil\n"
    )
    words = ["experiment=both", "seed=1,2"]
    with composer(config_dir=str(tmp_path)) as compose:
        assert compose.is_sweep(words, False)
        found = compose.jobs(words, True)
    assert [(j.config["names"]["algo"], j.config["seed"]) for j in found] == [
        ("maml", 1), ("maml", 2), ("anil", 1), ("anil", 2),
    ]  # fmt: skip


def test_a_file_with_a_shipped_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo/maml.yaml").write_text("_target_: mine.Mine\n")
    assert "algo/maml.yaml has the name of a shipped file" in refusal(config_dir=str(tmp_path))


def test_a_config_dir_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "there is no such folder" in refusal(config_dir=str(tmp_path / "no"))


def test_a_yaml_file_of_ones_own_that_is_broken_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo/mine.yaml").write_text("_target_: [\n")
    assert refusal("algo=mine", config_dir=str(tmp_path))


def test_a_key_that_an_experiment_of_ones_own_misspells_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/x.yaml").write_text("# @package _global_\ntrain:\n  stepz: 3\n")
    message = refusal("experiment=x", config_dir=str(tmp_path))
    assert message == "there is no key train.stepz: did you mean train.steps?"


KEYS = [
    "algo",
    "data",
    "seed",
    "way",
    "train.steps",
    "algo.inner_lr",
    "hydra.run.dir",
    "train",
    "x",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
VALUES = TEXT | st.sampled_from(
    ["null", "???", "1e400", "nan", "[1,2", "{a:1}", "${way}", "${oc.env:HOME}", "1,2", "glob(*)",
     "range(0,3,0)", "choice()", "'", '"', "\\", "${", "-0", "0x10", "1_0", "[]", "{}", "sort(2,1)"]
)  # fmt: skip
WORDS = TEXT | st.builds(
    "{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), st.sampled_from(KEYS), VALUES
)


@given(words=st.lists(WORDS, max_size=3), multirun=st.booleans())
@settings(max_examples=60, deadline=None)
def test_hostile_words_are_composed_or_refused_in_one_line(
    words: list[str], multirun: bool
) -> None:
    message = "fine"
    with composer() as compose:
        try:
            for found in compose.jobs(words, compose.is_sweep(words, multirun)):
                check_config(found.config)
        except ValueError as error:
            message = str(error)
    assert message
    assert "\n" not in message


def test_keys_of_a_swept_group_may_be_typed() -> None:
    words = ["algo=online,replay", "data=stream_linear,stream_sinusoid", "data.tasks=3"]
    with composer() as compose:
        jobs = compose.jobs([*words, "algo.online_lr=0.03"], sweep=True)
        assert {job.config["algo"]["online_lr"] for job in jobs} == {0.03}
        assert {job.config["data"]["tasks"] for job in jobs} == {3}
        assert len(jobs) == 4
        with pytest.raises(ValueError, match=r"there is no key algo\.memory"):
            compose.jobs([*words, "algo.memory=10"], sweep=True)
