"""MAML and its settings against closed forms, finite differences and a naive loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.optimization.maml import MAML
from metarun.core.types import Progress, TaskBatch, TaskSpec
from metarun.execution.engine import Engine
from tests.helpers import (
    TINY_BACKBONES,
    image_batch,
    image_spec,
    linear_backbone,
    make,
    moved,
    regression_batch,
    regression_spec,
    side_for,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "maml": {"inner_lr": 0.3, "inner_steps": 2},
    "fomaml": {"inner_lr": 0.3, "inner_steps": 2, "second_order_from": None},
    "anil": {"inner_lr": 0.3, "inner_steps": 2, "adapt": "head"},
    "boil": {"inner_lr": 0.3, "inner_steps": 2, "adapt": "body"},
    "metasgd": {"inner_lr": [0.1, 0.4], "inner_steps": 2, "rates": "element"},
}


def quadratic(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient and Hessian of mean((x w - y)^2) with a column of ones for the bias."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    hessian = 2 * x.T @ x / len(x)
    return hessian @ weights - 2 * x.T @ y / len(x), hessian


@pytest.mark.parametrize("first_order", [False, True])
def test_on_a_linear_model_the_meta_gradient_is_the_closed_form(first_order: bool) -> None:
    spec = regression_spec()
    batch = regression_batch(spec)
    option = {"second_order_from": None} if first_order else {}
    algorithm = make(MAML, spec, linear_backbone, inner_lr=0.1, **option)
    start = torch.cat([algorithm.net.head.weight, algorithm.net.head.bias[:, None]], 1).T.detach()

    expected = torch.zeros_like(start)
    for i in range(batch.num_tasks):
        support, hessian = quadratic(batch.support_x[i], batch.support_y[i], start)
        query, _ = quadratic(batch.query_x[i], batch.query_y[i], start - 0.1 * support)
        identity = torch.eye(len(start), dtype=start.dtype)
        jacobian = identity if first_order else identity - 0.1 * hessian
        expected += jacobian @ query / batch.num_tasks

    gradient = moved(algorithm, batch)
    ours = torch.cat([gradient["net.head.weight"], gradient["net.head.bias"][:, None]], 1).T
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_with_zero_inner_steps_it_is_ordinary_training() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = make(MAML, spec, TINY_BACKBONES["mlp"], inner_steps=0)
    net = algorithm.net
    losses = [
        nn.functional.cross_entropy(net(x), y)
        for x, y in zip(batch.query_x, batch.query_y, strict=True)
    ]
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(net.parameters()))
    gradient = moved(algorithm, batch)
    for (name, _), value in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradient[f"net.{name}"], value)


def naive_conv(params: list[Tensor], x: Tensor) -> Tensor:
    """The tiny max-pool Conv4 of the helpers, written with torch's own layers."""
    body, head = params[:-2], params[-2:]
    for i in range(2):
        weight, bias = body[2 * i : 2 * i + 2]
        scale, shift = body[4 + 2 * i : 6 + 2 * i]
        x = nn.functional.conv2d(x, weight, bias, padding=1)
        x = nn.functional.batch_norm(x, None, None, scale, shift, training=True)
        x = nn.functional.max_pool2d(torch.relu(x), 2)
    return nn.functional.linear(x.flatten(1), *head)


