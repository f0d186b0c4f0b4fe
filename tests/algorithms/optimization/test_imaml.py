"""Implicit MAML against dense solves, closed forms, finite differences and a memory count."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.optimization.imaml import IMAML, conjugate_gradients
from metarun.algorithms.optimization.maml import MAML
from metarun.backbones.mlp import MLP
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
    side_for,
    slow,
)

EXACT = {"proximal": "each_step", "cg_damping": 0.0, "lam_damping": 0.0}


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in named.values()])


def quadratic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return H and b of mean((x w - y)^2) with gradient H w - b; a column of ones is the bias."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return 2 * x.T @ x / len(x), 2 * x.T @ y / len(x)


def linear_weights(named: dict[str, Tensor], prefix: str = "") -> Tensor:
    weight, bias = named[f"{prefix}head.weight"], named[f"{prefix}head.bias"]
    return torch.cat([weight, bias[:, None]], 1).T.detach()


def exact_gradient(batch: TaskBatch, start: Tensor, lam: float) -> tuple[Tensor, float]:
    """Return meta-gradient and meta-loss of linear regression with exactly solved tasks."""
    gradient, loss = torch.zeros_like(start), 0.0
    identity = torch.eye(len(start), dtype=start.dtype)
    for i in range(batch.num_tasks):
        hessian, b = quadratic(batch.support_x[i], batch.support_y[i])
        phi = torch.linalg.solve(hessian + lam * identity, b + lam * start)
        query_hessian, query_b = quadratic(batch.query_x[i], batch.query_y[i])
        slope = query_hessian @ phi - query_b
        gradient += torch.linalg.solve(identity + hessian / lam, slope) / batch.num_tasks
        x = torch.cat([batch.query_x[i], torch.ones(len(batch.query_x[i]), 1).double()], 1)
        loss += float((x @ phi - batch.query_y[i]).square().mean()) / batch.num_tasks
    return gradient, loss


@pytest.mark.parametrize("lam", [1.0, 4.0])
def test_on_linear_regression_solved_exactly_it_is_the_closed_form(lam: float) -> None:
    spec = regression_spec()
    batch = regression_batch(spec)
    solved = {"inner_lr": 0.1, "inner_steps": 250, "lam": lam, "cg_steps": 5, **EXACT}
    algorithm = make(IMAML, spec, linear_backbone, **solved)
    start = linear_weights(dict(algorithm.net.named_parameters()))
    expected, loss = exact_gradient(batch, start, lam)
    gradient = linear_weights(moved(algorithm, batch), "net.")
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    metrics = make(IMAML, spec, linear_backbone, **solved).update(batch, Progress(0, 1))
    assert float(metrics["loss"]) == pytest.approx(loss)


def naive(batch: TaskBatch, algorithm: Any, i: int, **how: Any) -> Tensor:
    """Return the meta-gradient of one task, with a dense Hessian and a dense solve.

    The steps and the matrix are those of the official code, or of the paper where `each`.
    """
    net, names = algorithm.net, [n for n, _ in algorithm.net.named_parameters()]
    start = [p.detach() for p in net.parameters()]
    sizes = [p.numel() for p in start]

    def loss_at(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = vector.split(sizes)
        params = {n: v.view(p.shape) for n, v, p in zip(names, parts, start, strict=True)}
        return algorithm.loss(torch.func.functional_call(net, params, (x,)), y)

    support, query = (
        (batch.support_x[i], batch.support_y[i]),
        (batch.query_x[i], batch.query_y[i]),
    )
    theta = torch.cat([p.flatten() for p in start])
    phi = theta.clone()
    for _ in range(how["steps"]):
        phi = phi.requires_grad_()
        pull = how["lam"] * (phi - theta) if how["each"] else 0.0
        (grad,) = torch.autograd.grad(loss_at(phi, *support), phi)
        phi = (phi - how["lr"] * (grad + pull)).detach()
    if not how["each"]:
        phi = phi - how["lr"] * how["lam"] * (phi - theta)
    phi = phi.requires_grad_()
    (target,) = torch.autograd.grad(loss_at(phi, *query), phi)
    hessian = torch.autograd.functional.hessian(lambda v: loss_at(v, *support), phi)
    identity = torch.eye(len(phi), dtype=phi.dtype)
    matrix = (1 + how["damping"]) * identity + hessian / (how["lam"] + how["lam_damping"])
    return torch.linalg.solve(matrix, target)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("backbone", ["mlp", slow("mlp with batch norm"), slow("conv4 stride")])
def test_with_enough_steps_it_is_a_dense_solve(backbone: str, each: bool) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    # Large query losses keep the residual above the code's tolerance until the solve is exact.
    batch = TaskBatch(batch.support_x, batch.support_y, 10 * batch.query_x, batch.query_y)
    algorithm = make(
        IMAML,
        spec,
        TINY_BACKBONES[backbone],
        inner_lr=0.2,
        inner_steps=3,
        lam=1.5,
        cg_steps=60,
        cg_damping=0.5,
        lam_damping=0.7,
        proximal="each_step" if each else "after",
    )
    how = {"lr": 0.2, "steps": 3, "lam": 1.5, "damping": 0.5, "lam_damping": 0.7, "each": each}
    solved = [naive(batch, algorithm, i, **how) for i in range(batch.num_tasks)]
    expected = torch.stack(solved).mean(0)
    torch.testing.assert_close(flat(moved(algorithm, batch)), expected, rtol=1e-4, atol=1e-5)


def test_conjugate_gradients_solve_as_many_unknowns_as_they_make_steps() -> None:
    draw = torch.Generator().manual_seed(0)
    half = torch.randn(7, 7, generator=draw, dtype=torch.float64)
    matrix, target = half @ half.T + torch.eye(7), torch.arange(1.0, 8.0, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, target)
    errors = [
        float((conjugate_gradients(lambda v: matrix @ v, target, steps) - expected).norm())
        for steps in range(1, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 < errors[-2]


def test_conjugate_gradients_stay_at_a_solution_once_they_reach_it() -> None:
    target = torch.arange(1.0, 4.0, dtype=torch.float64)
    for solved in (target, torch.zeros_like(target)):
        once = conjugate_gradients(lambda v: 2.0 * v, solved, 1)
        assert torch.equal(once, 0.5 * solved)
        assert torch.equal(conjugate_gradients(lambda v: 2.0 * v, solved, 9), once)


@pytest.mark.parametrize("backbone", ["mlp with batch norm", "conv4 max-pool"])
def test_a_proximal_term_without_bound_leaves_ordinary_training(backbone: str) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    # At lam = 1 / inner_lr the step on the proximal term returns to the initialization.
    algorithm = make(
        IMAML, spec, TINY_BACKBONES[backbone], inner_lr=1e-9, lam=1e9, cg_steps=8, cg_damping=0.0
    )
    net = algorithm.net
    losses = [
        nn.functional.cross_entropy(net(x), y)
        for x, y in zip(batch.query_x, batch.query_y, strict=True)
    ]
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(net.parameters()))
    gradient = moved(algorithm, batch)
    for (name, _), value in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradient[f"net.{name}"], value, rtol=1e-6, atol=1e-8)


def test_without_a_solve_and_far_from_the_proximal_term_it_is_first_order_maml() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    backbone = TINY_BACKBONES["conv4 max-pool"]
    steps = {"inner_lr": 0.2, "inner_steps": 3}
    first = moved(make(MAML, spec, backbone, second_order_from=None, **steps), batch)
    for cg_steps in (0, 1):
        ours = moved(make(IMAML, spec, backbone, lam=1e-12, cg_steps=cg_steps, **steps), batch)
        for name, value in first.items():
            torch.testing.assert_close(ours[name], value)


def test_the_meta_gradient_agrees_with_finite_differences_of_the_solved_loss() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=2)
    # A smooth network, and a proximal term that makes the inner problem convex.
    options = {"inner_lr": 0.1, "lam": 4.0, "inner_steps": 80, "cg_steps": 60, **EXACT}
    backbone = partial(MLP, hidden=[6, 5], activation="tanh")

    def loss_at(nudges: dict[str, Tensor], size: float) -> float:
        algorithm = make(IMAML, spec, backbone, **options)
        with torch.no_grad():
            for name, param in algorithm.named_parameters():
                param += size * nudges[name]
        return float(algorithm.update(batch, Progress(0, 1))["loss"])

    gradient = moved(make(IMAML, spec, backbone, **options), batch)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        nudges = {
            name: torch.randn(g.shape, generator=draw, dtype=g.dtype)
            for name, g in gradient.items()
        }
        slope = sum(float((gradient[name] * d).sum()) for name, d in nudges.items())
        change = (loss_at(nudges, 1e-5) - loss_at(nudges, -1e-5)) / 2e-5
        assert change == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_the_engines_agree_to_1e_10(backbone: str) -> None:
    spec = image_spec(side=side_for(backbone))
    batch = image_batch(spec, tasks=5)
    options = {"inner_steps": 3, "cg_steps": 4}
    gradients = [
        moved(make(IMAML, spec, TINY_BACKBONES[backbone], engine=engine, **options), batch)
        for engine in ("loop", "vmap", "threads")
    ]
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-10)


def peak_bytes(kind: type[Any], steps: int) -> int:
    """Return the peak number of bytes in use by torch's CPU allocator during one update."""
    spec = image_spec()
    batch = image_batch(spec, tasks=1, shot=4, query=4)
    algorithm = make(kind, spec, TINY_BACKBONES["conv4 max-pool"], inner_lr=0.01, inner_steps=steps)
    algorithm.update(batch, Progress(0, 1))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        algorithm.update(batch, Progress(0, 1))
    held = peak = 0
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_memory_grows_with_the_inner_steps_of_maml_and_not_with_those_of_imaml() -> None:
    implicit, unrolled = ([peak_bytes(kind, steps) for steps in (5, 50)] for kind in (IMAML, MAML))
    assert implicit[0] > 0
    assert implicit[1] <= 1.01 * implicit[0]
    assert unrolled[1] > 5 * unrolled[0]
    assert implicit[1] < unrolled[0]


