"""MetaGAN against naive losses of W + 1 classes, and against its learners where it is off."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metarun.algorithms.baselines.nearest import Nearest
from metarun.algorithms.generative.metagan import (
    Generator,
    MetaGAN,
    taken_for_made,
    taken_for_real,
)
from metarun.algorithms.metric.relation import RelationNet
from metarun.algorithms.optimization.maml import MAML
from metarun.algorithms.outer_optimizer import NonFiniteError, OuterOptimizer
from metarun.backbones.conv4 import Conv4
from metarun.backbones.layers.context import ForwardContext
from metarun.core import seeding
from metarun.core.types import Progress, TaskSpec
from tests.helpers import image_batch, linear_backbone, make, moved, regression_spec

BACKBONE = partial(Conv4, filters=3, blocks=2)
SMALL = {"latent": 5, "filters": 4}
SPEC = TaskSpec("classification", (1, 24, 24), 3, 3)
LEARNERS = [MAML, RelationNet]


def batch_of(tasks: int = 2) -> Any:
    return image_batch(SPEC, tasks=tasks, shot=2, query=2)


@pytest.mark.parametrize("kind", LEARNERS)
def test_without_made_rows_it_is_its_learner_bit_for_bit(kind: Any) -> None:
    off = make(MetaGAN, SPEC, BACKBONE, learner=kind, fakes=0)
    learner = make(kind, SPEC, BACKBONE)
    for step in range(2):
        said = [a.update(batch_of(), Progress(step, 9)) for a in (off, learner)]
        assert said[0].keys() == said[1].keys()
        assert all(torch.equal(said[0][name], said[1][name]) for name in said[0])
    ours, theirs = off.state_dict(), learner.state_dict()
    assert ours.keys() - {"_extra_state"} == {f"learner.{name}" for name in theirs}
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert torch.equal(ours[f"learner.{name}"], value)
    tasks = batch_of()
    rows = (tasks.support_x, tasks.support_y, tasks.query_x)
    assert torch.equal(off.predict(*rows).outputs, learner.predict(*rows).outputs)
    assert not off.generates


def test_the_terms_are_those_of_a_softmax_over_one_class_more() -> None:
    outputs = torch.randn(7, 4, dtype=torch.float64)
    logits = torch.cat([outputs, torch.zeros(7, 1, dtype=torch.float64)], 1)
    chances = logits.softmax(1)
    torch.testing.assert_close(taken_for_real(outputs), -chances[:, :4].sum(1).log().mean())
    torch.testing.assert_close(taken_for_made(outputs), -chances[:, 4].log().mean())
    # For labeled rows: p(class | real) p(real) = p(class) among all W + 1 classes.
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    told = F.cross_entropy(outputs, labels) + taken_for_real(outputs)
    torch.testing.assert_close(told, F.cross_entropy(logits, labels))


def made_rows(algorithm: Any, support: Tensor, count: int, step: int, task: int) -> Tensor:
    """Return generated rows for one of two tasks at an update."""
    keys = seeding.task_keys(algorithm.seed, "made", 2 * step, 2, support.device)[task]
    latent = seeding.normal(keys, 0, (count, 5), dtype=torch.float64)
    rows: Tensor = algorithm.generator(support[None], latent[None])[0]
    return rows


def over_all(outputs: Tensor) -> Tensor:
    return torch.cat([outputs, outputs.new_zeros(len(outputs), 1)], 1)


def naive_loss(real: Tensor, labels: Tensor, made: Tensor) -> Tensor:
    fake = torch.full((len(made),), 3)
    return F.cross_entropy(over_all(real), labels) + F.cross_entropy(over_all(made), fake)


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
@pytest.mark.parametrize("inner", [0, 2])
def test_gradients_of_maml_with_an_adversary_are_the_naive_ones(engine: str, inner: int) -> None:
    options = {"fakes": 4, "inner_fakes": inner, "inner_lr": 0.1, "inner_steps": 2}
    algorithm = make(MetaGAN, SPEC, BACKBONE, learner=MAML, engine=engine, **options, **SMALL)
    algorithm.adversary = OuterOptimizer(
        [(f"generator.{n}", p) for n, p in algorithm.generator.named_parameters()],
        method="sgd", lr=1.0,
    )  # fmt: skip
    tasks, net = batch_of(), algorithm.net
    total, fooled = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for task in range(2):
        support, labels = tasks.support_x[task], tasks.support_y[task]
        made = made_rows(algorithm, support, inner + 4, 3, task)
        weights = dict(net.named_parameters())
        for _ in range(2):
            outputs = torch.func.functional_call(net, weights, (support, ForwardContext()))
            loss = F.cross_entropy(outputs, labels)
            if inner:
                of_made = torch.func.functional_call(
                    net, weights, (made[:inner].detach(), ForwardContext())
                )
                loss = naive_loss(outputs, labels, of_made)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), grads, strict=True)}
        outputs = torch.func.functional_call(net, weights, (tasks.query_x[task], ForwardContext()))
        of_made = torch.func.functional_call(
            net, weights, (made[inner:].detach(), ForwardContext())
        )
        total = total + naive_loss(outputs, tasks.query_y[task], of_made) / 2
        still = {name: weight.detach() for name, weight in weights.items()}
        for_real = torch.func.functional_call(net, still, (made[inner:], ForwardContext()))
        fooled = fooled - over_all(for_real).softmax(1)[:, :3].sum(1).log().mean() / 2
    learned, made_by = net.named_parameters(), algorithm.generator.named_parameters()
    expected = {}
    for prefix, value, named in (("learner.net", total, learned), ("generator", fooled, made_by)):
        names, values = zip(*named, strict=True)
        grads = torch.autograd.grad(value, values)
        expected |= {f"{prefix}.{n}": g for n, g in zip(names, grads, strict=True)}
    found = moved(algorithm, tasks, step=3)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("classes", ["softmax", "own"])
def test_gradients_of_a_relation_network_with_an_adversary_are_the_naive_ones(
    classes: str,
) -> None:
    options = {"fakes": 4, "clip_norm": None, "weight": 0.5, "classes": classes}
    algorithm = make(MetaGAN, SPEC, BACKBONE, learner=RelationNet, **options, **SMALL)
    tasks, net = batch_of(), algorithm.net
    total = torch.zeros((), dtype=torch.float64)
    for task in range(2):
        support, labels = tasks.support_x[task], tasks.support_y[task]
        made = made_rows(algorithm, support, 4, 3, task).detach()
        real = net(support, labels, tasks.query_x[task], 3, ForwardContext())
        of_made = net(support, labels, made, 3, ForwardContext())
        own = (real.sigmoid() - F.one_hot(tasks.query_y[task], 3)).square().mean()
        among = F.cross_entropy(real, tasks.query_y[task])
        told = naive_loss(real, tasks.query_y[task], of_made) - among
        total = total + ((among if classes == "softmax" else own) + 0.5 * told) / 2
    names, values = zip(*net.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(total, values), strict=True))
    found = moved(algorithm, tasks, step=3)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"learner.net.{name}"], gradient, rtol=1e-7, atol=1e-10)


def test_a_relation_network_is_clipped_as_without_an_adversary() -> None:
    free, cut = (
        moved(make(MetaGAN, SPEC, BACKBONE, learner=RelationNet, clip_norm=c, **SMALL), batch_of())
        for c in (None, 1e-5)
    )
    for part in ("learner.net.embedding.", "learner.net.relation."):
        norms = [
            torch.cat([g.flatten() for name, g in found.items() if name.startswith(part)]).norm()
            for found in (free, cut)
        ]
        assert norms[0] > 1e-5
        assert norms[1] == pytest.approx(1e-5)


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
def test_evaluation_adapts_on_rows_made_for_the_support(engine: str) -> None:
    options = {"inner_fakes": 3, "inner_lr": 0.1, "engine": engine}
    algorithm = make(MetaGAN, SPEC, BACKBONE, learner=MAML, **options, **SMALL)
    tasks, net = batch_of(), algorithm.net
    support, labels = tasks.support_x[1], tasks.support_y[1]
    key = seeding.task_keys(algorithm.seed, "made anew", 0, 1, support.device)
    latent = seeding.normal(key, 0, (3, 5), dtype=torch.float64)
    made = algorithm.generator(support[None], latent)[0].detach()
    weights = dict(net.named_parameters())
    outputs, of_made = (
        torch.func.functional_call(net, weights, (x, ForwardContext())) for x in (support, made)
    )
    grads = torch.autograd.grad(naive_loss(outputs, labels, of_made), list(weights.values()))
    weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), grads, strict=True)}
    expected = torch.func.functional_call(net, weights, (tasks.query_x[1], ForwardContext()))
    found = algorithm.predict(tasks.support_x, tasks.support_y, tasks.query_x).outputs[1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 21, 18), (1, 8, 8)])
def test_a_generator_keeps_size_and_range_and_heeds_task_and_chance(
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    generator = Generator(shape, latent=6, filters=4).double()
    support = torch.rand(2, 5, *shape, dtype=torch.float64) * 3.0 - 1.0
    latent = torch.randn(2, 4, 6, dtype=torch.float64)
    made = generator(support, latent)
    assert made.shape == (2, 4, *shape)
    for task in range(2):
        for channel in range(shape[0]):
            here, real = made[task, :, channel], support[task, :, channel]
            assert real.min() <= here.min()
            assert here.max() <= real.max()
    # The order of the support has no effect, its content and the latent numbers do: not only
    # through its range, which is equal in both tasks.
    torch.testing.assert_close(generator(support.flip(1), latent), made)
    assert not torch.allclose(generator(support, latent.flip(1)), made)
    support[:, 0] = support[:1, 0].clamp(-0.9, 1.9)
    support[:, 0, :, 0, :2] = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    assert torch.equal(support[0].amax((0, 2, 3)), support[1].amax((0, 2, 3)))
    other = generator(support, latent[:1].expand(2, -1, -1))
    assert (other[0] - other[1]).abs().max() > 1e-3
    made = generator(support, latent)
    # Tasks and rows are independent of each other.
    torch.testing.assert_close(generator(support[1:], latent[1:, 2:]), made[1:, 2:])


def test_a_generator_learns_to_fool_a_learner_that_stands_still() -> None:
    still = partial(OuterOptimizer, method="sgd", lr=1e-12)
    options = {"fakes": 6, "generator_lr": 0.01, "optim": still}
    algorithm = make(MetaGAN, SPEC, BACKBONE, learner=MAML, **options, **SMALL)
    losses = [
        float(algorithm.update(batch_of(), Progress(step, 60))["generator_loss"])
        for step in range(60)
    ]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_neither_moves_if_the_gradient_of_one_is_not_finite() -> None:
    algorithm = make(MetaGAN, SPEC, BACKBONE, learner=MAML, **SMALL)
    first = next(algorithm.generator.parameters())
    before = {name: value.clone() for name, value in algorithm.named_parameters()}
    first.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteError, match=r"generator\.encoder"):
        algorithm.update(batch_of(), Progress(0, 9))
    for name, value in algorithm.named_parameters():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fakes": -1}, "algo.fakes=-1: expected 0 or more"),
        ({"inner_fakes": -1}, "algo.inner_fakes=-1: expected 0 or more"),
        ({"generator_lr": 0.0}, "algo.generator_lr=0.0: expected a positive number"),
        ({"generator_lr": math.inf}, "algo.generator_lr=inf: expected a positive number"),
        ({"weight": math.nan}, "algo.weight=nan: expected 0 or more"),
        ({"weight": -0.5}, "algo.weight=-0.5: expected 0 or more"),
        ({"latent": 0}, "algo.latent=0: expected 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(MetaGAN, SPEC, BACKBONE, learner=MAML, **options)


@pytest.mark.parametrize(
    ("learner", "options", "said"),
    [
        (MAML, {"recompute": True}, "algo.recompute=true"),
        (RelationNet, {"inner_fakes": 2}, "expected 0, since RelationNet has no inner loss"),
        (Nearest, {}, "algo.learner=Nearest has no `solve`"),
    ],
)
def test_learners_that_do_not_suit_are_refused(
    learner: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make(MetaGAN, SPEC, BACKBONE, learner=learner, **options)


def test_a_generator_that_learns_is_seen_at_once_by_the_answers() -> None:
    options = {"inner_fakes": 3, "inner_lr": 0.1, "engine": "vmap"}
    algorithm = make(MetaGAN, SPEC, BACKBONE, learner=MAML, **options, **SMALL)
    tasks = batch_of()
    rows = (tasks.support_x, tasks.support_y, tasks.query_x)
    before = algorithm.predict(*rows).outputs
    with torch.no_grad():
        for parameter in algorithm.generator.parameters():
            parameter.add_(0.5)
    assert not torch.equal(algorithm.predict(*rows).outputs, before)


def test_data_that_are_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="use a data set of images"):
        make(MetaGAN, TaskSpec("classification", (4,), 3, 3), linear_backbone, learner=MAML)
    with pytest.raises(ValueError, match="the data set has regression tasks"):
        make(MetaGAN, regression_spec(), linear_backbone, learner=MAML)
