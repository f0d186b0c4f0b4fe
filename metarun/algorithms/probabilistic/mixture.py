"""Mixtures of initializations, fitted by expectation-maximization over tasks (Jerfel et al. 2019).

There is no official code. Shapes: T tasks, S support rows, Q query rows, D outputs, K components.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, forward, own_parameters, positive, task_metric
from metarun.algorithms.functional import (
    Loss,
    Params,
    check_inner_loop,
    is_first_order,
    sgd_adapt,
    sgd_path,
    strip_prefix,
)
from metarun.algorithms.outer_optimizer import check_positive, update_running_statistics
from metarun.backbones.layers.context import ForwardContext
from metarun.core.distributed import gather_rows
from metarun.core.types import Metrics, Prediction, Progress, TaskBatch

Assignment = Literal["soft", "hard"]
Prior = Literal["uniform", "balanced", "learned", "crp"]

_LEAST_COUNT = 1e-6
"""Of tasks of a component that has opened."""
_BALANCE = 0.02
"""How fast `prior=balanced` follows what shares lack."""


class Mixture(Algorithm):
    """K initializations, of which each task is learned from the one that fits it.

    The E-step adapts every initialization to a task's support by gradient steps and takes the
    support loss L_k after them for minus a log-likelihood: with the sum over rows S L_k, the
    responsibilities are softmax_k(log pi_k - S L_k / temperature) (Jerfel et al. 2019, section
    3.2). `assign=hard` gives all to the greatest. The M-step is a step of the outer optimizer on
    sum_k gamma_k L_k(query), in which the responsibilities gamma are constants. With one
    component it is MAML.

    For a squared error a temperature of 2 sigma^2 makes the likelihood that of normals with a
    deviation of sigma; for a cross-entropy it is 1. A temperature [start, end] falls from one to
    the other, by the same factor at each update, over the first `anneal` of training
    (deterministic annealing, Rose 1998): at first all components learn all tasks, and part as it
    falls. What is cold from the beginning parts tasks by chance, and a component that is a little
    better wins them all.

    `prior=uniform` has pi_k = 1 / K, and `learned` (n_k + 1) / (N + K) with n_k of the N tasks so
    far. `balanced` has log pi_k grow at each update by a little of what the component's share of
    the tasks lacks to 1 / K (as experts are kept busy by Wang et al. 2024): for components that
    are as likely, of which none can starve. `crp` is a Chinese restaurant (section 3.3): there is
    one component at first, each task of training is of a component with the number of its tasks
    as weight, or of the next one with `concentration`; that one opens when it is the likeliest of
    any task, and keeps what part of other tasks it has had. At evaluation none opens. The paper
    starts a new component from the shared prior over all; here each has a start of its own, drawn
    as any network's.

    The answer mixes those of the components by the responsibilities (their probabilities in a
    classification); with `assign=hard` it is that of one.

    Args:
        components: K; the most there can be, with `prior=crp`.
        inner_lr: Inner learning rate.
        inner_steps: Inner steps in training.
        second_order_from: Update from which inner gradients are differentiated; 0 always, None
            never (first order).
        assign: How tasks are given to components.
        temperature: Of the responsibilities, in the unit of the loss; or [start, end].
        anneal: Share of training over which it falls.
        prior: pi_k.
        concentration: Of `prior=crp`.
        memory: What remains at each update of the numbers of tasks that pi_k is made of.
        **common: Those of `Algorithm`.

    Raises:
        ValueError: A number or a word is out of range.
    """

    replays: ClassVar[bool] = True

    net: nn.ModuleList
    counts: Tensor
    bias: Tensor
    temperature: Tensor
    grown: Tensor

    def __init__(
        self,
        *,
        components: int = 5,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        second_order_from: int | None = 0,
        assign: Assignment = "soft",
        temperature: float | tuple[float, float] = 1.0,
        anneal: float = 0.9,
        prior: Prior = "uniform",
        concentration: float = 1.0,
        memory: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_inner_loop(inner_lr, inner_steps, second_order_from)
        positive("components", components)
        start, end = (temperature,) * 2 if isinstance(temperature, int | float) else temperature
        for name, value in (
            ("temperature", start),
            ("temperature", end),
            ("anneal", anneal),
            ("concentration", concentration),
        ):
            check_positive(f"algo.{name}", value)
        if not 0.0 <= memory <= 1.0:
            raise ValueError(f"algo.memory={memory}: expected 0 to 1")
        if assign not in ("soft", "hard"):
            raise ValueError(f"algo.assign={assign}: expected soft or hard")
        if prior not in ("uniform", "balanced", "learned", "crp"):
            raise ValueError(f"algo.prior={prior}: expected uniform, balanced, learned or crp")
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.second_order_from = second_order_from
        self.assign: Assignment = assign
        self.cooling = start, end, anneal
        self.prior: Prior = prior
        self.concentration = concentration
        self.memory = memory
        self.net = nn.ModuleList(
            self.build_network(self.spec.output_dim) for _ in range(components)
        )
        self.register_buffer("counts", torch.zeros(components))
        self.register_buffer("bias", torch.zeros(components))
        self.register_buffer("temperature", torch.tensor(float(start)))
        self.register_buffer("grown", torch.tensor(1 if prior == "crp" else components))
        self.optimizer = self.build_optimizer()

    def log_prior(self, *, opening: bool) -> Tensor:
        """(K,) log pi_k up to a constant, with or without the component that may open next."""
        if self.prior == "uniform":
            return torch.zeros_like(self.counts)
        if self.prior == "balanced":
            return self.bias
        if self.prior == "learned":
            return (self.counts + 1.0).log()
        number = torch.arange(len(self.counts), device=self.device)
        # What has opened stays possible, however long ago its tasks were.
        weights = torch.where(number < self.grown, self.counts.clamp(min=_LEAST_COUNT), 0.0)
        if opening:
            # The first task of all finds one component, and no other to choose.
            some = self.counts.sum() > 0
            weights = torch.where((number == self.grown) & some, self.concentration, weights)
        return weights.log()

    def responsibilities(self, fits: Tensor, rows: int, prior: Tensor, heat: Tensor) -> Tensor:
        """(…, K) of tasks with support losses (…, K).

        Args:
            fits: Means over so many numbers.
            rows: How many.
            prior: As of `log_prior`.
            heat: The temperature.
        """
        scores = prior.to(fits) - rows * fits / heat.to(fits)
        if self.assign == "soft":
            return scores.softmax(-1)
        return nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(fits)

    def _beliefs(self, num_tasks: int, heat: Tensor, *, opening: bool) -> tuple[Tensor, Tensor]:
        """Log prior (T, K) and temperature (T,), as rows of every task: what changes between
        updates is told to a task function, so that it can be replayed."""
        prior = self.log_prior(opening=opening)
        return prior.expand(num_tasks, -1), heat.expand(num_tasks)

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        first_order = is_first_order(self.second_order_from, progress)
        heat = self._heat(progress)

        def task(nets: nn.ModuleList, params: Params, *rows: Tensor) -> tuple[Tensor, Any]:
            support_x, support_y, query_x, query_y, noise, prior, warmth = rows
            inner = ForwardContext(noise=noise, double_backward=not first_order)
            fits, losses, answers, moments = [], [], [], []
            for number, net in enumerate(nets):
                seen: dict[str, tuple[Tensor, Tensor]] = {}
                loss = self._support_loss(net, support_x, support_y, inner)
                weights = sgd_adapt(
                    loss,
                    strip_prefix(f"{number}.", params),
                    lr=self.inner_lr,
                    steps=self.inner_steps,
                    first_order=first_order,
                )
                fits.append(loss(weights).detach())
                answers.append(
                    forward(net, weights, query_x, ForwardContext(moments=seen, noise=noise))
                )
                losses.append(self.loss(answers[-1], query_y))
                moments.append(seen)
            shares = self.responsibilities(torch.stack(fits), support_y.numel(), prior, warmth)
            total = (shares * torch.stack(losses)).sum()
            mixed = self.mixed(torch.stack(answers).detach(), shares)
            return total, (total, mixed, shares, moments)

        rows = (
            *self.training_rows(batch, progress),
            *self._beliefs(batch.num_tasks, heat, opening=True),
        )
        grads, (losses, outputs, shares, moments) = self.resolved_engine().gradients(
            task, self.net, own_parameters(self.net), rows, key=self.replay_key(first_order)
        )
        self.optimizer.step({f"net.{name}": grad for name, grad in grads.items()}, progress)
        for number, seen in enumerate(moments):
            update_running_statistics(self.net[number], seen)
        shares = gather_rows(shares, progress.share)
        self._seat(shares)
        self.temperature.copy_(heat)
        score = task_metric(self.spec, outputs, batch.query_y)
        # Those that more than half of an even share of these tasks is of.
        used = (shares.mean(0) > 0.5 / len(self.counts)).to(losses.dtype).sum()
        return {"loss": losses.mean(), self.spec.metric: score.mean(), "num_components": used}

    def mixed(self, answers: Tensor, shares: Tensor) -> Tensor:
        """(Q, D) answer of a mixture of answers (K, Q, D) with shares (K,)."""
        shares = shares[:, None, None]
        if self.spec.kind == "regression":
            return (shares * answers).sum(0)
        return (answers.log_softmax(2) + shares.log()).logsumexp(0)

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        """As in `Algorithm`; the responsibilities are the embedding of the task."""
        steps = self.evaluation_steps(self.inner_steps)

        def task(nets: nn.ModuleList, params: Params, *rows: Tensor) -> tuple[Tensor, Tensor]:
            return self._along(nets, params, *rows, steps=steps, every=False)[-1]

        beliefs = self._beliefs(len(query_x), self.temperature, opening=False)
        outputs, shares = self.resolved_engine().map(
            task,
            self.net,
            own_parameters(self.net),
            (support_x, support_y, query_x, *beliefs),
            key=self.replay_key(steps),
        )
        return Prediction(outputs, embedding=shares, responsibilities=shares)

    def trace(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int) -> Tensor:
        def task(nets: nn.ModuleList, params: Params, *rows: Tensor) -> Tensor:
            visited = self._along(nets, params, *rows, steps=steps, every=True)
            return torch.stack([outputs for outputs, _ in visited])

        beliefs = self._beliefs(len(query_x), self.temperature, opening=False)
        rows = (support_x, support_y, query_x, *beliefs)
        return self.map_tasks(task, *rows, key=self.replay_key(steps)).movedim(1, 0)

    def _along(
        self,
        nets: nn.ModuleList,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        prior: Tensor,
        heat: Tensor,
        *,
        steps: int,
        every: bool,
    ) -> list[tuple[Tensor, Tensor]]:
        """Answers (Q, D) and responsibilities (K,) after all inner steps, or after every one."""
        ctx = ForwardContext(running=self.bn == "running")
        fits, answers = [], []
        for number, net in enumerate(nets):
            theta = strip_prefix(f"{number}.", params)
            loss = self._support_loss(net, support_x, support_y, ctx)
            path = [theta, *sgd_path(loss, theta, lr=self.inner_lr, steps=steps, first_order=True)]
            visited = path if every else path[-1:]
            fits.append(torch.stack([loss(weights) for weights in visited]))
            answers.append(
                torch.stack([self.answer(net, weights, support_x, query_x) for weights in visited])
            )
        shares = self.responsibilities(torch.stack(fits, 1), support_y.numel(), prior, heat)
        by_step = torch.stack(answers, 1)
        return [(self.mixed(a, s), s) for a, s in zip(by_step, shares, strict=True)]

    def _support_loss(self, net: nn.Module, x: Tensor, y: Tensor, ctx: ForwardContext) -> Loss:
        def loss(weights: Params) -> Tensor:
            return self.loss(forward(net, weights, x, ctx), y)

        return loss

    def _heat(self, progress: Progress) -> Tensor:
        """The temperature of an update."""
        start, end, anneal = self.cooling
        heat = start * (end / start) ** min(1.0, progress.fraction / anneal)
        return torch.full_like(self.temperature, heat)

    def _seat(self, shares: Tensor) -> None:
        """Count the tasks (T, K) of an update; open the next component if it won one."""
        self.counts.mul_(self.memory).add_(shares.sum(0))
        self.bias.add_(_BALANCE * (1.0 / len(self.bias) - shares.mean(0)))
        if self.prior == "crp":
            won = shares.argmax(1) == self.grown
            self.grown.add_(won.any().to(self.grown.dtype)).clamp_(max=len(self.counts))