@pytest.mark.parametrize(
    ("engine", "recompute"), [("vmap", False), ("loop", False), ("threads", False), ("vmap", True)]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_naive_loop_over_tasks_gives_the_same_meta_gradient(
    name: str, engine: str, recompute: bool
) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    settings = {**SETTINGS[name], "recompute": recompute}
    algorithm = make(MAML, spec, TINY_BACKBONES["conv4 max-pool"], engine=engine, **settings)
    leaves = list(algorithm.net.parameters())
    names = [n for n, _ in algorithm.net.named_parameters()]
    rates = {n.replace("/", "."): r for n, r in algorithm.rates.named_parameters()}

    part = {"anil": "head", "boil": "body"}.get(name, "")
    losses = []
    for i in range(batch.num_tasks):
        params = list(leaves)
        for _ in range(2):
            loss = nn.functional.cross_entropy(
                naive_conv(params, batch.support_x[i]), batch.support_y[i]
            )
            grads = torch.autograd.grad(loss, params, create_graph=name != "fomaml")
            params = [
                p - rates.get(n, 0.3) * g if n.startswith(part) else p
                for n, p, g in zip(names, params, grads, strict=True)
            ]
        query = naive_conv(params, batch.query_x[i])
        losses.append(nn.functional.cross_entropy(query, batch.query_y[i]))
    wanted = {**dict(zip((f"net.{n}" for n in names), leaves, strict=True))}
    wanted |= {f"rates.{n.replace('.', '/')}": r for n, r in rates.items()}
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(wanted.values()))

    gradient = moved(algorithm, batch)
    assert gradient.keys() == wanted.keys()
    for key, value in zip(wanted, expected, strict=True):
        torch.testing.assert_close(gradient[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("backbone", "query"),
    [*((name, 2) for name in TINY_BACKBONES), ("conv4 max-pool", 6), ("conv4 of patches", 6)],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_engines_agree_to_1e_10(name: str, backbone: str, query: int) -> None:
    spec = image_spec(side=side_for(backbone))
    # With six queries per class, the `threads` engine runs tasks in two stages.
    batch = image_batch(spec, tasks=5, query=query)
    gradients = [
        moved(make(MAML, spec, TINY_BACKBONES[backbone], engine=engine, **SETTINGS[name]), batch)
        for engine in ("loop", "vmap", "threads")
    ]
    for other in gradients[1:]:
        for key, value in gradients[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", ["maml", "fomaml"])
def test_fused_operators_of_many_rows_agree_with_plain_ones(name: str, channels: int) -> None:
    spec = TaskSpec("classification", (channels, 8, 8), 3, 3)
    batch = image_batch(spec, tasks=2, shot=6, query=6)
    fused, config = (
        make(MAML, spec, TINY_BACKBONES["conv4 max-pool"], **SETTINGS[name]) for _ in range(2)
    )
    fused.engine, config.engine = (Engine(kind="loop", native=native) for native in (True, False))
    expected, gradient = moved(config, batch), moved(fused, batch)
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        fused.predict(batch.support_x, batch.support_y, batch.query_x).outputs,
        config.predict(batch.support_x, batch.support_y, batch.query_x).outputs,
    )


@pytest.mark.parametrize("backbone", ["mlp with batch norm", "conv4 max-pool", "conv4 stride"])
@pytest.mark.parametrize("name", ["maml", "anil", "boil", "metasgd"])
def test_the_meta_gradient_agrees_with_finite_differences(name: str, backbone: str) -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=2)
    settings = dict(SETTINGS[name])

    def loss_at(nudges: dict[str, Tensor]) -> float:
        algorithm = make(MAML, spec, TINY_BACKBONES[backbone], **settings)
        with torch.no_grad():
            for key, param in algorithm.named_parameters():
                param += nudges[key]
        return float(algorithm.update(batch, Progress(0, 1))["loss"])

    gradient = moved(make(MAML, spec, TINY_BACKBONES[backbone], **settings), batch)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = {
            key: torch.randn(g.shape, generator=draw, dtype=g.dtype) for key, g in gradient.items()
        }
        size = 1e-6
        up = loss_at({key: size * d for key, d in direction.items()})
        down = loss_at({key: -size * d for key, d in direction.items()})
        slope = sum(float((gradient[key] * d).sum()) for key, d in direction.items())
        assert (up - down) / (2 * size) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("rates", ["tensor", "element"])
def test_meta_sgd_with_equal_rates_is_maml(rates: str) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    backbone = TINY_BACKBONES["conv4 stride"]
    config = make(MAML, spec, backbone, inner_lr=0.2)
    learned = make(MAML, spec, backbone, inner_lr=0.2, rates=rates)
    expected, gradient = moved(config, batch), moved(learned, batch)
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key], value)
    assert sum("rates." in key for key in gradient) == len(expected)


