"""Frozen parameters (`requires_grad=False`) in the outer and inner loop of every algorithm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.base import Algorithm
from metarun.algorithms.optimization.maml import MAML
from metarun.algorithms.optimization.metalstm import MetaLSTM
from metarun.algorithms.optimization.reptile import Reptile
from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.backbones.mlp import MLP
from metarun.core.types import Progress
from metarun.execution.engine import Engine
from tests.algorithms.test_contract import ONCE, build
from tests.helpers import make, moved, regression_batch, regression_spec


def freeze_first(net: nn.Module) -> nn.Module:
    next(net.parameters()).requires_grad_(False)
    return net


def frozen_mlp(**shape: Any) -> nn.Module:
    return freeze_first(MLP(hidden=[5, 4], activation="tanh", **shape))


class Seen:
    """Records what networks are called with in place of one parameter of theirs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.values: list[Any] = []
        call: Callable[..., Any] = functional_call

        def recorded(net: nn.Module, params: dict[str, Any], *rest: Any, **more: Any) -> Any:
            self.values += [v for n, v in params.items() if name.endswith(n)]
            return call(net, params, *rest, **more)

        monkeypatch.setattr("torch.func.functional_call", recorded)


@pytest.mark.parametrize("pair", ONCE, ids="-".join)
def test_no_algorithm_changes_a_frozen_parameter_in_its_outer_or_inner_loop(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Algorithm.build_network
    monkeypatch.setattr(
        Algorithm, "build_network", lambda *given, **more: freeze_first(original(*given, **more))
    )
    made = build(*pair, "optim.weight_decay=0.1")
    algorithm = made.algorithm
    frozen = {n: p for n, p in algorithm.named_parameters() if not p.requires_grad}
    if not frozen:
        pytest.skip("it builds its networks by other means, or has none")
    before = {name: param.detach().clone() for name, param in algorithm.named_parameters()}
    seen = Seen(monkeypatch, next(iter(frozen)))
    if algorithm.capabilities.meta_trains:
        for step in range(2):
            algorithm.update(made.source.batch("train", step, 3), Progress(step, 100))
    batch = made.source.batch("test", 0, 2)
    algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    after = dict(algorithm.named_parameters())
    for name in frozen:
        assert torch.equal(after[name], before[name])
        assert after[name].grad is None
    if algorithm.capabilities.meta_trains:
        assert any(not torch.equal(after[name], before[name]) for name in before)
    assert not seen.values


@pytest.mark.parametrize("engine", ["loop", "vmap", "threads"])
def test_the_meta_gradient_beside_a_frozen_layer_is_that_of_a_naive_loop(engine: str) -> None:
    spec = regression_spec()
    batch = regression_batch(spec, tasks=3)
    learner = make(MAML, spec, frozen_mlp, engine=engine, inner_lr=0.3)
    net = learner.net
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    learned = {n: p.requires_grad_() for n, p in params.items() if n != "body.linears.0.weight"}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(net, {**params, **weights}, (x,)) - y).square().mean()

    losses = []
    for i in range(3):
        inner = loss(learned, batch.support_x[i], batch.support_y[i])
        grads = torch.autograd.grad(inner, list(learned.values()), create_graph=True)
        after = {n: p - 0.3 * g for (n, p), g in zip(learned.items(), grads, strict=True)}
        losses.append(loss(after, batch.query_x[i], batch.query_y[i]))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(learned.values()))
    found = moved(learner, batch)
    for name, grad in zip(learned, expected, strict=True):
        torch.testing.assert_close(found[f"net.{name}"], grad, rtol=1e-10, atol=1e-12)
    assert (found["net.body.linears.0.weight"] == 0).all()


@pytest.mark.parametrize("kind", [MAML, Reptile, MetaLSTM])
def test_learned_rates_and_moments_belong_to_parameters_that_learn(kind: type[Algorithm]) -> None:
    options = {"rates": "element"} if kind is MAML else {}
    learner = make(kind, regression_spec(), frozen_mlp, **options)
    assert not [n for n, p in learner.named_parameters() if not p.requires_grad][1:]
    others = {n for n, _ in (*learner.named_parameters(), *learner.named_buffers())}
    assert not [n for n in others if n.startswith(("rates", "second")) and "linears/0/w" in n]
    learner.update(regression_batch(regression_spec()), Progress(0, 10))


def test_a_frozen_parameter_is_read_anew_by_a_replay() -> None:
    spec = regression_spec()
    batch = regression_batch(spec, tasks=3)
    learner = make(MAML, spec, frozen_mlp)
    learner.engine = Engine("vmap", graph="replay")
    # Replays begin with the third call.
    for _ in range(3):
        moved(learner, batch)
    assert learner.engine.graphs.replays
    plain = make(MAML, spec, frozen_mlp)
    for net in (learner.net, plain.net):
        with torch.no_grad():
            net.body.linears[0].weight += 0.5
    plain.load_state_dict(learner.state_dict())
    plain.engine = Engine("vmap", graph="none")
    torch.testing.assert_close(moved(learner, batch), moved(plain, batch), rtol=0, atol=0)


def test_weight_decay_and_momentum_leave_a_frozen_parameter_alone() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    before = layer.bias.detach().clone()
    for method in ("adam", "sgd"):
        options: dict[str, Any] = {"momentum": 0.9} if method == "sgd" else {}
        optimizer = OuterOptimizer(
            layer.named_parameters(),
            method=method,  # type: ignore[arg-type]
            weight_decay=0.5,
            **options,
        )
        for step in range(3):
            optimizer.descend(layer(torch.ones(1, 2)).square().sum(), Progress(step, 3))
    assert torch.equal(layer.bias, before)


def test_a_network_without_anything_to_learn_is_refused() -> None:
    layer = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"all parameters are frozen \(requires_grad=False\)"):
        OuterOptimizer(layer.named_parameters())


def test_an_inner_loop_without_anything_to_adapt_is_refused() -> None:
    def headless(**shape: Any) -> nn.Module:
        net = MLP(hidden=[4], **shape)
        net.head.requires_grad_(False)
        return net

    with pytest.raises(ValueError, match=r"algo\.adapt=head: the network has no such parameters"):
        make(MAML, regression_spec(), headless, adapt="head")


def test_frozen_parameters_stay_frozen_through_a_checkpoint() -> None:
    spec, batch = regression_spec(), regression_batch(regression_spec())
    adam = partial(OuterOptimizer, lr=0.1)
    learner, other = (make(MAML, spec, frozen_mlp, optim=adam, seed=s) for s in (0, 1))
    learner.update(batch, Progress(0, 10))
    other.load_state_dict(learner.state_dict())
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in learner.parameters()
    ]
    for one in (learner, other):
        one.update(batch, Progress(1, 10))
    first, second = learner.state_dict(), other.state_dict()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
