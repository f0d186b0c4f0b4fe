"""Mixture of initializations, fitted by expectation-maximization over tasks (Jerfel et al. 2019).

There is no official code. Shapes: T tasks, S support rows, Q query rows, D outputs, K components.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import (
    Algorithm,
    LearnerSetup,
    forward,
    own_parameters,
    task_metric,
)
from metarun.algorithms.functional import (
    Loss,
    Params,
    add_prefix,
    check_inner_loop,
    is_first_order,
    sgd_adapt,
    sgd_path,
    strip_prefix,
)
from metarun.algorithms.outer_optimizer import update_running_statistics
from metarun.backbones.layers.context import ForwardContext
from metarun.core.checks import positive, within
from metarun.core.distributed import gather_rows
from metarun.core.types import Adapted, Metrics, Prediction, Progress, TaskBatch

Assignment = Literal["soft", "hard"]
Prior = Literal["uniform", "balanced", "learned", "crp"]

_LEAST_COUNT = 1e-6
"""Smallest number of tasks that an open component counts as having."""
_BALANCE = 0.02
"""Step size of the prior's logarithm in `prior=balanced`."""


class Mixture(Algorithm):
    """A mixture of K initializations; each task adapts all of them and weights them by their fit.

    The E-step adapts every initialization to a task's support by gradient steps. The support loss
    L_k after them, summed over the S rows, stands for minus a log-likelihood. Responsibilities
    are softmax_k(log pi_k - S L_k / temperature) (Jerfel et al. 2019, section 3.2). With
    `assign=hard` the greatest of them becomes 1. The M-step is a step of the outer optimizer on
    sum_k gamma_k L_k(query), in which the responsibilities gamma are constants. With one
    component the method is MAML.

    For squared errors, a temperature of 2 sigma^2 gives the likelihood of normal distributions
    with standard deviation sigma; for cross-entropy the likelihood has a temperature of 1. A
    temperature [start, end] falls by the same factor at each update, over the first `anneal` of
    training (deterministic annealing, Rose 1998). At first all components learn all tasks; they
    specialize as it falls. With a low temperature from the start, the assignment depends on
    chance, and a slightly better component wins all tasks.

    Priors over components:
    - `uniform`: pi_k = 1 / K.
    - `learned`: pi_k = (n_k + 1) / (N + K), where n_k of the N tasks so far are of component k.
    - `balanced`: at each update, log pi_k grows in proportion to 1 / K minus the component's
      share of the tasks (Wang et al. 2024 balance experts in this way). It suits components of
      equal probability and keeps each of them in use.
    - `crp`: a Chinese restaurant process (section 3.3), which starts with one component. The
      weight of a component is its number of tasks, and that of the next one `concentration`. The
      next component opens when it is the most likely one of any task, and keeps its share of the
      other tasks. At evaluation none opens. In the paper a new component starts from the prior
      that all share; here each has its own random initialization.

    The prediction is the mean over components, weighted by the responsibilities; classification
    averages probabilities. With `assign=hard` it is the prediction of one component.

    Args:
        components: Number of components K; with `prior=crp`, their largest number.
        inner_lr: Inner learning rate.
        inner_steps: Inner steps in training.
        second_order_from: Update from which inner gradients are differentiated; 0 always, None
            never (first order).
        assign: Assignment of tasks to components, `soft` or `hard`.
        temperature: Temperature of the responsibilities, in units of the loss; or [start, end].
        anneal: Share of training over which the temperature falls.
        prior: Prior over components: `uniform`, `balanced`, `learned` or `crp`.
        concentration: Weight of a new component with `prior=crp`.
        memory: Factor that multiplies the task counts of the prior at each update.

    Raises:
        ValueError: A number or a word is out of range.
    """

    net: nn.ModuleList
    counts: Tensor
    bias: Tensor
    temperature: Tensor
    grown: Tensor

    def __init__(
        self,
        setup: LearnerSetup,
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
    ) -> None:
        super().__init__(setup)
        check_inner_loop(inner_lr, inner_steps, second_order_from)
        within("algo", "[1, 1000]", components=components)
        start, end = (temperature,) * 2 if isinstance(temperature, int | float) else temperature
        positive("algo", temperature=start, anneal=anneal, concentration=concentration)
        positive("algo", temperature=end)
        within("algo", "[0, 1]", memory=memory)
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
        """Return log pi_k (K,) up to a constant.

        Args:
            opening: Whether the next component of `prior=crp` has a weight.
        """
        if self.prior == "uniform":
            return torch.zeros_like(self.counts)
        if self.prior == "balanced":
            return self.bias
        if self.prior == "learned":
            return (self.counts + 1.0).log()
        number = torch.arange(len(self.counts), device=self.device)
        # An open component keeps a positive weight, however long ago its last task was.
        weights = torch.where(number < self.grown, self.counts.clamp(min=_LEAST_COUNT), 0.0)
        if opening:
            # Before the first task only one component can be chosen.
            some = self.counts.sum() > 0
            weights = torch.where((number == self.grown) & some, self.concentration, weights)
        return weights.log()

    def responsibilities(self, fits: Tensor, rows: int, prior: Tensor, heat: Tensor) -> Tensor:
        """Return the responsibilities (…, K) of the components for tasks.

        Args:
            fits: (…, K) support losses after adaptation, each the mean over `rows` values.
            rows: Number of target values of the support.
            prior: Log prior as returned by `log_prior`.
            heat: Temperature.
        """
        scores = prior.to(fits) - rows * fits / heat.to(fits)
        if self.assign == "soft":
            return scores.softmax(-1)
        return nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(fits)

    def _beliefs(self, num_tasks: int, heat: Tensor, *, opening: bool) -> tuple[Tensor, Tensor]:
        """Return the log prior (T, K) and the temperature (T,), repeated for every task.

        Values that change between updates are inputs of the task function, so that its recorded
        operations can be replayed.
        """
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
            task, self.net, own_parameters(self.net), rows
        )
        self.optimizer.step({f"net.{name}": grad for name, grad in grads.items()}, progress)
        for number, seen in enumerate(moments):
            update_running_statistics(self.net[number], seen)
        shares = gather_rows(shares, progress.share)
        self._seat(shares)
        self.temperature.copy_(heat)
        score = task_metric(self.spec, outputs, batch.query_y)
        # Components with more than half of an even share of these tasks.
        used = (shares.mean(0) > 0.5 / len(self.counts)).to(losses.dtype).sum()
        return {"loss": losses.mean(), self.spec.metric: score.mean(), "num_components": used}

    def mixed(self, answers: Tensor, shares: Tensor) -> Tensor:
        """Return the mean prediction (Q, D) of predictions (K, Q, D) with weights (K,)."""
        shares = shares[:, None, None]
        if self.spec.kind == "regression":
            return (shares * answers).sum(0)
        return (answers.log_softmax(2) + shares.log()).logsumexp(0)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        """Adapt all components to T tasks; `responsibilities` are (T, K)."""
        steps = self.evaluation_steps(self.inner_steps)

        def task(nets: nn.ModuleList, params: Params, *rows: Tensor) -> Params:
            return self._along(nets, params, *rows, steps=steps, every=False)[-1]

        rows = (support_x, support_y, *self._beliefs_at_evaluation(len(support_x)))
        adapted: Adapted = self.map_tasks(task, *rows)
        return adapted

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        """Predict as in `Algorithm`; the responsibilities are also the embedding of the task."""
        outputs = self.map_adapted(self._outputs, adapted, query_x)
        shares = adapted["responsibilities"]
        return Prediction(outputs, embedding=shares, responsibilities=shares)

    def trace(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int) -> Tensor:
        def task(nets: nn.ModuleList, params: Params, *rows: Tensor) -> Tensor:
            visited = self._along(nets, params, *rows[1:], steps=steps, every=True)
            return torch.stack([self._outputs(nets, params, own, rows[0]) for own in visited])

        rows = (query_x, support_x, support_y, *self._beliefs_at_evaluation(len(query_x)))
        outputs: Tensor = self.map_tasks(task, *rows)
        return outputs.movedim(1, 0)

    def _beliefs_at_evaluation(self, num_tasks: int) -> tuple[Tensor, Tensor]:
        return self._beliefs(num_tasks, self.temperature, opening=False)

    def _outputs(self, nets: nn.ModuleList, params: Params, own: Params, query_x: Tensor) -> Tensor:
        """Return the predictions (Q, D) of one task's queries by its adapted components."""
        ctx = self.query_context()
        tensors = params | own
        answers = [
            forward(net, strip_prefix(f"{number}.", tensors), query_x, ctx)
            for number, net in enumerate(nets)
        ]
        return self.mixed(torch.stack(answers), own["responsibilities"])

    def _along(
        self,
        nets: nn.ModuleList,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        prior: Tensor,
        heat: Tensor,
        *,
        steps: int,
        every: bool,
    ) -> list[Params]:
        """Return the components of one task and their responsibilities (K,) after inner steps.

        There is one entry after the last step, or one for each of 0 … `steps` if `every`.
        The weights of component k, and with `bn=support` its statistics, have the prefix `k.`.
        """
        ctx = ForwardContext(running=self.bn == "running")
        fits: list[list[Tensor]] = []
        visited: list[Params] = [{} for _ in range(steps + 1 if every else 1)]
        for number, net in enumerate(nets):
            theta = strip_prefix(f"{number}.", params)
            loss = self._support_loss(net, support_x, support_y, ctx)
            path = [theta, *sgd_path(loss, theta, lr=self.inner_lr, steps=steps, first_order=True)]
            path = path if every else path[-1:]
            fits.append([loss(weights) for weights in path])
            for own, weights in zip(visited, path, strict=True):
                statistics = self._statistics(net, weights, support_x)
                own |= add_prefix(f"{number}.", {**weights, **statistics})
        by_step = torch.stack([torch.stack(part) for part in fits], 1)
        shares = self.responsibilities(by_step, support_y.numel(), prior, heat)
        return [{**own, "responsibilities": s} for own, s in zip(visited, shares, strict=True)]

    def _statistics(self, net: nn.Module, weights: Params, support_x: Tensor) -> Params:
        if self.bn_statistics != "support":
            return {}
        return self.support_pass(net, lambda ctx: forward(net, weights, support_x, ctx))[1]

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
        """Count the tasks of an update, and open the next component if it is the best of one.

        Args:
            shares: (T, K) responsibilities.
        """
        self.counts.mul_(self.memory).add_(shares.sum(0))
        self.bias.add_(_BALANCE * (1.0 / len(self.bias) - shares.mean(0)))
        if self.prior == "crp":
            won = shares.argmax(1) == self.grown
            self.grown.add_(won.any().to(self.grown.dtype)).clamp_(max=len(self.counts))