def test_evaluation_has_no_proximal_term_unless_asked() -> None:
    spec = regression_spec()
    batch = regression_batch(spec)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    steps = {"inner_lr": 0.1, "inner_steps": 7}
    config = make(MAML, spec, linear_backbone, **steps).predict(*rows).outputs
    ours = make(IMAML, spec, linear_backbone, **steps).predict(*rows).outputs
    torch.testing.assert_close(ours, config)

    held = make(IMAML, spec, linear_backbone, eval_lam=2.0, inner_lr=0.1, inner_steps=200)
    start = linear_weights(dict(held.net.named_parameters()))
    hessian, b = quadratic(batch.support_x[0], batch.support_y[0])
    identity = torch.eye(len(start), dtype=start.dtype)
    phi = torch.linalg.solve(hessian + 2.0 * identity, b + 2.0 * start)
    expected = torch.cat([batch.query_x[0], torch.ones(5, 1).double()], 1) @ phi
    torch.testing.assert_close(held.predict(*rows).outputs[0], expected)


def test_the_trace_passes_through_the_prediction() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    backbone = TINY_BACKBONES["conv4 stride"]
    algorithm = make(IMAML, spec, backbone, inner_lr=0.4, inner_steps=9, eval_inner_steps=3)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    trace = algorithm.trace(*rows, 5)
    torch.testing.assert_close(trace[3], algorithm.predict(*rows).outputs, rtol=0, atol=0)


