"""MAML++ against MAML, the official code's numbers, a naive loop and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.optimization.maml import MAML
from metarun.algorithms.optimization.mamlpp import MAMLpp, loss_weights
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
    slow,
)

OFF: dict[str, Any] = {
    "multi_step_loss": 0.0,
    "per_step_rates": False,
    "per_step_statistics": False,
    "per_step_affine": False,
    "adapt_norm": True,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "multi-step loss": {"multi_step_loss": 0.5},
    "rates": {"per_step_rates": True},
    "statistics": {"per_step_statistics": True},
    "affine": {"per_step_affine": True},
    "norms constant": {"adapt_norm": False},
    "everything": dict.fromkeys(("per_step_rates", "per_step_statistics", "per_step_affine"), True)
    | {"multi_step_loss": 0.5, "adapt_norm": False},
}
INNER: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": 3}
MLP = TINY_BACKBONES["mlp with batch norm"]


def trained(kind: Any, backbone: Any, regression: bool, **options: Any) -> Any:
    """Return an algorithm after two updates."""
    spec = regression_spec() if regression else image_spec()
    algorithm = make(kind, spec, backbone, **options)
    for step in range(2):
        draw = regression_batch if regression else image_batch
        algorithm.update(draw(spec, seed=step), Progress(step, 2))
    return algorithm


@pytest.mark.parametrize("engine", ["vmap", slow("loop"), slow("threads")])
@pytest.mark.parametrize("second_order_from", [0, 1, None])
@pytest.mark.parametrize("adapt_norm", [True, False])
@pytest.mark.parametrize("backbone", ["mlp with batch norm", "conv4 max-pool", slow("resnet12")])
def test_with_every_switch_off_it_is_maml_bit_for_bit(
    backbone: str, adapt_norm: bool, second_order_from: int | None, engine: str
) -> None:
    options = {**INNER, "second_order_from": second_order_from, "engine": engine}
    options["adapt_norm"] = adapt_norm
    maml = trained(MAML, TINY_BACKBONES[backbone], False, **options)
    ours = trained(MAMLpp, TINY_BACKBONES[backbone], False, **{**OFF, **options})
    expected = dict(maml.net.state_dict())
    assert expected.keys() == ours.net.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.net.state_dict().items())
    batch = image_batch(maml.spec, seed=2)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    assert torch.equal(ours.predict(*rows).outputs, maml.predict(*rows).outputs)
    assert torch.equal(ours.trace(*rows, 5), maml.trace(*rows, 5))


def test_with_every_switch_off_it_is_maml_on_regression_too() -> None:
    backbone = TINY_BACKBONES["mlp"]
    maml = trained(MAML, backbone, True, inner_lr=0.05, inner_steps=2)
    ours = trained(MAMLpp, backbone, True, inner_lr=0.05, inner_steps=2, **OFF)
    for one, other in zip(maml.net.parameters(), ours.net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_loss_weights_are_those_of_the_official_code() -> None:
    # get_per_step_loss_importance_vector with 5 steps and 10 epochs, at epochs 0, 4, 9.
    assert loss_weights(5, 0.0) == pytest.approx([0.2] * 5)
    assert loss_weights(5, 0.4) == pytest.approx([0.12] * 4 + [0.52])
    assert loss_weights(5, 0.9) == pytest.approx([0.02] * 4 + [0.92])
    # From 97 % on, the weights have reached the minimum of 0.03 / 5.
    assert loss_weights(5, 0.99) == pytest.approx([0.006] * 4 + [0.976])
    assert loss_weights(1, 0.3) == [1.0]


def test_after_its_share_of_training_the_multi_step_loss_is_the_last_step_alone() -> None:
    spec = image_spec()
    batch = image_batch(spec)

    def gradient(step: int, share: float) -> Tensor:
        options = {**INNER, **OFF, "multi_step_loss": share}
        return moved(make(MAMLpp, spec, MLP, **options), batch, step)["net.head.weight"]

    # Out of the 100 updates in `moved`.
    assert torch.equal(gradient(30, 0.3), gradient(30, 0.0))
    assert not torch.equal(gradient(29, 0.3), gradient(29, 0.0))


def naive_rows(theta: dict[str, Tensor], x: Tensor, step: int) -> Tensor:
    """The tiny dense network with batch norm, written with torch's own functions."""
    x = x.flatten(1)
    for i in range(2):
        x = nn.functional.linear(
            x, theta[f"body.linears.{i}.weight"], theta[f"body.linears.{i}.bias"]
        )
        scale, shift = (theta[f"body.norms.{i}.{key}"] for key in ("weight", "bias"))
        if scale.dim() == 2:
            scale, shift = scale[step], shift[step]
        x = torch.tanh(nn.functional.batch_norm(x, None, None, scale, shift, training=True))
    return nn.functional.linear(x, theta["head.weight"], theta["head.bias"])


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
@pytest.mark.parametrize("adapt_norm", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_naive_loop_gives_the_same_meta_gradient(
    switch: str, adapt_norm: bool, engine: str
) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    options = {**INNER, **OFF, **SWITCHES[switch], "adapt_norm": adapt_norm}
    algorithm = make(MAMLpp, spec, MLP, engine=engine, **options)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in algorithm.parameters():
            # Makes the rows of the steps differ.
            param += 0.02 * torch.randn(param.shape, generator=draw).double()
    leaves = {f"net.{name}": p for name, p in algorithm.net.named_parameters()}
    rates = {f"rates.{name}": r for name, r in algorithm.rates.named_parameters()}
    # Update 20 of 100 with a fraction of 0.5: two fifths of the way from equal weights to the last.
    early = (1 - 0.4) / 3 if options["multi_step_loss"] else 0.0
    weights = [early, early, 1 - 2 * early]

    losses = []
    for i in range(batch.num_tasks):
        theta = {name.removeprefix("net."): p for name, p in leaves.items()}
        for step in range(3):
            loss = nn.functional.cross_entropy(
                naive_rows(theta, batch.support_x[i], step), batch.support_y[i]
            )
            names = [name for name in theta if adapt_norm or "norms" not in name]
            grads = torch.autograd.grad(loss, [theta[n] for n in names], create_graph=True)
            for name, grad in zip(names, grads, strict=True):
                rate = rates.get(f"rates.{name.replace('.', '/')}")
                theta[name] = theta[name] - (0.3 if rate is None else rate[step]) * grad
            query = naive_rows(theta, batch.query_x[i], step)
            losses.append(weights[step] * nn.functional.cross_entropy(query, batch.query_y[i]))
    wanted = {**leaves, **rates}
    total = torch.stack(losses).sum() / batch.num_tasks
    expected = torch.autograd.grad(total, list(wanted.values()))

    gradient = moved(algorithm, batch, step=20)
    assert gradient.keys() == wanted.keys()
    for key, value in zip(wanted, expected, strict=True):
        torch.testing.assert_close(gradient[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("backbone", "query"), [("conv4 max-pool", 2), ("conv4 max-pool", 6), ("resnet12", 2)]
)
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_engines_agree_to_1e_10(switch: str, backbone: str, query: int) -> None:
    spec = image_spec()
    # With six queries per class, the `threads` engine runs tasks in two stages.
    batch = image_batch(spec, tasks=5, query=query)
    options = {**INNER, **OFF, **SWITCHES[switch]}

    def after(engine: str) -> dict[str, Tensor]:
        algorithm = make(MAMLpp, spec, TINY_BACKBONES[backbone], engine=engine, **options)
        gradient = moved(algorithm, batch)
        return gradient | dict(algorithm.net.named_buffers())

    expected = after("loop")
    for engine in ("vmap", "threads"):
        for key, value in after(engine).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("regression", [False, True])
def test_the_gradient_of_the_learned_rates_agrees_with_finite_differences(
    regression: bool,
) -> None:
    spec = regression_spec() if regression else image_spec()
    batch = regression_batch(spec) if regression else image_batch(spec)
    backbone = linear_backbone if regression else TINY_BACKBONES["conv4 max-pool"]
    options = {**INNER, "inner_lr": 0.05, "multi_step_loss": 0.5}
    gradient = moved(make(MAMLpp, spec, backbone, **options), batch)

    def loss_at(name: str, step: int, nudge: float) -> float:
        algorithm = make(MAMLpp, spec, backbone, **options)
        with torch.no_grad():
            algorithm.rates[name][step] += nudge
        return float(algorithm.update(batch, Progress(0, 100))["loss"])

    for step in range(3):
        slope = (loss_at("head/weight", step, 1e-6) - loss_at("head/weight", step, -1e-6)) / 2e-6
        ours = float(gradient["rates.head/weight"][step])
        assert ours == pytest.approx(slope, rel=1e-5, abs=1e-8)
        assert ours != 0.0


def test_rates_are_learned_for_what_adapts_one_for_each_step() -> None:
    algorithm = make(MAMLpp, image_spec(), MLP, inner_lr=0.25, inner_steps=4)
    rates = dict(algorithm.rates.named_parameters())
    assert {name.replace("/", ".") for name in rates} == {
        name for name, _ in algorithm.net.named_parameters() if "norms" not in name
    }
    assert all(torch.equal(rate, torch.full((4,), 0.25).double()) for rate in rates.values())


def test_running_statistics_are_kept_for_each_step() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=1)
    options = {**INNER, **OFF, "per_step_statistics": True}
    algorithm = make(MAMLpp, spec, MLP, **options)
    first, last = algorithm.net.body.linears[0], {}
    weight, bias = (p.detach().clone() for p in first.parameters())
    theta = {name: p.detach().clone() for name, p in algorithm.net.named_parameters()}
    for step in range(3):
        last[step] = (batch.support_x[0].flatten(1) @ weight.T + bias).mean(0)
        leaves = {name: p.requires_grad_() for name, p in theta.items()}
        loss = nn.functional.cross_entropy(
            naive_rows(leaves, batch.support_x[0], step), batch.support_y[0]
        )
        grads = torch.autograd.grad(loss, list(leaves.values()))
        theta = {n: (p - 0.3 * g).detach() for (n, p), g in zip(leaves.items(), grads, strict=True)}
        weight, bias = theta["body.linears.0.weight"], theta["body.linears.0.bias"]
    # The last step also has a pass over the query rows; its moments are the mean of both passes.
    query = (batch.query_x[0].flatten(1) @ weight.T + bias).mean(0)
    expected = torch.stack([last[0], last[1], (last[2] + query) / 2])
    algorithm.update(batch, Progress(0, 1))
    torch.testing.assert_close(algorithm.net.body.norms[0].running_mean, 0.1 * expected)


def test_running_statistics_of_each_step_are_read_at_that_step() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    options = {**INNER, **OFF, "per_step_statistics": True, "bn": "running"}
    rows = (batch.support_x, batch.support_y, batch.query_x)
    algorithm = make(MAMLpp, spec, MLP, **options)
    before = algorithm.trace(*rows, 4)
    algorithm.net.body.norms[0].running_mean[1] += 1.0
    after = algorithm.trace(*rows, 4)
    # The second step learns and predicts with row 1.
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


def test_beyond_the_steps_of_training_the_last_rates_and_rows_go_on() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    options = {**INNER, "adapt_norm": False}
    few = make(MAMLpp, spec, MLP, **options)
    more = make(MAMLpp, spec, MLP, **{**options, "inner_steps": 5})
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for (name, one), other in zip(few.named_parameters(), more.parameters(), strict=True):
            if "norms" in name or "rates" in name:
                one += 0.1 * torch.randn(one.shape, generator=draw).double()
                other.copy_(one[[0, 1, 2, 2, 2]])
    torch.testing.assert_close(few.trace(*rows, 5), more.trace(*rows, 5), rtol=0, atol=0)


def test_the_trace_passes_through_the_prediction() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    for steps in (0, 2, 4):
        algorithm = make(MAMLpp, spec, MLP, eval_inner_steps=steps, **INNER)
        trace = algorithm.trace(*rows, 5)
        torch.testing.assert_close(trace[steps], algorithm.predict(*rows).outputs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_lr": 0.0}, "algo.inner_lr=0.0"),
        ({"inner_steps": 0}, "algo.inner_steps=0"),
        ({"second_order_from": -1}, "algo.second_order_from=-1"),
        ({"multi_step_loss": 1.5}, "algo.multi_step_loss=1.5"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(MAMLpp, image_spec(), TINY_BACKBONES["mlp"], **options)
