"""Variants of MAML as an author writes them: one function of the inner loop is overridden."""

from __future__ import annotations

import torch
from torch import Tensor

from metarun.algorithms.functional import Loss, Params
from metarun.algorithms.optimization.maml import MAML
from tests.helpers import linear_backbone, make, moved, regression_batch, regression_spec


class Doubled(MAML):
    """Twice the inner loss."""

    def inner_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2.0 * super().inner_loss(outputs, targets)


class Twofold(MAML):
    """Two gradient steps in each inner step."""

    def inner_step(
        self, loss: Loss, weights: Params, params: Params, *, first_order: bool
    ) -> Params:
        once = super().inner_step(loss, weights, params, first_order=first_order)
        return super().inner_step(loss, once, params, first_order=first_order)


def check_equal(variant: MAML, maml: MAML) -> None:
    """Check that two learners have the same predictions and outer gradient."""
    batch = regression_batch(regression_spec())
    rows = (batch.support_x, batch.support_y, batch.query_x)
    torch.testing.assert_close(variant.predict(*rows).outputs, maml.predict(*rows).outputs)
    expected = moved(maml, batch)
    for name, found in moved(variant, batch).items():
        torch.testing.assert_close(found, expected[name])


def test_twice_the_inner_loss_is_twice_the_inner_rate() -> None:
    spec = regression_spec()
    variant = make(Doubled, spec, linear_backbone, inner_lr=0.05, inner_steps=2)
    check_equal(variant, make(MAML, spec, linear_backbone, inner_lr=0.1, inner_steps=2))


def test_an_inner_step_of_two_steps_is_twice_as_many_steps() -> None:
    spec = regression_spec()
    variant = make(Twofold, spec, linear_backbone, inner_lr=0.1, inner_steps=2)
    check_equal(variant, make(MAML, spec, linear_backbone, inner_lr=0.1, inner_steps=4))


def test_a_variant_recomputes_its_inner_steps_too() -> None:
    spec = regression_spec()
    options = {"inner_lr": 0.1, "inner_steps": 2}
    variant = make(Twofold, spec, linear_backbone, recompute=True, **options)
    check_equal(variant, make(Twofold, spec, linear_backbone, **options))