def test_anil_adapts_the_head_alone() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = make(MAML, spec, TINY_BACKBONES["conv4 max-pool"], adapt="head", inner_lr=0.5)
    features = algorithm.net.body
    from metarun.backbones.layers.context import BATCH_STATISTICS

    support, query = (features(x[0], BATCH_STATISTICS) for x in (batch.support_x, batch.query_x))
    weight, bias = (p.detach().requires_grad_() for p in algorithm.net.head.parameters())
    loss = nn.functional.cross_entropy(support @ weight.T + bias, batch.support_y[0])
    grads = torch.autograd.grad(loss, (weight, bias))
    expected = query @ (weight - 0.5 * grads[0]).T + bias - 0.5 * grads[1]
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    torch.testing.assert_close(outputs[0], expected)


@pytest.mark.parametrize("backbone", ["conv4 max-pool", "conv4 instance norm"])
def test_without_adapt_norm_the_inner_loop_leaves_norms_alone_and_the_outer_loop_learns_them(
    backbone: str,
) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    options: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": 2}
    algorithm = make(MAML, spec, TINY_BACKBONES[backbone], adapt_norm=False, **options)
    leaves = dict(algorithm.net.named_parameters())
    learned = {n: p for n, p in leaves.items() if ".norms." not in n}
    assert len(leaves) - len(learned) == 4
    losses = []
    for i in range(batch.num_tasks):
        weights = dict(learned)
        for _ in range(2):
            outputs = functional_call(algorithm.net, leaves | weights, (batch.support_x[i],))
            loss = nn.functional.cross_entropy(outputs, batch.support_y[i])
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {n: p - 0.3 * g for (n, p), g in zip(weights.items(), grads, strict=True)}
        outputs = functional_call(algorithm.net, leaves | weights, (batch.query_x[i],))
        losses.append(nn.functional.cross_entropy(outputs, batch.query_y[i]))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    gradient = moved(algorithm, batch)
    for name, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(gradient[f"net.{name}"], value, rtol=1e-9, atol=1e-11)
        assert ".norms." not in name or (value != 0).any()


def test_boil_adapts_the_body_alone_and_learns_the_head_in_the_outer_loop() -> None:
    spec = TaskSpec("classification", (4,), 3, 3)
    batch = image_batch(spec)
    still = make(MAML, spec, linear_backbone, adapt="body", inner_lr=0.5, inner_steps=3)
    # A network without a body has nothing to adapt.
    trace = still.trace(batch.support_x, batch.support_y, batch.query_x, 3)
    assert torch.equal(trace[0], trace[3])
    algorithm = make(MAML, image_spec(), TINY_BACKBONES["mlp"], adapt="body", inner_lr=0.5)
    batch = image_batch(algorithm.spec)
    trace = algorithm.trace(batch.support_x, batch.support_y, batch.query_x, 1)
    assert not torch.equal(trace[0], trace[1])
    assert all((grad != 0).any() for grad in moved(algorithm, batch).values())


def test_the_order_switches_at_the_given_update() -> None:
    spec = regression_spec()
    batch = regression_batch(spec)

    def gradient(step: int, second_order_from: int | None) -> Tensor:
        algorithm = make(
            MAML, spec, linear_backbone, inner_lr=0.1, second_order_from=second_order_from
        )
        return moved(algorithm, batch, step)["net.head.weight"]

    assert torch.equal(gradient(4, 5), gradient(4, None))
    assert torch.equal(gradient(5, 5), gradient(5, 0))
    assert not torch.equal(gradient(5, 0), gradient(5, None))


