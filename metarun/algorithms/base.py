"""What every algorithm is: it learns from a batch of tasks, and answers a new one.

Shapes: T tasks, S support rows, Q query rows, W ways, D outputs.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.backbones.layers.context import BATCH_NORM_MODES, BatchNormMode, ForwardContext
from metarun.backbones.layers.dropout import makes_noise
from metarun.backbones.layers.normalization import has_batch_norm
from metarun.core import seeding
from metarun.core.types import Metrics, Prediction, Progress, TaskBatch, TaskSpec
from metarun.execution.engine import Engine, TaskFunction

Backbone = Callable[..., nn.Module]
"""Makes a network from `input_shape` and `output_dim` (None: features, no head)."""

Optim = Callable[..., OuterOptimizer]
"""Makes an outer optimizer from (name, parameter) pairs."""


class Algorithm(nn.Module, ABC):
    """A meta-learner: it owns its modules and its outer optimizer.

    A subclass adds its hyperparameters as keywords, hands the rest to `super().__init__`, sets
    `self.net` by `build_network` and its optimizer, and writes `update` and `predict`.

    Args:
        spec: What the tasks ask for.
        backbone: Makes the network.
        optim: Makes the outer optimizer.
        engine: How tasks run.
        bn: Where batch norm takes its statistics from at evaluation: `transductive` (the query
            rows together), `support`, or `running` (gathered in training).
        eval_inner_steps: Adaptation steps at evaluation; None takes the training's.
        seed: Seed of the algorithm's own draws.

    Raises:
        ValueError: The data are not of a kind that the algorithm can learn.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification", "regression")
    """Kinds of task that it can learn."""
    accepts_any_way: bool = False
    """Whether a task may have another number of ways than it was trained for."""
    label_equivariant: bool = False
    """Whether permuting the labels of a task permutes the answers."""
    learns_online: ClassVar[bool] = False
    """Whether its tasks are trajectories of a stream, which it is judged on while it learns."""
    meta_trains: ClassVar[bool] = True
    """Whether there is anything to learn from training tasks."""
    order_free: bool = True
    """Whether the order of support rows is without meaning."""
    least_shot: ClassVar[int] = 1
    """Fewest support rows of a class, or of a regression."""
    replays: ClassVar[bool] = False
    """Whether its task functions do the same operators each time for the same `replay_key`. Said by
    each class for itself: a subclass may compute something else."""
    package: ClassVar[str | None] = None
    """A package beyond the required ones without which it cannot run."""

    net: nn.Module
    _place: Tensor

    def __init__(
        self,
        *,
        spec: TaskSpec,
        backbone: Backbone,
        optim: Optim,
        engine: Engine,
        bn: BatchNormMode = "transductive",
        eval_inner_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if spec.kind not in self.kinds:
            raise ValueError(
                f"{name} learns {' and '.join(self.kinds)}, and the data ask for {spec.kind}: "
                "choose another algo (`metarun list`)"
            )
        if self.learns_online and spec.streams is None:
            raise ValueError(
                f"{name} lives along a stream, and the data are none: use data=stream_…"
            )
        if spec.streams is not None and not self.learns_online:
            raise ValueError(
                f"the data are a stream, and {name} learns tasks one by one: use an algo for "
                "streams, such as online or oml (`metarun list`)"
            )
        if spec.streams is None and not self.accepts_any_way and spec.train_way != spec.output_dim:
            raise ValueError(
                f"train.way={spec.train_way} differs from way={spec.output_dim}, but {name} has "
                "a head of fixed width: make them equal"
            )
        if bn not in BATCH_NORM_MODES:
            raise ValueError(f"bn={bn}: expected one of {', '.join(BATCH_NORM_MODES)}")
        if eval_inner_steps is not None and eval_inner_steps < 0:
            raise ValueError(f"eval.inner_steps={eval_inner_steps}: expected 0 or more")
        self.spec = spec
        self.engine = engine
        self.bn: BatchNormMode = bn
        self.eval_inner_steps = eval_inner_steps
        self.seed = seed
        self._backbone = backbone
        self._optim = optim
        # Moves with the module, so that one without parameters knows its device and precision.
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._place.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that it computes in."""
        return self._place.dtype

    @abstractmethod
    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        """Make one meta-update and return its metrics, `loss` and the task metric.

        Where processes share the tasks, the batch has this one's (`progress.share`); metrics are
        means over it. See `needs_whole_batch`.

        Raises:
            NonFiniteError: The loss or a gradient is not finite; nothing has changed.
        """

    @abstractmethod
    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        """Adapt to T tasks, then answer their queries; changes no state, keeps no graph.

        Args:
            support_x: (T, S, *input_shape).
            support_y: (T, S) labels, or (T, S, D) values.
            query_x: (T, Q, *input_shape).
        """

    def trace(
        self,
        support_x: Tensor,  # noqa: ARG002
        support_y: Tensor,  # noqa: ARG002
        query_x: Tensor,  # noqa: ARG002
        steps: int,  # noqa: ARG002
    ) -> Tensor | None:
        """Answers after 0 … `steps` inner steps, (steps + 1, T, Q, D); None if there are none."""
        return None

    @property
    def generates(self) -> bool:
        """Whether it makes rows for a task."""
        return False

    def generated(self, support_x: Tensor, count: int) -> Tensor:
        """Rows (T, count, *input_shape) made for T tasks, where it makes any."""
        raise NotImplementedError

    @property
    def options(self) -> Sequence[Mapping[str, float]]:
        """Settings by name that meta-val is to choose among; none where there is no choice."""
        return []

    def choose(self, option: Mapping[str, float]) -> None:
        """Take one of `options` from now on."""

    def match_shapes(self, state: Mapping[str, Any]) -> None:
        """Take the shapes of a state to be loaded where the data that it learned on set them.

        A meta-test may be on other data, with another number of training classes.

        Args:
            state: A `state_dict`, which may be of another algorithm or of other options.
        """

    @property
    def needs_whole_batch(self) -> str | None:
        """Why processes cannot share the tasks of an update; None where they can, exactly.

        They can where an update is a mean over its tasks, each by itself: gradients that go to an
        `OuterOptimizer`, moments that go to `update_running`, draws that are keyed by
        `progress.first_task`. What else looks at all tasks of a batch asks for those of the other
        processes by `processes.gathered` or `processes.mean`.
        """
        return None

    @property
    def bn_statistics(self) -> str:
        """The batch-norm setting in force, `none` where the network has no batch norm."""
        return self.bn if has_batch_norm(self.net) else "none"

    @property
    def transductive(self) -> bool:
        """Whether an answer depends on the other queries of its task."""
        return self.bn_statistics == "transductive"

    def evaluation_steps(self, trained: int) -> int:
        """Inner steps at evaluation: `eval.inner_steps`, or as many as in training."""
        return trained if self.eval_inner_steps is None else self.eval_inner_steps

    def build_network(self, output_dim: int | None, *, context_dim: int = 0) -> nn.Module:
        """Make the network; None leaves out the head.

        Args:
            output_dim: Outputs of the head.
            context_dim: Size of the `ForwardContext.context` that it reads.

        Raises:
            ValueError: It is to read a context, and this backbone reads none.
        """
        shape = {"input_shape": self.spec.input_shape, "output_dim": output_dim}
        if not context_dim:
            return self._backbone(**shape)
        if not _takes(self._backbone, "context_dim"):
            made = getattr(self._backbone, "func", self._backbone)
            raise ValueError(
                f"{type(self).__name__} adapts a context, which {made.__name__} does not read: "
                "use backbone=mlp or backbone=conv4, or let yours take the keyword context_dim"
            )
        return self._backbone(**shape, context_dim=context_dim)

    def build_maps(self) -> nn.Module:
        """Make a network that ends at its feature maps, (N, C, H, W).

        Raises:
            ValueError: The backbone has none to give.
        """
        if "maps" not in inspect.signature(self._backbone).parameters:
            raise ValueError(
                f"{type(self).__name__} compares feature maps, which this backbone does not "
                "give: use backbone=conv4"
            )
        return self._backbone(input_shape=self.spec.input_shape, output_dim=None, maps=True)

    def build_optimizer(self) -> OuterOptimizer:
        """Make the outer optimizer of every parameter registered so far."""
        return self._optim(list(self.named_parameters()))

    def resolved_engine(self) -> Engine:
        """The engine with everything settled, for the network and where it is."""
        return self.engine.resolved(self.net, self.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of one task: cross-entropy of (N, W) logits, or squared error of (N, D)."""
        if self.spec.kind == "classification":
            return nn.functional.cross_entropy(outputs, targets)
        # Not mse_loss, whose second derivative is decomposed in Python.
        return (outputs - targets).square().mean()

    def noise(self, progress: Progress, num_tasks: int) -> Tensor:
        """(T,) keys of the random masks of one update; zeros where the network makes none."""
        if not makes_noise(self.net):
            return torch.zeros(num_tasks, dtype=torch.int64, device=self.device)
        first = progress.first_task(num_tasks)
        return seeding.task_keys(self.seed, "noise", first, num_tasks, self.device)

    def training_rows(self, batch: TaskBatch, progress: Progress) -> tuple[Tensor, ...]:
        """What the engine hands a task in training: support, query, and the key of its noise."""
        return (
            batch.support_x,
            batch.support_y,
            batch.query_x,
            batch.query_y,
            self.noise(progress, batch.num_tasks),
        )

    def replay_key(self, *values: Hashable) -> Hashable:
        """The `key` of a task function for the engine; None where the class does not replay.

        Args:
            values: What the function reads beside its arguments and may change from one call to
                the next: numbers of steps, whether inner gradients are constants.
        """
        return values if vars(type(self)).get("replays", False) else None

    def map_tasks(self, task: TaskFunction, *rows: Tensor, key: Hashable = None) -> Tensor:
        """Values of `task(net, params, *rows of one task)`, stacked over tasks, without a graph.

        Args:
            task, rows: As in `Engine.map`.
            key: As there.
        """
        params = own_parameters(self.net)
        outputs: Tensor = self.resolved_engine().map(task, self.net, params, rows, key=key)
        return outputs

    def answer(
        self,
        net: nn.Module,
        params: dict[str, Tensor],
        support_x: Tensor,
        query_x: Tensor,
        context: Tensor | None = None,
    ) -> Tensor:
        """Answers of one task at evaluation, with batch norm as `bn` says.

        Args:
            net: The network, or its replica.
            params: Its parameters by name.
            support_x: (S, *input_shape), which `bn=support` takes its statistics from.
            query_x: (Q, *input_shape).
            context: Of the task, where the network reads one.
        """
        if self.bn == "support" and has_batch_norm(net):
            rows = torch.cat([support_x, query_x])
            ctx = ForwardContext(rows=support_x.shape[0], context=context)
            return forward(net, params, rows, ctx)[support_x.shape[0] :]
        ctx = ForwardContext(running=self.bn == "running", context=context)
        return forward(net, params, query_x, ctx)


def _takes(make: Backbone, keyword: str) -> bool:
    parameters = inspect.signature(make).parameters.values()
    return any(p.name == keyword or p.kind is p.VAR_KEYWORD for p in parameters)


def positive(name: str, value: int) -> None:
    """Refuse a number of an algorithm's below one.

    Raises:
        ValueError: It is.
    """
    if value < 1:
        raise ValueError(f"algo.{name}={value}: expected 1 or more")


def own_parameters(net: nn.Module) -> dict[str, Tensor]:
    """A network's parameters by name, as the engine takes them."""
    return {name: param for name, param in net.named_parameters()}  # noqa: C416


def forward(net: nn.Module, params: dict[str, Tensor], x: Tensor, ctx: ForwardContext) -> Tensor:
    """Run a network with parameters that are not its own."""
    outputs: Tensor = torch.func.functional_call(net, params, (x, ctx))
    return outputs


def task_metric(spec: TaskSpec, outputs: Tensor, targets: Tensor) -> Tensor:
    """The reported figure of each task.

    Args:
        spec: What the tasks ask for.
        outputs: (…, Q, W) logits or (…, Q, D) values.
        targets: (…, Q) labels or (…, Q, D) values.

    Returns:
        (…): accuracy as a fraction, or the mean squared error.
    """
    if spec.kind == "classification":
        return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(-1)
    return (outputs - targets).square().mean((-2, -1))
