"""MetaGAN: a learner that also distinguishes generated images from real ones (Zhang et al. 2018).

There is no official code. Choices that the paper leaves open are documented where they are made.

Shapes: T tasks, S support rows, Q query rows, M generated rows, R rows, W ways, Z latent numbers,
C H W' channels, height and width of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, LearnerSetup, task_metric
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.adversarial import AdversarialLearner, SupportTerm
from metarun.algorithms.functional import Params
from metarun.algorithms.outer_optimizer import (
    OuterOptimizer,
    update_running_statistics,
)
from metarun.backbones.layers.context import ForwardContext
from metarun.core import seeding
from metarun.core.checks import at_least, positive
from metarun.core.types import Adapted, Metrics, Prediction, Progress, TaskBatch

Classes = Literal["softmax", "own"]


class MetaGAN(Algorithm):
    """MetaGAN: trains a learner against a generator of images for each task.

    The learner assigns real rows to one of W classes, and generated rows to an additional class
    W + 1. This moves its decision boundaries close to the data. The generator learns to produce
    rows that the learner classifies as real. Both objectives are maximized (Zhang et al. 2018,
    section 3.1):

        L_D = log p(y | x, y <= W) + log p(y <= W | x) + log p(W + 1 | generated),
        L_G = log p(y <= W | generated).

    The logit of class W + 1 is zero, as in the paper for relation networks. This loses no
    generality for other learners (Salimans et al. 2016, section 5): p(y <= W | x) is the sigmoid
    of the logsumexp of the W logits. The logits of a relation network are its scores before the
    sigmoid. The paper's semi-supervised setting, rows without labels, is not implemented.

    The real rows are the query rows. Generated rows pass through the learner separately, so batch
    norm never mixes the two. Learner and generator are updated at the same time: the generator's
    loss uses the learner before the update, after its inner steps, as a constant. The generator's
    learning rate is constant, whatever the schedule of the learner.

    With MAML, the inner loss has the same terms as the outer loss: the support of a task is
    distinguished from `inner_fakes` rows generated for it. At evaluation these rows come from the
    same latent numbers for every task. With `fakes=0` the algorithm equals its learner bit for
    bit.

    Args:
        learner: Class of the learner, such as MAML or RelationNet; its options are given along
            with those below.
        fakes: Generated rows in the outer loss of a task, M; 0 leaves the generator out.
        inner_fakes: Generated rows in the inner loss of a task, for a learner with an inner loss;
            0 leaves the inner loss unchanged.
        latent: Latent numbers of a generated row, Z.
        filters: Channels of the encoder and of the generator's last hidden layer.
        generator_lr: Learning rate of the generator's Adam, whose decay rates are 0.5 and 0.999.
        weight: Weight of the terms that distinguish real from generated rows; 1 in the paper.
        classes: Loss of the classes of real rows: `softmax`, the paper's log p(y | x, y <= W), or
            the learner's `own` loss. For MAML the two are equal.
        **options: Options of the learner.

    Raises:
        ValueError: A setting is out of range, the inputs are not images, or the learner does not
            support an adversary.
    """

    capabilities = Capabilities(kinds=("classification",))

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        learner: type[Algorithm],
        fakes: int = 5,
        inner_fakes: int = 0,
        latent: int = 64,
        filters: int = 16,
        generator_lr: float = 0.0002,
        weight: float = 1.0,
        classes: Classes = "softmax",
        **options: Any,
    ) -> None:
        self.capabilities = replace(learner.capabilities, kinds=self.capabilities.kinds)
        super().__init__(setup)
        made: Any = learner(setup, **options)
        if not _suits(made):
            raise ValueError(
                f"algo.learner={learner.__name__} has no `solve`: expected a learner such as MAML "
                "or RelationNet"
            )
        at_least("algo", 0, fakes=fakes, inner_fakes=inner_fakes, weight=weight)
        at_least("algo", 1, latent=latent, filters=filters)
        positive("algo", generator_lr=generator_lr)
        if len(self.spec.input_shape) != 3:
            raise ValueError(
                f"{type(self).__name__} generates images, but an input of the data set has shape "
                f"{self.spec.input_shape}: use a data set of images"
            )
        if getattr(made, "recompute", False):
            raise ValueError("algo.recompute=true: expected false, MetaGAN does not support it")
        if inner_fakes and not hasattr(made, "term_at_evaluation"):
            raise ValueError(
                f"algo.inner_fakes={inner_fakes}: expected 0, since {learner.__name__} has no "
                "inner loss"
            )
        self.learner: Algorithm = made
        self.fakes = fakes
        self.inner_fakes = inner_fakes if fakes else 0
        self.latent = latent
        self.weight = weight
        self.classes: Classes = classes
        self.generator: Generator | None = None
        if fakes:
            self.generator = Generator(self.spec.input_shape, latent, filters)
            self.adversary = OuterOptimizer(
                [(f"generator.{n}", p) for n, p in self.generator.named_parameters()],
                lr=generator_lr,
                betas=(0.5, 0.999),
            )
        if self.inner_fakes:
            made.term_at_evaluation = self._term_at_evaluation

    @property
    def net(self) -> nn.Module:  # type: ignore[override]
        """Network of the learner."""
        return self.learner.net

    @property
    def keeps_support(self) -> bool:
        return self.learner.keeps_support

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        return self.learner.adapt(support_x, support_y)

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        return self.learner.answer(adapted, query_x)

    def trace(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int
    ) -> Tensor | None:
        return self.learner.trace(support_x, support_y, query_x, steps)

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        if self.generator is None:
            return self.learner.update(batch, progress)
        learner: Any = self.learner
        first = progress.first_task(batch.num_tasks)
        keys = seeding.task_keys(self.seed, "made", first, batch.num_tasks, self.device)
        made = self._made(batch.support_x, keys, self.inner_fakes + self.fakes)

        def task(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Any]:
            support_x, support_y, query_x, query_y, noise, inner, outer = rows
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            term = self._term(inner) if self.inner_fakes else None
            answer = learner.solve(net, params, support_x, support_y, noise, progress, term)
            outputs = answer(query_x, ForwardContext(moments=moments, noise=noise))
            of_made = answer(outer, ForwardContext(noise=noise))
            loss = self.class_loss(outputs, query_y)
            loss = loss + self.weight * (taken_for_real(outputs) + taken_for_made(of_made))
            with torch.no_grad():
                real_gradient = torch.func.grad(
                    lambda x: taken_for_real(answer(x, ForwardContext(noise=noise)))
                )
                pull = real_gradient(outer)
            found = (of_made.logsumexp(1) < 0.0).to(loss.dtype).mean()
            return loss, (loss, outputs, found, taken_for_real(of_made), pull, moments)

        inner, outer = made.detach().split([self.inner_fakes, self.fakes], 1)
        rows = (*self.training_rows(batch, progress), inner, outer)
        grads, (losses, outputs, found, fooled, pull, moments) = self.resolved_engine().gradients(
            task, self.net, {**learner.optimizer.targets}, rows
        )
        generator_params = dict(self.generator.named_parameters())
        pulls = torch.autograd.grad(
            made[:, self.inner_fakes :], list(generator_params.values()), pull / batch.num_tasks
        )
        generator_grads = {
            f"generator.{name}": grad for name, grad in zip(generator_params, pulls, strict=True)
        }
        # Checked before either is updated: both take a step, or neither does.
        generator_grads = self.adversary.averaged(generator_grads, progress)
        self.adversary.check(generator_grads)
        learner.optimizer.step(grads, progress, learner.limited)
        self.adversary.move(generator_grads, progress)
        update_running_statistics(self.net, moments)
        score = task_metric(self.spec, outputs, batch.query_y)
        return {
            "loss": losses.mean(),
            self.spec.metric: score.mean(),
            "generator_loss": fooled.mean(),
            "fakes_found": found.mean(),
        }

    def class_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the classes of real rows with logits (R, W), as `classes` says."""
        if self.classes == "own":
            return self.learner.loss(outputs, targets)
        return nn.functional.cross_entropy(outputs, targets)

    def _term(self, made: Tensor) -> SupportTerm:
        """Return the inner loss's term that distinguishes the support from generated rows.

        Args:
            made: Rows generated for the support, (inner_fakes, C, H, W').
        """

        def term(outputs: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
            of_made = answer(made)
            return self.weight * (taken_for_real(outputs) + taken_for_made(of_made))

        return term

    def _term_at_evaluation(self, support_x: Tensor) -> SupportTerm:
        """Return the term of `_term` at evaluation, for the support (S, C, H, W') of a task.

        The rows are generated from the same latent numbers each time.
        """
        made = self._made(support_x[None], self._fixed_keys(1), self.inner_fakes)
        return self._term(made[0].detach())

    @property
    def generates(self) -> bool:
        return self.generator is not None

    def generated(self, support_x: Tensor, count: int) -> Tensor:
        with torch.no_grad():
            return self._made(support_x, self._fixed_keys(len(support_x)), count)

    def _fixed_keys(self, num_tasks: int) -> Tensor:
        """Return keys (T,), all equal, so that predictions do not depend on a task's position."""
        return seeding.task_keys(self.seed, "made anew", 0, 1, self.device).expand(num_tasks)

    def _made(self, support_x: Tensor, keys: Tensor, count: int) -> Tensor:
        """Return generated images for T tasks, (T, count, C, H, W')."""
        assert self.generator is not None
        latent = seeding.normal(keys, 0, (count, self.latent), dtype=self.dtype)
        made: Tensor = self.generator(support_x, latent)
        return made


def _suits(learner: Algorithm) -> bool:
    return isinstance(learner, AdversarialLearner)


_SLOPE = 0.2
"""Negative slope of the leaky ReLUs."""


class Generator(nn.Module):
    """A generator of images for a task, from its support and latent numbers (section 3.3).

    A dataset encoder embeds each support row with three convolutions and a fully connected layer,
    and takes the mean. A fully connected layer and two blocks that double the size turn this
    code and the latent numbers into an image. They use group norm, which does not mix tasks or
    rows. The paper does not specify these layers. A generated pixel lies between the smallest and
    the largest value in its channel of the task's support.

    Args:
        input_shape: Shape of an image, (C, H, W').
        latent: Latent numbers, Z.
        filters: Channels of the encoder and of the last hidden layer; the first has four times
            as many.
    """

    def __init__(self, input_shape: tuple[int, ...], latent: int, filters: int) -> None:
        super().__init__()
        channels, *sides = input_shape
        self.sides = sides
        self.start = [-(-side // 4) for side in sides]
        self.encoder = nn.Sequential()
        for inputs in (channels, filters, filters):
            conv = nn.Conv2d(inputs, filters, 3, stride=2, padding=1, bias=False)
            self.encoder.extend([conv, nn.LeakyReLU(_SLOPE)])
        places = math.prod(-(-side // 8) for side in sides)
        # Without biases and with a norm, codes are as large as the latent numbers and differ
        # between tasks from the start: the generator would ignore small codes.
        embed = nn.Linear(filters * places, filters, bias=False)
        self.encoder.extend([nn.Flatten(), embed, nn.LayerNorm(filters)])
        # Channels are halved where the sides double, which keeps the cost equal at each size.
        widths = [4 * filters, 2 * filters, filters]
        self.first = nn.Linear(filters + latent, widths[0] * self.start[0] * self.start[1])
        self.grow = nn.Sequential(nn.GroupNorm(_groups(widths[0]), widths[0]), nn.LeakyReLU(_SLOPE))
        for inputs, outputs in pairwise(widths):
            self.grow.extend([nn.Upsample(scale_factor=2), *_block(inputs, outputs)])
        self.grow.append(nn.Conv2d(filters, channels, 3, padding=1))

    def forward(self, support_x: Tensor, latent: Tensor) -> Tensor:
        """Return images (T, M, C, H, W').

        Args:
            support_x: Support images, (T, S, C, H, W').
            latent: Latent numbers, (T, M, Z).
        """
        tasks, made = latent.shape[:2]
        codes = self.encoder(support_x.flatten(0, 1)).unflatten(0, (tasks, -1)).mean(1)
        seeds = torch.cat([codes[:, None].expand(-1, made, -1), latent], 2).flatten(0, 1)
        maps = self.first(seeds).unflatten(1, (-1, *self.start))
        shares = self.grow(maps)[..., : self.sides[0], : self.sides[1]].sigmoid()
        low, high = support_x.amin((1, 3, 4)), support_x.amax((1, 3, 4))
        low, span = low[:, None, :, None, None], (high - low)[:, None, :, None, None]
        images: Tensor = low + span * shares.unflatten(0, (tasks, made))
        return images


def taken_for_real(outputs: Tensor) -> Tensor:
    """Return the mean of -log p(y <= W | x) over rows with logits (R, W); class W + 1 has 0."""
    return nn.functional.softplus(-outputs.logsumexp(1)).mean()


def taken_for_made(outputs: Tensor) -> Tensor:
    """Return the mean of -log p(W + 1 | x) over rows with logits (R, W); class W + 1 has 0."""
    return nn.functional.softplus(outputs.logsumexp(1)).mean()


def _block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
    return [conv, nn.GroupNorm(_groups(outputs), outputs), nn.LeakyReLU(_SLOPE)]


def _groups(filters: int) -> int:
    """Return the largest number of groups, up to eight, that divides the channels."""
    return max(count for count in range(1, 9) if filters % count == 0)
