"""Tests of the inner optimizers against torch's own and closed-form solutions."""

from __future__ import annotations

import torch
from torch import Tensor

from metarun.algorithms.functional import adam_start, adam_step, gradient, sgd_adapt, sgd_path

START = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
CURVATURE = torch.tensor([0.5, 3.0], dtype=torch.float64)


def bowl(params: dict[str, Tensor]) -> Tensor:
    return 0.5 * (CURVATURE * params["w"] ** 2).sum()


def test_gradient_descent_on_a_bowl_shrinks_each_axis_by_its_curvature() -> None:
    adapted = sgd_adapt(bowl, START, lr=0.1, steps=4, first_order=False)
    torch.testing.assert_close(adapted["w"], START["w"] * (1 - 0.1 * CURVATURE) ** 4)


def test_no_steps_return_the_parameters_themselves() -> None:
    assert sgd_adapt(bowl, START, lr=0.1, steps=0, first_order=False) is START


def test_the_path_ends_where_adaptation_does() -> None:
    path = list(sgd_path(bowl, START, lr=0.1, steps=3, first_order=True))
    assert len(path) == 3
    assert torch.equal(
        path[-1]["w"], sgd_adapt(bowl, START, lr=0.1, steps=3, first_order=True)["w"]
    )


def test_a_first_order_gradient_is_a_constant_and_a_second_order_one_is_not() -> None:
    leaf = {"w": START["w"].clone().requires_grad_()}
    assert not gradient(bowl, leaf, first_order=True)["w"].requires_grad
    full = gradient(bowl, leaf, first_order=False)["w"]
    torch.testing.assert_close(torch.autograd.grad(full.sum(), leaf["w"])[0], CURVATURE)


def test_adam_follows_torch_up_to_where_epsilon_stands() -> None:
    theirs = START["w"].clone().requires_grad_()
    reference = torch.optim.Adam([theirs], lr=0.1, betas=(0.0, 0.999), eps=0.0)
    params, state = dict(START), adam_start(START)
    for _ in range(6):
        grads = {"w": CURVATURE * params["w"]}
        params, state = adam_step(params, grads, state, lr=0.1, betas=(0.0, 0.999), eps=0.0)
        theirs.grad = CURVATURE * theirs.detach()
        reference.step()
    torch.testing.assert_close(params["w"], theirs.detach())