def test_running_statistics_are_gathered_on_the_query_rows() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = make(IMAML, spec, TINY_BACKBONES["conv4 max-pool"], bn="running", cg_steps=2)
    norm = algorithm.net.body.norms[0]
    conv = algorithm.net.body.convs[0]
    with torch.no_grad():
        fresh = torch.stack([conv(x).mean((0, 2, 3)) for x in batch.query_x]).mean(0)
    algorithm.inner_lr, algorithm.lam = 1e-9, 1e-9
    algorithm.update(batch, Progress(0, 1))
    torch.testing.assert_close(norm.running_mean, 0.1 * fresh, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_lr": 0.0}, "algo.inner_lr=0.0"),
        ({"lam": 0.0}, "algo.lam=0.0"),
        ({"inner_lr": 0.5, "lam": 4.0}, "less than 2 / algo.inner_lr=4"),
        ({"eval_lam": 30.0}, "algo.eval_lam=30.0"),
        ({"eval_lam": -1.0}, "algo.eval_lam=-1.0"),
        ({"inner_steps": -1}, "algo.inner_steps=-1"),
        ({"cg_steps": -1}, "algo.cg_steps=-1"),
        ({"cg_damping": -0.1}, "algo.cg_damping=-0.1"),
        ({"lam_damping": float("inf")}, "algo.lam_damping=inf"),
    ],
)
def test_bad_numbers_and_words_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(IMAML, image_spec(), TINY_BACKBONES["mlp"], **options)
