"""The interface of every algorithm: update on a batch of tasks, predict on new tasks.

Shapes: T tasks, S support rows, Q query rows, W ways, D outputs.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.backbones.layers.context import BATCH_NORM_MODES, BatchNormMode, ForwardContext
from metarun.backbones.layers.dropout import makes_noise
from metarun.backbones.layers.normalization import has_batch_norm
from metarun.backbones.network import Maps
from metarun.core import seeding
from metarun.core.types import Metrics, Prediction, Progress, TaskBatch, TaskSpec
from metarun.execution.engine import Engine, TaskFunction

Backbone = Callable[..., nn.Module]
"""Factory that maps `input_shape` and `output_dim` (None: features, no head) to a network."""

Optim = Callable[..., OuterOptimizer]
"""Factory that maps (name, parameter) pairs to an outer optimizer."""


class Algorithm(nn.Module, ABC):
    """A meta-learner, which owns its modules and its outer optimizer.

    A subclass adds its hyperparameters as keyword arguments and passes the others to
    `super().__init__`. It builds `self.net` with `build_network` and its optimizer with
    `build_optimizer`, and implements `update` and `predict`.

    Args:
        spec: Kind, shapes and sizes of the tasks.
        backbone: Factory of the network.
        optim: Factory of the outer optimizer.
        engine: Engine that maps functions of one task over a batch of tasks.
        bn: Source of the batch statistics at evaluation: `transductive` (all query rows of the
            task), `support`, or `running` (averages collected in training).
        eval_inner_steps: Adaptation steps at evaluation; None takes as many as in training.
        seed: Seed of the algorithm's random draws.

    Raises:
        ValueError: The algorithm cannot learn tasks of this kind, or a setting is out of range.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification", "regression")
    """Kinds of task that the algorithm can learn."""
    accepts_any_way: bool = False
    """Whether an evaluation task may have a different number of ways than a training task."""
    label_equivariant: bool = False
    """Whether permuting the labels of a task permutes the predictions in the same way."""
    learns_online: ClassVar[bool] = False
    """Whether the tasks are streams, on which the algorithm is evaluated while it learns."""
    meta_trains: ClassVar[bool] = True
    """Whether the algorithm learns anything from training tasks."""
    order_free: bool = True
    """Whether predictions are independent of the order of the support rows."""
    least_shot: ClassVar[int] = 1
    """Smallest number of support rows per class, or per regression task."""
    package: ClassVar[str | None] = None
    """Optional package that the algorithm requires; None where it requires none."""

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
                f"{name} learns {' and '.join(self.kinds)}, but the data set has {spec.kind} "
                "tasks: choose another algo=… or data=… (`metarun list algo data`)"
            )
        if self.learns_online and spec.streams is None:
            raise ValueError(
                f"{name} learns from streams, but the data set is not a stream: use data=stream_…"
            )
        if spec.streams is not None and not self.learns_online:
            raise ValueError(
                f"the data set is a stream, but {name} learns separate tasks: use an algo for "
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
        # Moves with the module, so that an algorithm without parameters has a device and a dtype.
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device on which the algorithm computes."""
        return self._place.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type in which the algorithm computes."""
        return self._place.dtype

    @abstractmethod
    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        """Perform one meta-update and return its metrics: `loss` and the task metric.

        With several processes, the batch holds the tasks of this process (`progress.share`), and
        the metrics are means over these tasks. See `needs_whole_batch`.

        Args:
            batch: T training tasks.
            progress: Number of updates done, and of all updates.

        Raises:
            NonFiniteError: The loss or a gradient is not finite; no state has changed.
        """

    @abstractmethod
    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        """Adapt to T tasks and predict their query rows, without changing any state.

        The result carries no graph.

        Args:
            support_x: Support inputs, (T, S, *input_shape).
            support_y: Support targets, (T, S) labels or (T, S, D) values.
            query_x: Query inputs, (T, Q, *input_shape).
        """

    def trace(
        self,
        support_x: Tensor,  # noqa: ARG002
        support_y: Tensor,  # noqa: ARG002
        query_x: Tensor,  # noqa: ARG002
        steps: int,  # noqa: ARG002
    ) -> Tensor | None:
        """Return the predictions after 0 … `steps` inner steps, (steps + 1, T, Q, D).

        The default is None, for algorithms without inner steps.
        """
        return None

    @property
    def generates(self) -> bool:
        """Whether the algorithm generates rows for a task."""
        return False

    def generated(self, support_x: Tensor, count: int) -> Tensor:
        """Return rows generated for T tasks, (T, count, *input_shape), if `generates` is true."""
        raise NotImplementedError

    @property
    def options(self) -> Sequence[Mapping[str, float]]:
        """Candidate settings by name, from which meta-validation chooses; may be empty."""
        return []

    def choose(self, option: Mapping[str, float]) -> None:
        """Use one of `options` from now on."""

    def match_shapes(self, state: Mapping[str, Any]) -> None:
        """Resize parameters whose shapes depend on the training data to those of a state.

        This precedes loading the state. A meta-test may use another data set, with another
        number of training classes.

        Args:
            state: A `state_dict`, which may come from another algorithm or other options.
        """

    @property
    def needs_whole_batch(self) -> str | None:
        """Reason why processes cannot share the tasks of an update; None where they can.

        Sharing is exact where an update is a mean over independent tasks. Then gradients go to an
        `OuterOptimizer` and moments to `update_running_statistics`, and random draws have keys
        from `progress.first_task`. Code that needs all tasks of a batch gets those of the other
        processes from `distributed.gather_rows` or `distributed.mean`.
        """
        return None

    @property
    def bn_statistics(self) -> str:
        """Batch-norm setting in effect; `none` where the network has no batch norm."""
        return self.bn if has_batch_norm(self.net) else "none"

    @property
    def transductive(self) -> bool:
        """Whether a prediction depends on the other query rows of its task."""
        return self.bn_statistics == "transductive"

    def evaluation_steps(self, trained: int) -> int:
        """Return the inner steps at evaluation: `eval.inner_steps`, or as many as in training."""
        return trained if self.eval_inner_steps is None else self.eval_inner_steps

    def build_network(self, output_dim: int | None, *, context_dim: int = 0) -> nn.Module:
        """Build the network.

        Args:
            output_dim: Number of outputs of the head; None leaves out the head.
            context_dim: Size of the vector `ForwardContext.context` that the network reads.

        Raises:
            ValueError: A context is required, and this backbone does not read one.
        """
        shape = {"input_shape": self.spec.input_shape, "output_dim": output_dim}
        if not context_dim:
            return self._backbone(**shape)
        if not _takes(self._backbone, "context_dim"):
            made = getattr(self._backbone, "func", self._backbone)
            raise ValueError(
                f"{type(self).__name__} adapts a context, which {made.__name__} does not read: "
                "use backbone=mlp or conv4, or add the keyword context_dim to your backbone"
            )
        return self._backbone(**shape, context_dim=context_dim)

    def build_maps(self, maps: Maps) -> nn.Module:
        """Build a network whose outputs are feature maps, (N, C, H, W).

        Args:
            maps: Kind of the maps; see `Conv4`.

        Raises:
            ValueError: The backbone does not provide feature maps.
        """
        if "maps" not in inspect.signature(self._backbone).parameters:
            raise ValueError(
                f"{type(self).__name__} compares feature maps, which this backbone does not "
                "provide: use backbone=conv4"
            )
        return self._backbone(input_shape=self.spec.input_shape, output_dim=None, maps=maps)

    def build_optimizer(self) -> OuterOptimizer:
        """Build the outer optimizer of all parameters registered so far."""
        return self._optim(list(self.named_parameters()))

    def resolved_engine(self) -> Engine:
        """Return the engine with its open settings resolved for the network and its device."""
        return self.engine.resolved(self.net, self.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of one task.

        It is the cross-entropy of (N, W) logits, or the mean squared error of (N, D) values.
        """
        if self.spec.kind == "classification":
            return nn.functional.cross_entropy(outputs, targets)
        # Not mse_loss: its second derivative is decomposed in Python.
        return (outputs - targets).square().mean()

    def noise(self, progress: Progress, num_tasks: int) -> Tensor:
        """Return the keys (T,) of an update's random masks; zeros for a network without masks."""
        if not makes_noise(self.net):
            return torch.zeros(num_tasks, dtype=torch.int64, device=self.device)
        first = progress.first_task(num_tasks)
        return seeding.task_keys(self.seed, "noise", first, num_tasks, self.device)

    def training_rows(self, batch: TaskBatch, progress: Progress) -> tuple[Tensor, ...]:
        """Return the rows that the engine passes to a training task.

        They are the support and query rows, and the key of the task's random masks.
        """
        return (
            batch.support_x,
            batch.support_y,
            batch.query_x,
            batch.query_y,
            self.noise(progress, batch.num_tasks),
        )

    def map_tasks(self, task: TaskFunction, *rows: Tensor) -> Tensor:
        """Return `task(net, params, *rows of one task)`, stacked over tasks, without a graph.

        Args:
            task: Function of one task, as in `Engine.map`.
            rows: Tensors with a leading dimension of T.
        """
        params = own_parameters(self.net)
        outputs: Tensor = self.resolved_engine().map(task, self.net, params, rows)
        return outputs

    def answer(
        self,
        net: nn.Module,
        params: dict[str, Tensor],
        support_x: Tensor,
        query_x: Tensor,
        context: Tensor | None = None,
    ) -> Tensor:
        """Return the network's outputs for the queries of one task at evaluation, (Q, D).

        Args:
            net: The network, or its replica.
            params: Parameters of the network by name.
            support_x: Support inputs, (S, *input_shape), the batch-norm batch of `bn=support`.
            query_x: Query inputs, (Q, *input_shape).
            context: Context vector of the task, if the network reads one.
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
    """Check that an integer setting of an algorithm is at least 1.

    Args:
        name: Key of the setting, without `algo.`.
        value: Value of the setting.

    Raises:
        ValueError: The value is below 1.
    """
    if value < 1:
        raise ValueError(f"algo.{name}={value}: expected 1 or more")


def own_parameters(net: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters by name, as the engine expects them."""
    return {name: param for name, param in net.named_parameters()}  # noqa: C416


def forward(net: nn.Module, params: dict[str, Tensor], x: Tensor, ctx: ForwardContext) -> Tensor:
    """Run a network with the given parameters in place of its own."""
    outputs: Tensor = torch.func.functional_call(net, params, (x, ctx))
    return outputs


def task_metric(spec: TaskSpec, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the reported metric of each task.

    Args:
        spec: Kind, shapes and sizes of the tasks.
        outputs: Predictions, (…, Q, W) logits or (…, Q, D) values.
        targets: Targets, (…, Q) labels or (…, Q, D) values.

    Returns:
        Accuracy as a fraction, or the mean squared error, (…).
    """
    if spec.kind == "classification":
        return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(-1)
    return (outputs - targets).square().mean((-2, -1))
