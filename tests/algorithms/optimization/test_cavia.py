"""CAVIA against closed forms, finite differences and a naive loop with torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.optimization.cavia import CAVIA
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.modulation import task_context
from metarun.backbones.network import Network
from metarun.core.types import Progress
from tests.helpers import (
    TINY_BACKBONES,
    image_batch,
    image_spec,
    linear_backbone,
    make,
    moved,
    regression_batch,
    regression_spec,
)
from tests.tiny_run import Watched, go

READERS = ["mlp", "conv4 max-pool", "conv4 stride"]
SETTINGS: dict[str, dict[str, Any]] = {
    "second order": {"inner_steps": 2},
    "first order": {"inner_steps": 2, "second_order_from": None},
    "clipped by task": {"inner_steps": 2, "task_clip": 0.01},
}


class Joined(nn.Module):
    """A body whose features are its input and the context: the network is linear in both."""

    def __init__(self, context_dim: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        context = task_context(ctx, self.context_dim, x)
        return torch.cat([x, context.expand(len(x), -1)], 1)


def joined(input_shape: tuple[int, ...], output_dim: int, context_dim: int) -> Network:
    return Network(Joined(context_dim), input_shape, output_dim)


@pytest.mark.parametrize("first_order", [False, True])
def test_where_the_context_enters_linearly_all_is_a_closed_form(first_order: bool) -> None:
    """One step from y = w x + b + v phi gives w x + b - 2 lr |v|^2 m; m is the mean residual."""
    batch = regression_batch(regression_spec())
    order = {"second_order_from": None} if first_order else {}
    algorithm = make(
        CAVIA, regression_spec(), joined, num_context=2, inner_lr=0.3, inner_steps=1, **order
    )
    weight, bias = algorithm.net.head.weight[0].detach(), algorithm.net.head.bias.detach()
    w, v = weight[:3], weight[3:]

    contexts, by_w, by_v, by_b = [], [], [], []
    through = 0.0 if first_order else 1.0
    for i in range(batch.num_tasks):
        mean_residual = (batch.support_x[i] @ w + bias - batch.support_y[i, :, 0]).mean()
        phi = -0.3 * 2 * mean_residual * v
        error = batch.query_x[i] @ w + bias + v @ phi - batch.query_y[i, :, 0]
        pull = -0.6 * (v @ v) * through
        contexts.append(phi)
        by_w.append(2 * (error[:, None] * (batch.query_x[i] + pull * batch.support_x[i].mean(0))))
        by_b.append(2 * error * (1 + pull))
        by_v.append(2 * error[:, None] * phi * (1 + through))
    gradient = [torch.stack(parts).mean((0, 1)) for parts in (by_w, by_v)]

    rows = (batch.support_x, batch.support_y, batch.query_x)
    torch.testing.assert_close(algorithm.predict(*rows).embedding, torch.stack(contexts))
    ours = moved(algorithm, batch)
    torch.testing.assert_close(ours["net.head.weight"][0], torch.cat(gradient))
    torch.testing.assert_close(ours["net.head.bias"][0], torch.stack(by_b).mean())


def naive_mlp(params: dict[str, Tensor], x: Tensor, context: Tensor) -> Tensor:
    """Compute the tiny MLP of the helpers."""
    x = torch.cat([x.flatten(1), context.repeat(len(x), 1)], 1)
    for i in range(2):
        x = torch.relu(x @ params[f"body.linears.{i}.weight"].T + params[f"body.linears.{i}.bias"])
    return x @ params["head.weight"].T + params["head.bias"]


def naive_conv(params: dict[str, Tensor], x: Tensor, context: Tensor) -> Tensor:
    """Compute the tiny max-pool Conv4 of the helpers, with FiLM in the first of its two blocks."""
    for i in range(2):
        weight, bias = params[f"body.convs.{i}.weight"], params[f"body.convs.{i}.bias"]
        scale, shift = params[f"body.norms.{i}.weight"], params[f"body.norms.{i}.bias"]
        x = nn.functional.conv2d(x, weight, bias, padding=1)
        x = nn.functional.batch_norm(x, None, None, scale, shift, training=True)
        x = nn.functional.max_pool2d(x, 2)
        if i == 0:
            film = params["body.film.linear.weight"] @ context + params["body.film.linear.bias"]
            x = film[:3, None, None] * x + film[3:, None, None]
        x = torch.relu(x)
    return nn.functional.linear(x.flatten(1), params["head.weight"], params["head.bias"])


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
@pytest.mark.parametrize(
    ("name", "naive"), [("mlp", naive_mlp), ("conv4 max-pool", naive_conv)], ids=["mlp", "conv4"]
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_naive_loop_over_tasks_gives_the_same_meta_gradient(
    setting: str, name: str, naive: Callable[..., Tensor], engine: str
) -> None:
    batch = image_batch(image_spec())
    algorithm = make(CAVIA, image_spec(), TINY_BACKBONES[name], engine=engine, **SETTINGS[setting])
    params = dict(algorithm.net.named_parameters())

    totals = {key: torch.zeros_like(param) for key, param in params.items()}
    for i in range(batch.num_tasks):
        context = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            outputs = naive(params, batch.support_x[i], context)
            loss = nn.functional.cross_entropy(outputs, batch.support_y[i])
            second = setting != "first order"
            context = context - torch.autograd.grad(loss, context, create_graph=second)[0]
            context = context if second else context.detach().requires_grad_()
        outputs = naive(params, batch.query_x[i], context)
        loss = nn.functional.cross_entropy(outputs, batch.query_y[i])
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for key, grad in zip(params, grads, strict=True):
            limit = 0.01 if setting == "clipped by task" else float("inf")
            totals[key] += grad.clamp(-limit, limit) / batch.num_tasks

    gradient = moved(algorithm, batch)
    assert gradient.keys() == {f"net.{key}" for key in params}
    for key, expected in totals.items():
        torch.testing.assert_close(gradient[f"net.{key}"], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backbone", READERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_engines_agree_to_1e_10(setting: str, backbone: str) -> None:
    batch = image_batch(image_spec(), tasks=5)
    options = SETTINGS[setting]
    gradients = [
        moved(make(CAVIA, image_spec(), TINY_BACKBONES[backbone], engine=e, **options), batch)
        for e in ("loop", "vmap", "threads")
    ]
    for other in gradients[1:]:
        for key, value in gradients[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backbone", READERS)
def test_the_meta_gradient_agrees_with_finite_differences(backbone: str) -> None:
    batch = image_batch(image_spec(), tasks=2)

    def loss_at(nudges: dict[str, Tensor]) -> float:
        algorithm = make(CAVIA, image_spec(), TINY_BACKBONES[backbone], inner_steps=2)
        with torch.no_grad():
            for key, param in algorithm.named_parameters():
                param += nudges[key]
        return float(algorithm.update(batch, Progress(0, 1))["loss"])

    gradient = moved(make(CAVIA, image_spec(), TINY_BACKBONES[backbone], inner_steps=2), batch)
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


@pytest.mark.parametrize("backbone", READERS)
def test_in_no_steps_it_is_the_network_at_a_context_of_zero(backbone: str) -> None:
    batch = image_batch(image_spec())
    algorithm = make(CAVIA, image_spec(), TINY_BACKBONES[backbone], inner_steps=0)
    answer = algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    assert answer.embedding.shape == (3, 5)
    assert not answer.embedding.any()
    for outputs, x in zip(answer.outputs, batch.query_x, strict=True):
        torch.testing.assert_close(outputs, algorithm.net(x))


@pytest.mark.parametrize("bn", ["transductive", "running"])
@pytest.mark.parametrize("backbone", READERS)
def test_only_the_context_adapts_and_it_is_the_embedding(backbone: str, bn: str) -> None:
    batch = image_batch(image_spec())
    algorithm = make(CAVIA, image_spec(), TINY_BACKBONES[backbone], inner_steps=3, bn=bn)
    answer = algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    config = algorithm.net(batch.query_x[0], ForwardContext(running=bn == "running"))
    assert not torch.allclose(answer.outputs[0], config)
    for i, context in enumerate(answer.embedding):
        ctx = ForwardContext(running=bn == "running", context=context)
        torch.testing.assert_close(answer.outputs[i], algorithm.net(batch.query_x[i], ctx))


def test_by_the_support_s_statistics_an_answer_does_not_depend_on_the_other_queries() -> None:
    batch = image_batch(image_spec())
    algorithm = make(CAVIA, image_spec(), TINY_BACKBONES["conv4 max-pool"], bn="support")
    whole = algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    alone = algorithm.predict(batch.support_x, batch.support_y, batch.query_x[:, :1])
    torch.testing.assert_close(whole.outputs[:, :1], alone.outputs)
    context = whole.embedding[0]
    rows = torch.cat([batch.support_x[0], batch.query_x[0]])
    seen = algorithm.net(rows, ForwardContext(rows=len(batch.support_x[0]), context=context))
    torch.testing.assert_close(whole.outputs[0], seen[len(batch.support_x[0]) :])


def test_the_trace_passes_through_the_prediction() -> None:
    batch = image_batch(image_spec())
    algorithm = make(CAVIA, image_spec(), TINY_BACKBONES["mlp"], eval_inner_steps=3)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    torch.testing.assert_close(
        algorithm.trace(*rows, 5)[3], algorithm.predict(*rows).outputs, rtol=0, atol=0
    )


def test_the_order_switches_at_the_given_update() -> None:
    batch = image_batch(image_spec())

    def gradient(step: int, second_order_from: int | None) -> Tensor:
        options = {"second_order_from": second_order_from}
        algorithm = make(CAVIA, image_spec(), TINY_BACKBONES["mlp"], **options)
        return moved(algorithm, batch, step)["net.head.weight"]

    assert torch.equal(gradient(4, 5), gradient(4, None))
    assert torch.equal(gradient(5, 5), gradient(5, 0))
    assert not torch.equal(gradient(5, 0), gradient(5, None))


def test_batch_norm_gathers_its_running_statistics_from_the_query_pass() -> None:
    batch = image_batch(image_spec(), tasks=1)
    for options in ({}, {"task_clip": 10.0}):
        algorithm = make(CAVIA, image_spec(), TINY_BACKBONES["conv4 max-pool"], **options)
        context = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).embedding[0]
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        algorithm.net(batch.query_x[0], ForwardContext(context=context, moments=moments))
        algorithm.update(batch, Progress(0, 1))
        for norm in algorithm.net.body.norms:
            torch.testing.assert_close(norm.running_mean, 0.1 * moments[norm.name][0])


def test_the_episodes_of_a_run_keep_the_contexts(tmp_path: Path) -> None:
    source = Watched()
    algorithm = make(CAVIA, source.spec, TINY_BACKBONES["mlp"], num_context=4, inner_lr=0.1)
    go(tmp_path / "cavia", source, algorithm, steps=2)
    batch = source.batch("test", 0, 6)
    expected = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).embedding
    kept = np.load(tmp_path / "cavia" / "episodes.npz")["embeddings"]
    assert kept.shape == (6, 4)
    np.testing.assert_allclose(kept, expected.numpy(), rtol=1e-12)
    go(tmp_path / "maml", steps=2)
    assert "embeddings" not in np.load(tmp_path / "maml" / "episodes.npz")


@pytest.mark.parametrize("backbone", [TINY_BACKBONES["resnet12"], linear_backbone])
def test_a_backbone_that_reads_no_context_is_refused(backbone: Any) -> None:
    name = getattr(backbone, "func", backbone).__name__
    with pytest.raises(ValueError, match=f"{name} does not read: use backbone=mlp or"):
        make(CAVIA, image_spec(), backbone)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_context": 0}, r"algo\.num_context=0: expected 1 or more"),
        ({"inner_lr": 0.0}, r"algo\.inner_lr=0\.0: expected a positive number"),
        ({"inner_lr": float("nan")}, r"algo\.inner_lr=nan: expected a positive number"),
        ({"inner_steps": -1}, r"algo\.inner_steps=-1: expected 0 or more"),
        ({"second_order_from": -1}, r"algo\.second_order_from=-1: expected 0 or more"),
        ({"task_clip": 0.0}, r"algo\.task_clip=0\.0: expected a positive number, or null"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(CAVIA, image_spec(), TINY_BACKBONES["mlp"], **options)
