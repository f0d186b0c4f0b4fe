"""The LSTM meta-learner against gradient descent, scalar arithmetic and torch's own layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.optimization.metalstm import MetaLSTM, preprocess
from metarun.config.composition import composer
from metarun.core.types import Progress, TaskBatch
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


def stirred(spec: Any, backbone: Any, **options: Any) -> Any:
    """Return a meta-learner with weights large enough to affect the result."""
    algorithm = make(MetaLSTM, spec, backbone, **{"inner_steps": 3, "hidden_size": 4, **options})
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in algorithm.rule.values():
            weight += 0.3 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
        algorithm.rule["rate_bias"] += 2.0
    return algorithm


def rows(batch: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.support_x, batch.support_y, batch.query_x


@pytest.mark.parametrize("divide", [False, True])
def test_with_an_open_forget_gate_and_a_fixed_rate_it_is_gradient_descent(divide: bool) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = make(
        MetaLSTM, spec, TINY_BACKBONES["conv4 max-pool"], bn="transductive", divide_by_rows=divide
    )
    with torch.no_grad():
        for weight in algorithm.rule.values():
            weight.zero_()
        algorithm.rule["forget_bias"].fill_(60.0)
        algorithm.rule["rate_bias"].fill_(math.log(0.2 / 0.8))
    start = {name: value.clone() for name, value in algorithm.net.state_dict().items()}
    ours = algorithm.predict(*rows(batch)).outputs
    lr = 0.2 / batch.support_x.shape[1] if divide else 0.2
    for i in range(batch.num_tasks):
        algorithm.net.load_state_dict(start)
        descent = torch.optim.SGD(algorithm.net.parameters(), lr=lr)
        for _ in range(12):
            descent.zero_grad()
            outputs = algorithm.net(batch.support_x[i])
            nn.functional.cross_entropy(outputs, batch.support_y[i]).backward()
            descent.step()
        torch.testing.assert_close(ours[i], algorithm.net(batch.query_x[i]))


def test_preprocessing_is_the_formula_on_either_side_of_its_threshold() -> None:
    small, large = math.exp(-11), math.exp(-9)
    x = torch.tensor([large, -large, small, -small, 0.0, -3.0], dtype=torch.float64)
    expected = [
        [-0.9, 1.0],
        [-0.9, -1.0],
        [-1.0, math.exp(-1)],
        [-1.0, -math.exp(-1)],
        [-1.0, 0.0],
        [math.log(3.0) / 10, -1.0],
    ]
    torch.testing.assert_close(preprocess(x), torch.tensor(expected, dtype=torch.float64))


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def seen(value: float) -> list[float]:
    if abs(value) < math.exp(-10):
        return [-1.0, math.exp(10) * value]
    return [math.log(abs(value)) / 10, math.copysign(1.0, value)]


@pytest.mark.parametrize("previous", ["logit", "gate"])
def test_every_coordinate_follows_the_equations_in_scalar_arithmetic(previous: str) -> None:
    spec = regression_spec(features=2)
    batch = regression_batch(spec, tasks=1)
    algorithm = stirred(spec, linear_backbone, previous_gate=previous)
    rule = {name: value.tolist() for name, value in algorithm.rule.items()}
    units = algorithm.hidden_size
    x = [[*row, 1.0] for row in batch.support_x[0].tolist()]
    y = [row[0] for row in batch.support_y[0].tolist()]
    net = algorithm.net
    theta = [*net.head.weight[0].tolist(), net.head.bias.item()]
    hidden, cell = ([[0.0] * units for _ in theta] for _ in range(2))
    forget, rate = [0.0] * 3, [0.0] * 3
    for _ in range(3):
        errors = [
            sum(a * w for a, w in zip(r, theta, strict=True)) - t for r, t in zip(x, y, strict=True)
        ]
        loss = sum(e * e for e in errors) / len(y)
        grads = [
            sum(2 * e * r[k] for e, r in zip(errors, x, strict=True)) / len(y) ** 2
            for k in range(3)
        ]
        for k, grad in enumerate(grads):
            inputs = [*seen(loss), *seen(grad), *hidden[k]]
            weights = [*rule["loss"], *rule["gradient"], *rule["hidden"]]
            sums = [
                sum(a * w[j] for a, w in zip(inputs, weights, strict=True)) + rule["bias"][j]
                for j in range(4 * units)
            ]
            for j in range(units):
                write, keep, read = (sigmoid(sums[part * units + j]) for part in range(3))
                cell[k][j] = keep * cell[k][j] + write * math.tanh(sums[3 * units + j])
                hidden[k][j] = read * math.tanh(cell[k][j])
            gates = {}
            for name, last in (("forget", forget[k]), ("rate", rate[k])):
                inputs = [*hidden[k], theta[k], last]
                weights = rule[f"{name}_weight"]
                gates[name] = sum(a * w for a, w in zip(inputs, weights, strict=True))
                gates[name] += rule[f"{name}_bias"]
            theta[k] = sigmoid(gates["forget"]) * theta[k] - sigmoid(gates["rate"]) * grad
            as_seen = sigmoid if previous == "gate" else float
            forget[k], rate[k] = as_seen(gates["forget"]), as_seen(gates["rate"])
    expected = [
        sum(a * w for a, w in zip([*row, 1.0], theta, strict=True))
        for row in batch.query_x[0].tolist()
    ]
    ours = algorithm.predict(*rows(batch)).outputs[0, :, 0]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def naive_loss(
    algorithm: Any,
    batch: TaskBatch,
    i: int,
    values: dict[str, Tensor],
    constants: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Return the query loss of one task, with torch's own LSTM cell and unrolled weights.

    `constants` holds the gradient and the loss of each step; what it lacks is computed and
    appended, without a graph.
    """
    net = algorithm.net
    names = [name for name, _ in net.named_parameters()]
    shapes = [param.shape for param in net.parameters()]
    sizes = [param.numel() for param in net.parameters()]
    units = algorithm.hidden_size
    rule = {n.removeprefix("rule."): v for n, v in values.items() if n.startswith("rule.")}

    def loss_at(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = [part.view(s) for part, s in zip(theta.split(sizes), shapes, strict=True)]
        outputs = torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (x,))
        return algorithm.loss(outputs, y)

    # torch's cell has its gates in the order input, forget, candidate, output.
    order = torch.cat([torch.arange(units) + part * units for part in (0, 1, 3, 2)])
    weights = {
        "weight_ih": torch.cat([rule["loss"], rule["gradient"]]).T[order],
        "weight_hh": rule["hidden"].T[order],
        "bias_ih": rule["bias"][order],
        "bias_hh": torch.zeros_like(rule["bias"]),
    }
    lstm = nn.LSTMCell(4, units).double()
    theta = torch.cat([values[f"net.{name}"].flatten() for name in names])
    carried = None
    forget = rate = torch.zeros_like(theta)
    for step in range(algorithm.inner_steps):
        if step == len(constants):
            at = theta.detach().requires_grad_()
            value = loss_at(at, batch.support_x[i], batch.support_y[i])
            (grad,) = torch.autograd.grad(value, at)
            constants.append((grad / batch.support_x.shape[1], value.detach()))
        grad, value = constants[step]
        inputs = torch.cat([preprocess(value).expand(len(theta), 2), preprocess(grad)], 1)
        carried = torch.func.functional_call(lstm, weights, (inputs, carried))
        sees = [torch.cat([carried[0], torch.stack([theta, g], 1)], 1) for g in (forget, rate)]
        forget = sees[0] @ rule["forget_weight"] + rule["forget_bias"]
        rate = sees[1] @ rule["rate_weight"] + rule["rate_bias"]
        theta = forget.sigmoid() * theta - rate.sigmoid() * grad
    return loss_at(theta, batch.query_x[i], batch.query_y[i])


