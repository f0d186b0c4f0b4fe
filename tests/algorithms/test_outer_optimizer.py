"""Tests of the outer optimizer against torch's own, of its schedules and its error messages."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.outer_optimizer import NonFiniteError, OuterOptimizer
from metarun.algorithms.update_rules import SGD, Adam, UpdateRule
from metarun.core.types import Progress


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))


def gradient(step: int) -> Tensor:
    return torch.tensor([0.3, -0.1 * step], dtype=torch.float64)


def test_adam_is_that_of_torch_whatever_order_the_gradients_come_in() -> None:
    ours, theirs = [parameter(), parameter()], [parameter(), parameter()]
    outer = OuterOptimizer([("a", ours[0]), ("b", ours[1])], lr=0.01)
    reference = torch.optim.Adam(theirs, lr=0.01)
    for step in range(5):
        outer.step({"b": gradient(step), "a": 2 * gradient(step)}, Progress(step, 5))
        theirs[0].grad, theirs[1].grad = 2 * gradient(step), gradient(step)
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("rule", [Adam((0.9, 0.999), 0.0), SGD(0.0, 0.0)])
def test_nothing_to_learn_is_no_error(rule: UpdateRule) -> None:
    rule.step([], [], 0.1)
    assert not rule.state


@pytest.mark.parametrize("method", ["adam", "sgd"])
def test_updates_and_state_are_those_of_torch_and_go_on_from_either(method: str) -> None:
    options = {"weight_decay": 0.1}
    theirs = [parameter(), parameter()]
    reference: torch.optim.Optimizer = torch.optim.Adam(theirs, lr=0.02, fused=True, **options)
    if method == "sgd":
        options["momentum"] = 0.9
        reference = torch.optim.SGD(theirs, lr=0.02, **options)

    def outer(ours: list[nn.Parameter]) -> OuterOptimizer:
        named = list(zip("ab", ours, strict=True))
        return OuterOptimizer(named, method=method, lr=0.02, **options)  # type: ignore[arg-type]

    ours = [parameter(), parameter()]
    first = outer(ours)
    for step in range(8):
        if step == 4:
            # Another one goes on with the state of torch's own, which is that of the first.
            stored = copy.deepcopy(reference.state_dict())
            for position, own in first.get_extra_state()["state"].items():
                assert own.keys() == stored["state"][position].keys()
                assert all(torch.equal(own[k], v) for k, v in stored["state"][position].items())
            first = outer(ours)
            first.set_extra_state(stored)
        grads = [gradient(step), 2 * gradient(step)]
        first.step(dict(zip("ab", grads, strict=True)), Progress(step, 8))
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(stored["state"][0].popitem()[1], torch.zeros(2))


def test_the_memory_layout_of_a_gradient_is_without_meaning() -> None:
    grad = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = nn.Parameter(torch.zeros(4, 3, 2, 2))
        outer = OuterOptimizer([("p", param)], lr=0.1)
        for scale in (1.0, -0.3):
            outer.step({"p": (scale * grad).contiguous(memory_format=layout)}, Progress(0, 1))
        moved.append(param.detach().clone())
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], torch.zeros_like(moved[0]))


def test_descend_takes_the_gradient_of_the_loss_itself() -> None:
    param = parameter()
    outer = OuterOptimizer([("p", param)], method="sgd", lr=0.5)
    outer.descend((param**2).sum(), Progress(0, 1))
    torch.testing.assert_close(param.detach(), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(bad: float) -> None:
    good, worse = parameter(), parameter()
    outer = OuterOptimizer([("good", good), ("worse", worse)])
    grads = {"good": gradient(1), "worse": torch.tensor([0.0, bad], dtype=torch.float64)}
    with pytest.raises(NonFiniteError, match="gradient of worse"):
        outer.step(grads, Progress(0, 1))
    assert torch.equal(good, parameter())
    with pytest.raises(NonFiniteError, match="loss is"):
        outer.descend(worse.sum() * bad, Progress(0, 1))
    assert torch.equal(worse, parameter())


def test_schedules_have_their_closed_forms() -> None:
    def rate(schedule: str, step: int, **options: float) -> float:
        outer = OuterOptimizer([("p", parameter())], lr=0.8, schedule=schedule, **options)  # type: ignore[arg-type]
        return outer.rate(Progress(step, 100))

    assert rate("constant", 99) == 0.8
    assert rate("linear", 25) == pytest.approx(0.6)
    assert rate("cosine", 0, min_lr=0.2) == pytest.approx(0.8)
    assert rate("cosine", 50, min_lr=0.2) == pytest.approx(0.5)
    assert rate("step", 59, step_every=20, step_factor=0.5) == pytest.approx(0.2)


def test_clipping_by_value_cuts_elements_and_by_norm_scales_all() -> None:
    def after(**options: float) -> Tensor:
        param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        outer = OuterOptimizer([("p", param)], method="sgd", lr=1.0, **options)  # type: ignore[arg-type]
        outer.step({"p": torch.tensor([3.0, -4.0], dtype=torch.float64)}, Progress(0, 1))
        return -param.detach()

    assert after(clip_value=3.5).tolist() == [3.0, -3.5]
    assert after(clip_norm=1.0).tolist() == pytest.approx([0.6, -0.8])
    assert after(clip_norm=10.0).tolist() == [3.0, -4.0]


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    first, second = parameter(), parameter()
    outer = OuterOptimizer([("p", first)])
    for step in range(3):
        outer.step({"p": gradient(step)}, Progress(step, 6))
    copy = OuterOptimizer([("p", second)])
    copy.load_state_dict(outer.state_dict())
    second.data.copy_(first.data)
    for step in range(3, 6):
        outer.step({"p": gradient(step)}, Progress(step, 6))
        copy.step({"p": gradient(step)}, Progress(step, 6))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "optim.lr=-1.0"),
        ({"lr": math.nan}, "optim.lr=nan"),
        ({"clip_norm": 0.0}, "optim.clip_norm"),
    ],
)
def test_bad_numbers_and_words_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OuterOptimizer([("p", parameter())], **options)  # type: ignore[arg-type]
