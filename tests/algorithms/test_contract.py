"""The contract of every shipped algorithm: properties that hold for all of `conf/algo/`."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm, task_metric
from metarun.backbones.layers.context import BatchNormMode
from metarun.backbones.layers.normalization import has_batch_norm
from metarun.config.build import Experiment, build_experiment
from metarun.config.catalogue import conf_dir
from metarun.config.composition import composer
from metarun.config.trust import locate
from metarun.core.types import Progress, TaskBatch
from metarun.evaluation.stream_rollouts import Rollouts
from tests.helpers import composed, slow

ALGORITHMS = sorted(path.stem for path in (conf_dir() / "algo").glob("*.yaml"))
IMAGES = ["way=3", "query=2", "shot=2", "data.image_size=20"]
CONV = ["backbone.filters=4", "backbone.blocks=2"]
SMALL = {
    "sinusoid": ["backbone.hidden=[8,8]", "shot=6", "train.shot=6"],
    "omniglot_small": [*IMAGES, *CONV],
    "stream_linear": ["backbone.hidden=[8,8]", "shot=4", "data.tasks=3"],
    "stream_omniglot_small": [*IMAGES, *CONV, "train.way=2"],
}


class Settings(NamedTuple):
    """What makes the tests of an algorithm quick.

    Attributes:
        always: Words for every test, such as fewer steps per prediction.
        fast: Words with which it learns in few updates.
        images: More of them for images.
        updates: Updates in which it learns from images.
        slow: Whether learning takes long all the same.
        stream: Words with which it learns from a stream of linear tasks.
    """

    always: str = ""
    fast: str = ""
    images: str = "data.image_size=20"
    updates: int = 30
    slow: bool = False
    stream: str = ""


FAST_MAML = Settings(fast="optim.lr=0.003", images="data.image_size=20 algo.inner_lr=0.4")
RELATION = Settings(
    always="data.image_size=28", fast="train.way=5 optim.lr=0.01", images="data.image_size=28"
)
ONLINE = Settings(stream="algo.online_lr=0.1")
FTL = Settings(stream="algo.inner_steps=5")
SETTINGS = {
    "anil": FAST_MAML,
    "anml": ONLINE,
    "boil": Settings(fast="algo.inner_lr=0.2 optim.lr=0.003"),
    "cavia": Settings(updates=60),
    "cmaml": Settings(always="algo.glances=2", stream="algo.step_lr=0.03 algo.rates_start=0.03"),
    "ewc": Settings(stream="algo.online_lr=0.1 algo.strength=1.0"),
    "fomaml": FAST_MAML._replace(fast="optim.lr=0.005"),
    "from_scratch": Settings(always="algo.inner_steps=10", stream="algo.inner_steps=5"),
    "ftl": FTL,
    "ftml": FTL,
    "ftml_hindsight": Settings(stream="algo.inner_steps=5 algo.meta_updates=150", slow=True),
    "gp_exact": Settings(slow=True),
    "imaml": Settings(fast="algo.inner_lr=0.2 algo.inner_steps=5 optim.lr=0.01"),
    "joint": ONLINE,
    "joint_hindsight": Settings(stream="algo.online_lr=0.1 algo.updates=1000", slow=True),
    "maml": FAST_MAML,
    "mamlpp": Settings(fast="optim.lr=0.003"),
    # Algorithms with learned updates or memories need more updates.
    "mann": Settings(fast="~recipe optim.lr=0.02 algo.controller=64", updates=450, slow=True),
    "matching": Settings(fast="train.way=5"),
    "matching_fce": Settings(fast="train.way=5"),
    "metagan_maml": FAST_MAML,
    "metagan_relation": RELATION._replace(slow=True),
    "metalstm": Settings(
        fast="algo.inner_steps=5 optim.lr=0.01", images="data.image_size=28", updates=60, slow=True
    ),
    "metasgd": Settings(fast="algo.inner_lr=0.05 optim.lr=0.003"),
    "mixture": Settings(fast="algo.components=2 optim.lr=0.003"),
    "multitask": Settings(
        always="algo.fit_steps=20",
        fast="algo.fit_steps=10 algo.fit_lr=0.03 algo.inner_lr=0.3",
    ),
    "oml": ONLINE,
    "online": ONLINE,
    "pretrained": ONLINE,
    "protomaml": Settings(fast="optim.lr=0.003"),
    "protonet": Settings(fast="train.way=5"),
    "r2d2": Settings(fast="optim.lr=0.005"),
    "relation": RELATION,
    "replay": ONLINE,
    "reptile": Settings(fast="algo.inner_lr=0.02 optim.schedule=constant eval.inner_steps=8"),
    "selector": Settings(slow=True),
    "snail": Settings(fast="~recipe optim.lr=0.001", updates=150, slow=True),
    "task_free": Settings(always="algo.updates=2", stream="algo.online_lr=0.1"),
    "task_memory": ONLINE,
    "toe": FTL,
}


def settings(algo: str) -> Settings:
    return SETTINGS.get(algo, Settings())


def learners(data: str, quick: Collection[str] | None = None) -> list[Any]:
    """The algorithms that can learn a data set, as parameters of a test; all but `quick` are slow.

    Without `quick`, those whose settings say so are.
    """
    takes_long = [settings(a).slow or (quick is not None and a not in quick) for a in suited(data)]
    return [slow(a) if long else a for a, long in zip(suited(data), takes_long, strict=True)]


def build(algo: str, data: str, *words: str, seed: int = 0) -> Experiment:
    common = ["precision=float64", "device=cpu", "engine=loop", "train.tasks_per_step=3"]
    small = [*SMALL[data], *settings(algo).always.split()]
    config = composed(f"algo={algo}", f"data={data}", *common, *small, *words)
    return build_experiment({**config, "seed": seed})


@cache
def classes() -> dict[str, type[Algorithm]]:
    """Return the class of each algorithm by name."""
    with composer() as compose:
        targets = {algo: compose.target("algo", algo) for algo in ALGORITHMS}
    return {a: locate("algo._target_", t) for a, t in targets.items()}  # type: ignore[misc]


def suited(data: str) -> list[str]:
    kind = "classification" if "omniglot" in data else "regression"
    streams = data.startswith("stream_")
    found = {
        algo: kind_of
        for algo, kind_of in classes().items()
        if kind in kind_of.capabilities.kinds and kind_of.capabilities.learns_online == streams
    }
    if streams:
        # One of each class: the others differ only in settings that `learn` reads.
        found = {a: c for a, c in found.items() if a == min(b for b in found if found[b] is c)}
    return list(found)


PAIRS = [(algo, data) for data in SMALL for algo in suited(data)]
ONCE = [
    pair if pair[0] not in {algo for algo, _ in PAIRS[:number]} else slow(pair)
    for number, pair in enumerate(PAIRS)
]
"""The pairs, of which those with another data set for a known algorithm are slow."""


class Trained(NamedTuple):
    """An algorithm after one update, test tasks, and its predictions of them."""

    algorithm: Algorithm
    batch: TaskBatch
    outputs: Tensor


@pytest.fixture(scope="module", params=ONCE, ids=lambda pair: "-".join(pair))
def trained(request: Any) -> Trained:
    made = build(*request.param)
    if made.algorithm.capabilities.meta_trains:
        made.algorithm.update(made.source.batch("train", 0, 3), Progress(0, 100))
    batch = made.source.batch("test", 0, 4)
    return Trained(made.algorithm, batch, answers(made.algorithm, batch))


def answers(algorithm: Algorithm, batch: TaskBatch) -> Tensor:
    return algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs


def state(algorithm: Algorithm) -> dict[str, Any]:
    tensors = {k: v for k, v in algorithm.state_dict().items() if isinstance(v, Tensor)}
    return {name: value.clone() for name, value in tensors.items()}


def test_there_is_something_to_hold_to_the_contract() -> None:
    assert len(PAIRS) >= 11


def test_predict_is_repeatable_changes_no_state_and_keeps_no_graph(trained: Trained) -> None:
    algorithm, batch, outputs = trained
    before = state(algorithm)
    assert torch.equal(answers(algorithm, batch), outputs)
    assert not outputs.requires_grad
    after = state(algorithm)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(param.grad is None for param in algorithm.parameters())


def test_predict_is_answer_after_adapt_also_when_what_was_adapted_was_saved(
    trained: Trained, tmp_path: Path
) -> None:
    algorithm, batch, outputs = trained
    adapted = algorithm.adapt(batch.support_x, batch.support_y)
    assert all(len(tensor) == batch.num_tasks for tensor in adapted.values())
    assert not any(tensor.requires_grad for tensor in adapted.values())
    kept = {name: tensor.clone() for name, tensor in adapted.items()}
    torch.save(adapted, tmp_path / "adapted.pt")
    for given in (adapted, torch.load(tmp_path / "adapted.pt", weights_only=True)):
        assert torch.equal(algorithm.answer(given, batch.query_x).outputs, outputs)
    assert all(torch.equal(adapted[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_queries_are_answered_one_by_one_as_together_unless_it_is_declared(
    trained: Trained, bn: BatchNormMode
) -> None:
    algorithm, batch, _ = trained
    learner = getattr(algorithm, "learner", algorithm)
    if bn != learner.bn and not has_batch_norm(algorithm.net):
        pytest.skip("without batch norm all settings are the same")
    before, learner.bn = learner.bn, bn
    try:
        if algorithm.transductive:
            pytest.skip("declared: batch statistics are of all queries")
        adapted = algorithm.adapt(batch.support_x, batch.support_y)
        together = algorithm.answer(adapted, batch.query_x).outputs
        alone = [algorithm.answer(adapted, x).outputs for x in batch.query_x.split(1, 1)]
        torch.testing.assert_close(torch.cat(alone, 1), together, rtol=1e-10, atol=1e-10)
        # The support rows that a learner without the declaration was given are not read again.
        names = {"support_x", "support_y"} & adapted.keys()
        assert bool(names) == algorithm.keeps_support
    finally:
        learner.bn = before


def test_answers_have_a_row_for_each_query(trained: Trained) -> None:
    algorithm, batch, outputs = trained
    shape = (*batch.query_y.shape[:2], algorithm.spec.output_dim)
    assert outputs.shape == shape
    assert torch.isfinite(outputs).all()


def test_answers_follow_a_permutation_of_the_tasks(trained: Trained) -> None:
    algorithm, batch, outputs = trained
    order = torch.tensor([2, 0, 3, 1])
    mixed = TaskBatch(
        batch.support_x[order], batch.support_y[order], batch.query_x[order], batch.query_y[order]
    )
    torch.testing.assert_close(answers(algorithm, mixed), outputs[order])


def test_a_task_is_answered_alike_alone_and_among_others(trained: Trained) -> None:
    algorithm, batch, outputs = trained
    torch.testing.assert_close(answers(algorithm, batch[1:2])[0], outputs[1])


def test_the_order_of_support_rows_is_without_meaning_where_it_says_so(trained: Trained) -> None:
    algorithm, batch, outputs = trained
    if not algorithm.capabilities.order_free:
        pytest.skip("the order of presentation has a meaning here")
    turned = TaskBatch(
        batch.support_x.flip(1), batch.support_y.flip(1), batch.query_x, batch.query_y
    )
    torch.testing.assert_close(answers(algorithm, turned), outputs, rtol=1e-6, atol=1e-8)


def test_answers_follow_a_permutation_of_the_queries(trained: Trained) -> None:
    algorithm, batch, outputs = trained
    turned = TaskBatch(batch.support_x, batch.support_y, batch.query_x.flip(1), batch.query_y)
    torch.testing.assert_close(answers(algorithm, turned).flip(1), outputs, rtol=1e-6, atol=1e-8)


def test_answers_follow_a_permutation_of_the_labels_as_declared(trained: Trained) -> None:
    algorithm, batch, outputs = trained
    if algorithm.spec.kind == "regression":
        pytest.skip("a regression has no labels")
    new = torch.tensor([2, 0, 1])
    relabeled = TaskBatch(batch.support_x, new[batch.support_y], batch.query_x, new[batch.query_y])
    # An online learner has outputs for every training class, more than the task has classes.
    follows = torch.allclose(
        answers(algorithm, relabeled)[..., new],
        outputs[..., :3],
        rtol=1e-6,
        atol=1e-8,
    )
    assert follows == algorithm.capabilities.label_equivariant


def test_a_trace_starts_unadapted_and_ends_after_its_steps(trained: Trained) -> None:
    algorithm, batch, outputs = trained
    trace = algorithm.trace(batch.support_x, batch.support_y, batch.query_x, 3)
    if trace is None:
        pytest.skip("it does not adapt by steps")
    assert trace.shape == (4, *outputs.shape)
    assert not trace.requires_grad
    assert not torch.equal(trace[0], trace[3])


@pytest.mark.parametrize("pair", ONCE, ids="-".join)
def test_a_restored_state_answers_and_learns_bit_for_bit(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    algo, data = pair
    if not classes()[algo].capabilities.meta_trains:
        pytest.skip("it learns online alone")
    first = build(algo, data)
    for step in range(2):
        first.algorithm.update(first.source.batch("train", 3 * step, 3), Progress(step, 10))
    torch.save(first.algorithm.state_dict(), tmp_path / "state.pt")
    second = build(algo, data, seed=5)
    second.algorithm.seed = first.algorithm.seed
    second.algorithm.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for made in (first, second):
        # The trainer does this before every update, for algorithms with random draws.
        torch.manual_seed(2)
        made.algorithm.update(first.source.batch("train", 6, 3), Progress(2, 10))
    one, other = state(first.algorithm), state(second.algorithm)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("algo", learners("omniglot_small", ["baseline", "maml", "protonet"]))
def test_a_short_training_beats_chance(algo: str) -> None:
    own = settings(algo)
    words = ["engine=auto", "precision=float32", "backbone.filters=16", "backbone.blocks=4"]
    made = build(algo, "omniglot_small", *words, *own.fast.split(), *own.images.split())
    for step in range(own.updates):
        batch = made.source.batch("train", 4 * step, 4)
        made.algorithm.update(batch, Progress(step, own.updates))
    batch = made.source.batch("test", 0, 60)
    accuracy = task_metric(made.source.spec, answers(made.algorithm, batch), batch.query_y)
    assert accuracy.mean() > 1 / 3 + 3 * accuracy.std() / 60**0.5


@pytest.mark.parametrize("algo", learners("sinusoid", ["boil", "cavia", "maml", "multitask", "np"]))
def test_a_short_training_beats_the_mean_on_lines(algo: str) -> None:
    words = [f"algo={algo}", "data=linear", "device=cpu", *settings(algo).fast.split()]
    made = build_experiment(composed(*words))
    for step in range(50):
        made.algorithm.update(made.source.batch("train", 8 * step, 8), Progress(step, 50))
    batch = made.source.batch("test", 0, 100)
    error = task_metric(made.source.spec, answers(made.algorithm, batch), batch.query_y).mean()
    # The best single line is y = x / 2 + 1 / 2; tasks have variance (x^2 + 1) / 12 around it.
    assert error < (1 / 3 + 1) / 12


@pytest.mark.parametrize("algo", learners("stream_linear"))
def test_a_rollout_on_linear_tasks_ends_better_than_it_began(algo: str) -> None:
    words = settings(algo).stream.split()
    made = build(algo, "stream_linear", "shot=20", "engine=vmap", *words)
    stream = made.source.spec.streams["test"]  # type: ignore[index]
    rollouts = Rollouts(made.algorithm, made.source.batch("test", 0, 10), stream)  # type: ignore[arg-type]
    while not rollouts.finished:
        rollouts.advance()
    # A learner that trained on the stream in advance is compared with an untrained network.
    knew = algo == "joint_hindsight"
    began = rollouts.untrained() if knew else rollouts.measured()["matrix"][:, 0]
    assert rollouts.final().mean() < began.mean()