@pytest.mark.parametrize("backbone", ["mlp", "conv4 max-pool"])
def test_the_meta_gradient_is_that_of_torch_with_inner_gradients_as_constants(
    backbone: str,
) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = stirred(spec, TINY_BACKBONES[backbone])
    leaves = {n: p.detach().clone().requires_grad_() for n, p in algorithm.named_parameters()}
    losses = [naive_loss(algorithm, batch, i, leaves, []) for i in range(batch.num_tasks)]
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    gradient = moved(algorithm, batch)
    for name, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-12)


def test_the_meta_gradient_agrees_with_finite_differences_under_held_inputs() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=1)
    algorithm = stirred(spec, TINY_BACKBONES["mlp with batch norm"])
    values = {name: p.detach().clone() for name, p in algorithm.named_parameters()}
    constants: list[tuple[Tensor, Tensor]] = []
    naive_loss(algorithm, batch, 0, values, constants)
    gradient = moved(stirred(spec, TINY_BACKBONES["mlp with batch norm"]), batch)
    draw = torch.Generator().manual_seed(0)
    for part in ("net.", "rule."):
        nudges = {
            name: torch.randn(v.shape, generator=draw, dtype=v.dtype) * name.startswith(part)
            for name, v in values.items()
        }
        up, down = (
            float(
                naive_loss(
                    algorithm,
                    batch,
                    0,
                    {n: v + size * nudges[n] for n, v in values.items()},
                    constants,
                )
            )
            for size in (1e-6, -1e-6)
        )
        slope = sum(float((gradient[name] * d).sum()) for name, d in nudges.items())
        assert (up - down) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_the_engines_agree_to_1e_10(backbone: str) -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=5)
    gradients = [
        moved(stirred(spec, TINY_BACKBONES[backbone], engine=engine), batch)
        for engine in ("loop", "vmap", "threads")
    ]
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [0, 3])
def test_running_statistics_are_those_of_the_tasks_own_inner_steps(steps: int) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = stirred(
        spec, TINY_BACKBONES["conv4 max-pool"], bn="running", eval_inner_steps=steps
    )
    assert algorithm.bn_statistics == "running"
    assert not algorithm.transductive
    averages = [nn.BatchNorm2d(3, momentum=0.95, affine=False).double() for _ in range(2)]
    convs, norms = algorithm.net.body.convs, algorithm.net.body.norms

    def answer(params: dict[str, Tensor], x: Tensor) -> Tensor:
        for k in range(2):
            name = f"body.convs.{k}"
            x = nn.functional.conv2d(x, params[f"{name}.weight"], params[f"{name}.bias"], padding=1)
            scale, shift = params[f"body.norms.{k}.weight"], params[f"body.norms.{k}.bias"]
            x = averages[k](x) * scale[:, None, None] + shift[:, None, None]
            x = nn.functional.max_pool2d(torch.relu(x), 2)
        return nn.functional.linear(x.flatten(1), params["head.weight"], params["head.bias"])

    assert len(convs) == len(norms) == 2
    outputs = algorithm.predict(*rows(batch)).outputs
    for i in range(batch.num_tasks):
        for average in averages:
            average.reset_running_stats()
            average.train()
        state = algorithm._begin(algorithm.net, dict(algorithm.net.named_parameters()))
        for _ in range(steps):
            answer(weights_of(algorithm, state.theta), batch.support_x[i])
            state = algorithm._step(
                algorithm.net, dict(algorithm.rule), state, batch.support_x[i], batch.support_y[i]
            )
        for average in averages:
            average.eval()
        expected = answer(weights_of(algorithm, state.theta), batch.query_x[i])
        torch.testing.assert_close(outputs[i], expected)