def test_inner_clipping_bounds_how_far_one_step_goes() -> None:
    spec = regression_spec()
    batch = regression_batch(spec)
    batch = TaskBatch(batch.support_x, 1e6 * batch.support_y, batch.query_x, batch.query_y)
    algorithm = make(MAML, spec, linear_backbone, inner_lr=0.5, inner_clip=0.1)
    trace = algorithm.trace(batch.support_x, batch.support_y, batch.query_x, 1)
    reach = 0.05 * (batch.query_x.abs().sum(-1, keepdim=True) + 1)
    assert ((trace[1] - trace[0]).abs() <= reach + 1e-12).all()
    assert ((trace[1] - trace[0]).abs() > 0).any()


@pytest.mark.parametrize("graph", ["none", "replay"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_recomputing_inner_steps_changes_rounding_alone(steps: int, graph: str) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    settings: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": steps, "inner_clip": 0.05}
    kept, recomputed = (
        make(MAML, spec, TINY_BACKBONES["conv4 max-pool"], recompute=recompute, **settings)
        for recompute in (False, True)
    )
    recomputed.engine = Engine(kind="vmap", graph=graph)  # type: ignore[arg-type]
    expected, gradient = moved(kept, batch), moved(recomputed, batch)
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key], value, rtol=1e-10, atol=1e-11)
    for name, value in kept.named_buffers():
        torch.testing.assert_close(recomputed.get_buffer(name), value)


@pytest.mark.parametrize("engine", ["loop", "threads"])
def test_the_trace_passes_through_the_prediction(engine: str) -> None:
    spec = image_spec()
    batch = image_batch(spec, query=6)
    algorithm = make(
        MAML,
        spec,
        TINY_BACKBONES["conv4 stride"],
        engine=engine,
        inner_lr=0.4,
        eval_inner_steps=3,
    )
    rows = (batch.support_x, batch.support_y, batch.query_x)
    trace = algorithm.trace(*rows, 5)
    assert trace.shape == (6, *algorithm.predict(*rows).outputs.shape)
    torch.testing.assert_close(trace[3], algorithm.predict(*rows).outputs, rtol=0, atol=0)


@pytest.mark.parametrize("bn", ["support", "running"])
def test_unless_transductive_an_answer_does_not_depend_on_the_other_queries(bn: str) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = make(MAML, spec, TINY_BACKBONES["conv4 max-pool"], bn=bn)
    assert not algorithm.transductive
    whole = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    alone = algorithm.predict(batch.support_x, batch.support_y, batch.query_x[:, :1]).outputs
    torch.testing.assert_close(whole[:, :1], alone)


def test_transductive_answers_do_depend_on_the_other_queries() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = make(MAML, spec, TINY_BACKBONES["conv4 max-pool"])
    assert algorithm.transductive
    whole = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    fewer = algorithm.predict(batch.support_x, batch.support_y, batch.query_x[:, :2]).outputs
    assert not torch.allclose(whole[:, :2], fewer)


def test_chunks_of_tasks_do_not_change_the_gradient() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=5)
    whole = make(MAML, spec, TINY_BACKBONES["mlp"], engine="vmap")
    cut = make(MAML, spec, TINY_BACKBONES["mlp"])
    cut.engine = Engine("vmap", tasks_per_chunk=2)
    expected, gradient = moved(whole, batch), moved(cut, batch)
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key], value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_lr": -0.1}, "algo.inner_lr=-0.1"),
        ({"inner_lr": [0.1, 0.2]}, "algo.rates"),
        ({"inner_lr": [0.1]}, "low, high"),
        ({"inner_steps": -1}, "algo.inner_steps=-1"),
        ({"eval_inner_steps": -1}, "eval.inner_steps"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(MAML, image_spec(), TINY_BACKBONES["mlp"], **options)


def test_another_train_way_is_refused_since_the_head_is_fixed() -> None:
    with pytest.raises(ValueError, match=r"train\.way=4 differs from way=3"):
        make(MAML, image_spec(3, train_way=4), TINY_BACKBONES["mlp"])
