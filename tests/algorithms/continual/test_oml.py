"""OML, ANML and pre-training, against loops written here in plain torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.algorithms.continual.anml import ANML
from metarun.algorithms.continual.oml import OML
from metarun.algorithms.continual.pretrained import Pretrained
from metarun.backbones.mlp import MLP
from metarun.core.types import Progress, Stream, TaskBatch, TaskSpec
from tests.helpers import (
    image_spec,
    linear_backbone,
    make,
    moved,
    regression_batch,
    regression_spec,
)

LAYOUT = Stream(visits=(0, 1), steps=3, rows=2, queries=4)
STREAMS: Any = {"train": LAYOUT, "val": LAYOUT, "test": LAYOUT}
TINY = partial(MLP, hidden=[5], activation="tanh")


def spec() -> TaskSpec:
    return replace(regression_spec(), streams=STREAMS)


def batch(tasks: int = 2) -> TaskBatch:
    whole = regression_batch(regression_spec(), tasks, 12)
    return TaskBatch(whole.support_x, whole.support_y, whole.query_x[:, :8], whole.query_y[:, :8])


def characters(classes: int = 6) -> tuple[TaskSpec, TaskBatch]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 14, 1, 8, 8, generator=draw, dtype=torch.float64)
    y = torch.randint(classes, (2, 14), generator=draw)
    found = TaskBatch(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])
    return replace(image_spec(classes), num_train_classes=classes, streams=STREAMS), found


def naive(algorithm: Any, tasks: TaskBatch, lr: float, *, second_order: bool) -> dict[str, Tensor]:
    """Return the mean meta-gradient by autograd through an ordinary loop over trajectories."""
    names = [name for name, _ in algorithm.net.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in algorithm.net.parameters()]
    total = torch.zeros((), dtype=torch.float64)
    for task in range(tasks.num_tasks):
        fast = dict(zip(names, params, strict=True))

        def answer(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            hidden = x
            for body in ("body.body.linears.0", "head.hidden.body.linears.0"):
                if f"{body}.weight" in weights:
                    hidden = torch.nn.functional.linear(
                        hidden, weights[f"{body}.weight"], weights[f"{body}.bias"]
                    )
                    hidden = torch.tanh(hidden) if body.startswith("body") else torch.relu(hidden)
            return torch.nn.functional.linear(
                hidden, weights["head.last.weight"], weights["head.last.bias"]
            )

        for row in range(0, 6, 2):
            x, y = tasks.support_x[task, row : row + 2], tasks.support_y[task, row : row + 2]
            heads = [name for name in names if name.startswith("head.")]
            loss = (answer(fast, x) - y).square().mean()
            grads = torch.autograd.grad(loss, [fast[n] for n in heads], create_graph=second_order)
            for name, grad in zip(heads, grads, strict=True):
                fast[name] = fast[name] - lr * (grad if second_order else grad.detach())
        total = total + (answer(fast, tasks.query_x[task]) - tasks.query_y[task]).square().mean()
    grads = torch.autograd.grad(total / tasks.num_tasks, params)
    return {f"net.{name}": grad for name, grad in zip(names, grads, strict=True)}


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("second_order", [False, True])
def test_the_meta_gradient_is_that_of_an_ordinary_loop(engine: str, second_order: bool) -> None:
    tasks = batch()
    tasks = TaskBatch(tasks.support_x[:, :6], tasks.support_y[:, :6], tasks.query_x, tasks.query_y)
    options = {"inner_lr": 0.1, "adapt": "head", "head": [4]}
    options["second_order_from"] = 0 if second_order else None
    algorithm = make(OML, spec(), TINY, engine=engine, **options)
    expected = naive(algorithm, tasks, 0.1, second_order=second_order)
    found = moved(algorithm, tasks)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


def test_the_orders_differ() -> None:
    first, second, default = (
        moved(make(OML, spec(), TINY, inner_lr=0.1, adapt="head", **order), batch())
        for order in ({"second_order_from": None}, {"second_order_from": 0}, {})
    )
    assert any(not torch.allclose(first[name], second[name]) for name in first)
    # The default is the corrected code.
    assert all(torch.equal(second[name], default[name]) for name in second)


@pytest.mark.parametrize("held_out", [0, 8])
def test_the_meta_loss_may_have_the_rows_of_the_trajectory_too(held_out: int) -> None:
    tasks = batch()
    tasks = TaskBatch(
        tasks.support_x[:, :6],
        tasks.support_y[:, :6],
        tasks.query_x[:, :held_out],
        tasks.query_y[:, :held_out],
    )
    options = {"inner_lr": 0.1, "adapt": "head", "head": [4], "trajectory_in_meta_loss": True}
    algorithm = make(OML, spec(), TINY, second_order_from=None, **options)
    both = [
        torch.cat(pair, 1)
        for pair in ((tasks.query_x, tasks.support_x), (tasks.query_y, tasks.support_y))
    ]
    seen = TaskBatch(tasks.support_x, tasks.support_y, *both)
    expected = naive(algorithm, seen, 0.1, second_order=False)
    found = moved(algorithm, tasks)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


def test_with_nothing_to_learn_from_a_trajectory_it_is_ordinary_training() -> None:
    """At a vanishing inner rate the meta-loss is the loss of the query rows."""
    tasks = batch()
    algorithm = make(OML, spec(), linear_backbone, inner_lr=1e-12, adapt="head")
    last = algorithm.net.head.last
    weight, bias = last.weight.detach().clone(), last.bias.detach().clone()
    found = moved(algorithm, tasks)["net.head.last.weight"]
    x, y = tasks.query_x.flatten(0, 1), tasks.query_y.flatten(0, 1)
    errors = x @ weight.T + bias - y
    torch.testing.assert_close(found, 2 * (errors * x).mean(0)[None], rtol=1e-8, atol=1e-10)


def test_the_classes_of_a_trajectory_are_forgotten_before_it() -> None:
    classes, tasks = characters()
    kept = sorted(set(range(6)) - set(tasks.support_y.flatten().tolist()))
    algorithm = make(OML, classes, TINY, adapt="head", reset=True, inner_lr=0.1)
    with torch.no_grad():
        algorithm.net.head.last.weight.fill_(50.0)
    algorithm.optimizer.lr = 1e-30
    algorithm.update(tasks, Progress(0, 10))
    after = algorithm.net.head.last.weight
    assert (after[kept] == 50.0).all()
    others = sorted(set(tasks.support_y.flatten().tolist()))
    assert (after[others].abs() < 10.0).all()


def test_a_representation_that_would_change_along_the_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use algo\.adapt=head"):
        make(OML, spec(), TINY, adapt="all")


def test_pre_training_is_ordinary_training_on_all_rows() -> None:
    classes, tasks = characters()
    algorithm = make(Pretrained, classes, linear_backbone, adapt="head")
    last = algorithm.net.head.last
    weight = last.weight.detach().clone().requires_grad_()
    bias = last.bias.detach().clone().requires_grad_()
    x = torch.cat([tasks.support_x, tasks.query_x], 1).flatten(2)
    y = torch.cat([tasks.support_y, tasks.query_y], 1)
    logits = torch.nn.functional.linear(x, weight, bias)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    expected = torch.autograd.grad(loss, [weight, bias])
    found = moved(algorithm, tasks)
    torch.testing.assert_close(found["net.head.last.weight"], expected[0])
    torch.testing.assert_close(found["net.head.last.bias"], expected[1])


def test_a_wide_open_gate_leaves_features_as_they_are() -> None:
    gated = make(ANML, spec(), TINY, adapt="head")
    gate = gated.net.body.gate
    with torch.no_grad():
        gate.head.weight.zero_()
        gate.head.bias.fill_(50.0)
    x = batch().query_x[0]
    features = gated.net.body.features(x)
    torch.testing.assert_close(gated.encode(x[None])[0], features)
    with torch.no_grad():
        gate.head.bias.fill_(0.0)
    torch.testing.assert_close(gated.encode(x[None])[0], features / 2)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_anml_changes_all_but_the_gate_along_a_trajectory(engine: str) -> None:
    tasks = batch()
    algorithm = make(ANML, spec(), TINY, engine=engine, adapt="head", inner_lr=0.1)
    named = dict(algorithm.net.named_parameters())
    names = list(named)
    params = [p.detach().clone().requires_grad_() for p in named.values()]

    def answer(w: dict[str, Tensor], x: Tensor) -> Tensor:
        layer = torch.nn.functional.linear
        hidden = [
            torch.tanh(layer(x, w[f"{p}.body.linears.0.weight"], w[f"{p}.body.linears.0.bias"]))
            for p in ("body.features", "body.gate")
        ]
        gate = torch.sigmoid(layer(hidden[1], w["body.gate.head.weight"], w["body.gate.head.bias"]))
        return layer(hidden[0] * gate, w["head.last.weight"], w["head.last.bias"])

    losses = []
    for task in range(2):
        w = dict(zip(names, params, strict=True))
        inside = [name for name in names if not name.startswith("body.gate.")]
        for row in range(0, 12, 2):
            x, y = tasks.support_x[task, row : row + 2], tasks.support_y[task, row : row + 2]
            loss = (answer(w, x) - y).square().mean()
            grads = torch.autograd.grad(loss, [w[name] for name in inside])
            for name, grad in zip(inside, grads, strict=True):
                w[name] = w[name] - 0.1 * grad
        losses.append((answer(w, tasks.query_x[task]) - tasks.query_y[task]).square().mean())
    expected = torch.autograd.grad(torch.stack(losses).mean(), params)
    found = moved(algorithm, tasks)
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(found[f"net.{name}"], grad)


def test_a_gate_may_be_another_size_and_not_another_thing() -> None:
    algorithm = make(ANML, spec(), TINY, adapt="head", gate={"hidden": [3]})
    assert algorithm.net.body.gate.body.linears[0].out_features == 3
    with pytest.raises(ValueError, match=r"algo\.gate=\{'petals': 3\}"):
        make(ANML, spec(), TINY, adapt="head", gate={"petals": 3})