def weights_of(algorithm: Any, theta: Tensor) -> dict[str, Tensor]:
    named = list(algorithm.net.named_parameters())
    parts = theta.split([param.numel() for _, param in named])
    return {n: part.view(p.shape) for (n, p), part in zip(named, parts, strict=True)}


@pytest.mark.parametrize("bn", ["running", "support"])
def test_an_answer_does_not_depend_on_the_other_queries(bn: str) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = stirred(spec, TINY_BACKBONES["conv4 max-pool"], bn=bn)
    whole = algorithm.predict(*rows(batch)).outputs
    alone = algorithm.predict(batch.support_x, batch.support_y, batch.query_x[:, :1]).outputs
    torch.testing.assert_close(whole[:, :1], alone)


def test_no_task_leaves_statistics_to_another() -> None:
    spec = image_spec()
    algorithm = stirred(spec, TINY_BACKBONES["conv4 max-pool"], bn="running")
    algorithm.update(image_batch(spec), Progress(0, 1))
    for norm in algorithm.net.body.norms:
        assert torch.equal(norm.running_mean, torch.zeros(3).double())
        assert torch.equal(norm.running_var, torch.ones(3).double())


def test_the_trace_passes_through_the_prediction() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = stirred(spec, TINY_BACKBONES["conv4 stride"], bn="running", eval_inner_steps=2)
    trace = algorithm.trace(*rows(batch), 4)
    torch.testing.assert_close(trace[2], algorithm.predict(*rows(batch)).outputs, rtol=0, atol=0)


def test_it_starts_as_gradient_descent_with_slowly_fading_weights() -> None:
    algorithm = make(MetaLSTM, image_spec(), TINY_BACKBONES["mlp"])
    rule = algorithm.rule
    assert 4.0 <= rule["forget_bias"].item() <= 5.0
    assert -5.0 <= rule["rate_bias"].item() <= -4.0
    for name in rule.keys() - {"forget_bias", "rate_bias"}:
        assert 0.0 < rule[name].abs().max().item() <= 0.01
    assert rule["hidden"].shape == (20, 80)


def test_its_outer_optimizer_clips_the_norm_as_the_code_does() -> None:
    with composer() as compose:
        config = compose.job(["algo=metalstm", "data=omniglot_small"]).config
    assert config["optim"]["clip_norm"] == 0.25
    assert config["bn"] == "running"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_steps": -1}, "algo.inner_steps=-1"),
        ({"hidden_size": 0}, "algo.hidden_size=0"),
        ({"forget_bias": [5.0, 4.0]}, "algo.forget_bias"),
        ({"rate_bias": [-4.0]}, r"algo.rate_bias=\[-4\]: expected two numbers"),
        ({"bn_momentum": 0.0}, "algo.bn_momentum=0.0"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(MetaLSTM, image_spec(), TINY_BACKBONES["mlp"], **options)
