"""Tests of types, ranges, and the components that are built from a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from metarun.config.build import (
    Experiment,
    _component,
    build_experiment,
    keywords,
    option_hints,
)
from metarun.config.catalogue import conf_dir
from metarun.config.checks import _BOUNDS, convert
from metarun.config.composition import composer
from metarun.config.schema import NODES
from metarun.core.types import HasLayouts
from metarun.runs.folder import RunFolder
from tests.helpers import composed

CONF = conf_dir()

GIVEN = {
    "algo": {"setup"},
    "data": {"setup"},
    "backbone": {"input_shape", "output_dim", "context_dim", "maps", "setup"},
    "optim": {"parameters"},
}
"""Arguments of a constructor that are injected, in addition to its options."""


def config(*words: str, **options: Any) -> dict[str, Any]:
    if not options:
        return composed(*words)
    with composer(**options) as compose:
        return compose.job(words).config


def build(*words: str, **options: Any) -> Experiment:
    return build_experiment(config(*words, **options))


def refusal(*words: str, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        build(*words, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


COMPONENTS = [
    path
    for group in NODES
    for path in sorted((CONF / group).rglob("*.yaml"))
    if not path.stem.startswith("for_")
]


# Options whose value is any text.
TEXTS = {
    "algo.cache",
    "backbone.name",
    "data.name",
    "data.root",
    "data.split",
    "data.label",
    "data.source",
}


@cache
def node_of(path: Path) -> dict[str, Any]:
    """Return the node of a component, as its file composes it."""
    group = path.parent.name
    more = ["backbone=mlp"] if group == "data" else []
    node: dict[str, Any] = config(f"{group}={path.stem}", "~recipe", *more)[group]
    return node


def words_of(hint: Any) -> tuple[str, ...]:
    """Return the words of a `Literal`, which may be part of a union."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(word for part in get_args(hint) for word in words_of(part))


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_a_word_is_checked_by_the_type_of_its_option(path: Path) -> None:
    group, node = path.parent.name, node_of(path)
    hints = option_hints(group, node)
    for key in set(node) - {"_target_", "_partial_"}:
        assert hints[key] is not Any, f"{group}.{key} has no type that could be checked"
        words = words_of(hints[key])
        if isinstance(node[key], str) and get_origin(hints[key]) is not type:
            assert node[key] in words or f"{group}.{key}" in TEXTS
        if words:
            with pytest.raises(ValueError, match=f"^{group}.{key}=nonsense: expected ") as caught:
                _component(group, {**node, key: "nonsense"})
            assert all(str(word) in str(caught.value) for word in words)


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_the_keys_of_a_yaml_are_the_keywords_of_its_constructor(path: Path) -> None:
    group, node = path.parent.name, node_of(path)
    keys = set(node) - {"_target_", "_partial_"}
    assert keys == set(option_hints(group, node)) - GIVEN[group]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (None, float | None, None),
        ("a", Literal["a", "b"], "a"),
        ([1, 2], Sequence[float], [1.0, 2.0]),
        ([1, 2.5], tuple[float, float], (1.0, 2.5)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        (0.1, float | Sequence[float], 0.1),
        ({"a": 1}, Mapping[str, int], {"a": 1}),
        ("anything", Any, "anything"),
    ],
)
def test_a_value_becomes_what_the_hint_asks_for(value: Any, hint: Any, expected: Any) -> None:
    converted = convert("key", value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("x", int, "key=x: expected a whole number"),
        (1.0, int, "key=1.0: expected a whole number"),
        (True, int, "key=true: expected a whole number"),
        (True, float, "key=true: expected a number"),
        (1, bool, "key=1: expected true or false"),
        (None, str, "key=null: expected text"),
        ("c", Literal["a", "b"], "key=c: expected a or b"),
        ([1], tuple[float, float], "key=[1]: expected a list of 2, such as [a number,a number]"),
        (["x"], Sequence[float], 'key=["x"]: expected a list, each item a number'),
        ("x", float | None, "key=x: expected a number or null"),
        (3, Mapping[str, int], "key=3: expected keys and values"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_right_one(
    value: Any, hint: Any, words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        convert("key", value, hint)
    assert str(caught.value) == words


def test_every_whole_number_of_the_schema_has_bounds() -> None:
    flat = {
        f"{prefix}{key}"
        for prefix, node in (
            ("", config()),
            ("train.", config()["train"]),
            ("eval.", config()["eval"]),
        )
        for key in node
    }
    numbers = {k for k in flat if k.rpartition(".")[2] not in (*NODES, "names", "train", "eval")}
    words = {"device", "precision", "bn", "engine", "graph", "debug", "resume", "test"}
    words |= {"sweep", "published", "logger", "eval.proficiency"}
    words |= {"train.rehearse", "train.max_minutes"}
    words |= {"eval.temperature", "eval.measures", "init", "init_strict", "sizes", "train.sizes"}
    assert numbers - words == set(_BOUNDS)


def test_a_run_is_made_of_what_was_asked_for() -> None:
    made = build("algo=maml", "data=sinusoid", "shot=3", "seed=4", "precision=float64")
    assert type(made.algorithm).__name__ == "MAML"
    assert type(made.source).__name__ == "Sinusoid"
    assert {p.dtype for p in made.algorithm.parameters()} == {torch.float64}
    batch = made.source.batch("test", 0, 2)
    assert batch.support_x.shape == (2, 3, 1)
    assert batch.support_x.dtype == torch.float64
    assert made.run_info["algo"] == "maml"
    assert made.run_info["backbone"] == "mlp"
    assert made.run_info["shot"] == 3


@pytest.mark.parametrize(
    ("words", "threads"),
    [
        (("algo=maml", "data=sinusoid"), 1),
        (("algo=maml", "data=sinusoid", "threads=2"), 2),
        (("algo=maml", "data=sinusoid", "backbone.hidden=[200,200]"), 3),
        (("algo=protonet", "data=omniglot_small"), 3),
        (("algo=protonet", "data=omniglot_small", "threads=2"), 2),
    ],
    ids=str,
)
def test_threads_of_a_run(
    words: tuple[str, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number holds for torch's operators, too; a small dense network has one by default."""
    set_to: list[int] = []
    monkeypatch.setattr("metarun.config.build._default_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    build(*words, "device=cpu")
    assert set_to == [threads]


def test_the_record_of_a_run_builds_the_same_run_again() -> None:
    first = build("algo=maml", "data=sinusoid", "engine=auto", "device=cpu")
    assert first.record["engine"] != "auto"
    assert first.record["threads"] is not None
    second = build_experiment(first.record)
    assert second.record == first.record
    assert second.run_info == first.run_info


def test_the_initial_parameters_are_the_seeds_and_the_callers_draws_go_on() -> None:
    def first_weight(seed: int) -> torch.Tensor:
        return next(build(f"seed={seed}").algorithm.parameters()).detach().cpu()

    torch.manual_seed(7)
    undisturbed = torch.rand(())
    torch.manual_seed(7)
    one = first_weight(1)
    assert torch.rand(()) == undisturbed
    assert torch.equal(first_weight(1), one)
    assert not torch.equal(first_weight(2), one)


def test_the_check_and_the_run_share_one_loaded_data_set() -> None:
    assert build("seed=3").source is build("seed=3").source
    assert build("seed=3").source is not build("seed=4").source


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algo=protonet", "data=sinusoid"], "ProtoNet learns classification"),
        (["data=sinusoid", "backbone=conv4"], "conv4"),
        (["data=omniglot_small", "way=1"], "way=1: expected 2 or more"),
        (["algo=selector", "data=tables", "shot=1"], "shot=1 is out of range: algo=selector needs"),
        (["algo=selector", "data=tables", "train.shot=1"], "train.shot=1 is out of range"),
        (["data=sinusoid", "way=5"], "way=5 has no meaning in a regression"),
        (["data=omniglot_small", "way=500"], "500"),
        (["data=omniglot_small", "shot=15", "query=15"], "15"),
        (["data=sinusoid", "eval.views=3"], "eval.views=3 needs images"),
        (["algo=nearest", "precision=mixed"], "precision=mixed needs a network"),
        (["train.tasks_per_step=2147483647"], "=2147483647 tasks of 20 rows take 171.8 GB or more"),
        (["shot=2000000000"], "=100 tasks of 2000000010 rows take 800.0 GB or more"),
        # More than any process can address.
        (["backbone.hidden=[10000000,10000000]"], "lower backbone.hidden=[10000000,10000000]"),
        (["algo=mixture", "algo.components=2147483647"], "=2147483647: expected 1 to 1000"),
        (["optim.betas=[1,1]"], "optim.betas=1.0: expected a number in [0, 1)"),
        (["data.x=[0,0]"], "data.x=[0,0]: all inputs would be the same number"),
        (["algo.inner_lr=fast"], "algo.inner_lr=fast: expected a number or a list"),
        (["algo.inner_steps=1.5"], "algo.inner_steps=1.5: expected a whole number"),
        (["algo.inner_steps=-1"], "inner_steps"),
        (["algo.adapt=tail"], "algo.adapt=tail: expected all, head or body"),
        (["optim.lr=-1"], "optim.lr=-1"),
        (["backbone.hidden=[]"], "backbone.hidden=[]"),
        (["backbone.hidden=40"], "backbone.hidden=40: expected a list, each item a whole number"),
        (["data.noise=loud"], "data.noise=loud: expected a number"),
        (["data.amplitude=[3,1]"], "data.amplitude=[3,1]"),
        (["algo._target_=nowhere.Mine"], "algo._target_=nowhere.Mine: there is no module nowhere"),
        (["algo._target_=Mine"], "algo._target_=Mine: expected the dotted name of a class"),
        (
            ["algo._target_=metarun.algorithms.optimization.maml.MALM"],
            "algo._target_=metarun.algorithms.optimization.maml.MALM: "
            "metarun.algorithms.optimization.maml has no MALM: did you mean MAML?",
        ),
        (["algo._target_=builtins.dict"], "builtins.dict is not a subclass of metarun's Algorithm"),
    ],
)  # fmt: skip
def test_parts_that_do_not_suit_each_other_are_refused(words: list[str], message: str) -> None:
    assert message in refusal(*words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_here_is_refused(device: str) -> None:
    assert refusal(f"device={device}") == (
        f"device={device}: no GPU is available here: use device=cpu"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_beyond_those_here_is_refused() -> None:
    assert "GPU(s), counted from cuda:0" in refusal("device=cuda:64")


OWN = """\
import {module}
from metarun.algorithms.optimization.maml import MAML
from tests.helpers import composed

class Mine(MAML):
    def __init__(self, setup, *, strength: float = 1.0, **options):
        super().__init__(setup, **options)
        self.strength = strength
"""


def own(folder: Path, module: str, monkeypatch: pytest.MonkeyPatch, imports: str = "math") -> str:
    (folder / "conf/algo").mkdir(parents=True)
    (folder / "conf/algo/mine.yaml").write_text(f"_target_: {module}.Mine\nstrength: 2\n")
    (folder / f"{module}.py").write_text(OWN.format(module=imports))
    monkeypatch.syspath_prepend(folder)
    return str(folder / "conf")


def test_an_algorithm_of_ones_own_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build("algo=mine", config_dir=own(tmp_path, "own_algorithm", monkeypatch))
    assert made.algorithm.strength == 2.0
    assert made.run_info["algo"] == "mine"


def test_a_data_set_of_ones_own_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(
        "from metarun.data.synthetic import Sinusoid\n"
        "class Mine(Sinusoid):\n"
        "    def __init__(self, setup, *, depth: int = 1, **options):\n"
        "        super().__init__(setup, **options)\n"
        "        self.depth = depth\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/mine.yaml").write_text("_target_: own_data.Mine\ndepth: 3\n")
    words = ["data=mine", "backbone=mlp", "way=1", "shot=4"]
    source: Any = build(*words, config_dir=str(tmp_path / "conf")).source
    assert (source.depth, source.sizes["test"].shot) == (3, 4)


@pytest.mark.parametrize("arguments", ["**common", "*, spec, backbone, **common", "*, rate=1.0"])
@pytest.mark.parametrize("group", ["algo", "data"])
def test_a_constructor_that_does_not_take_the_setup_is_refused_with_its_form(
    arguments: str, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"old_{group}_{len(arguments)}"
    (tmp_path / f"{module}.py").write_text(
        "from metarun.algorithms.optimization.maml import MAML\n"
        "from metarun.data.synthetic import Sinusoid\n"
        f"class Old({'MAML' if group == 'algo' else 'Sinusoid'}):\n"
        f"    def __init__(self, {arguments}): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal(f"{group}._target_={module}.Old") == (
        f"{group}._target_={module}.Old: expected a constructor of the form "
        "def __init__(self, setup, *, …), which calls super().__init__(setup)"
    )


def test_a_module_of_ones_own_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own(tmp_path, "failing_algorithm", monkeypatch, imports="no_such_library")
    assert refusal("algo=mine", config_dir=folder) == (
        "algo._target_=failing_algorithm.Mine: importing failing_algorithm failed: "
        "No module named 'no_such_library'"
    )


def test_keywords_follow_what_a_constructor_hands_on() -> None:
    class Base:
        def __init__(self, *, seed: int) -> None: ...

    class Child(Base):
        def __init__(self, *, rate: float, **options: Any) -> None: ...

    class Closed(Base):
        def __init__(self, *, rate: float) -> None: ...

    assert set(keywords(Child)) == {"rate", "seed"}
    assert set(keywords(Closed)) == {"rate"}


def test_what_another_run_has_learned_is_loaded_by_the_builder(tmp_path: Path) -> None:
    words = ["algo=selector", "data=omniglot_small", "data.image_size=16", "shot=2", "train.shot=2"]
    assert "expected the folder of a run with checkpoints" in refusal(
        *words, f"algo.features={tmp_path / 'none'}"
    )
    donor = build("algo=protonet", *words[1:]).algorithm
    run = RunFolder.create(tmp_path / "run", "")
    run.save_best({"state": donor.state_dict()})
    made = build(*words, f"algo.features={run.path}").algorithm
    for name, value in made.net.state_dict().items():
        assert torch.equal(value, donor.net.state_dict()[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # A learner that does not use the option would not notice.
        (["algo=ewc", "data=stream_linear", "optim.weight_decay=-inf"], "expected a finite number"),
        (["algo=task_free", "data=stream_linear", "optim.step_every=-7"], "expected a positive"),
        (["algo=maml", "data=sinusoid", f"algo.inner_steps={10**10}"], "expected a whole number"),
        (
            ["algo=maml", "data=sinusoid", f"backbone.hidden=[4,{10**30}]"],
            "expected a whole number",
        ),
    ],
)
def test_numbers_beyond_all_sense_are_refused_whoever_reads_them(
    words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{words[-1].partition('=')[0]}.*{message}"):
        build_experiment(config(*words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["way=50..5"], "way=50..5 is an empty range: expected 5..50"),
        (["way=five"], "way=five: expected a whole number, or a range such as 5..50"),
        (["train.shot=0..3"], "train.shot=0..3: expected 1 or more"),
        (["way=5..90"], "way=5..90 is more than the 89 classes in omniglot_small's test split"),
        (["shot=1..30"], "20 images, 30+15 are needed"),
        (["sizes=vinyals"], "sizes=vinyals: expected meta_dataset or null"),
        (
            ["algo=maml", "way=3..5"],
            "tasks have up to 5 ways, but MAML has a head of fixed width: use one number",
        ),
        (["algo=snail", "shot=1..2"], "the data set has no fixed number of shots"),
        (["algo=frn", "sizes=meta_dataset"], "FRN needs the same number of support rows"),
        (["algo=selector", "shot=1..5"], "shot=1..5 is out of range: algo=selector needs 2"),
        (["data=sinusoid", "algo=maml", "shot=5..10"], "the tasks of data=sinusoid have one size"),
        (["data=stream_rotated", "algo=online", "query=1..2"], "stream_rotated have one size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(words: list[str], message: str) -> None:
    data = [] if any(word.startswith("data=") for word in words) else ["data=omniglot_small"]
    algo = [] if any(word.startswith("algo=") for word in words) else ["algo=protonet"]
    assert message in refusal(*algo, *data, *words)


def test_sizes_of_training_and_of_the_test_vary_apart() -> None:
    made = build("algo=protonet", "data=omniglot_small", "train.way=3..6", "train.tasks_per_step=3")
    source = made.source
    assert isinstance(source, HasLayouts)
    assert source.layout("test", 0) is None
    ways = [source.layout("train", task).way for task in range(60)]  # type: ignore[attr-defined]
    assert set(ways) == {3, 4, 5, 6}
    assert all(len(set(ways[at : at + 3])) == 1 for at in range(0, 60, 3))
    assert (made.run_info["way"], made.algorithm.spec.ways_vary) == (5, True)


LONG = "train.steps=50000"


@pytest.mark.parametrize(
    ("words", "graph"),
    [
        (("algo=maml", "data=sinusoid", LONG), "compile"),
        (("algo=maml", "data=sinusoid", "train.steps=49999"), "auto"),
        (("algo=maml", "data=sinusoid", LONG, "graph=replay"), "replay"),
        (("algo=maml", "data=sinusoid", LONG, "train.rehearse=30"), "auto"),
        (("algo=maml", "data=sinusoid", LONG, "precision=float64"), "auto"),
        (("algo=maml", "data=omniglot_small", LONG), "auto"),
        (("algo=oml", "data=stream_incremental_sine", LONG), "auto"),
    ],
)
def test_a_long_run_of_a_small_dense_network_is_compiled_where_there_is_a_compiler(
    words: tuple[str, ...], graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    experiment = build(*words, "device=cpu")
    assert experiment.algorithm.engine.graph == experiment.record["graph"] == graph
    # A run that goes on keeps what it began with.
    longer = {**experiment.record, "graph": "auto"}
    assert build_experiment(longer, fresh=False).algorithm.engine.graph == "auto"
    monkeypatch.setattr("shutil.which", lambda _: None)
    without = build(*words, "device=cpu").algorithm.engine.graph
    assert without == ("auto" if graph == "compile" else graph)


def test_without_a_compiler_a_compilation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    message = refusal("algo=maml", "data=sinusoid", "graph=compile", "device=cpu")
    assert message == "graph=compile needs a C++ compiler, such as g++: use graph=replay"
