"""The interface of every algorithm: update on a batch of tasks, adapt to new tasks, answer queries.

Shapes: T tasks, S support rows, Q query rows, W ways, D outputs.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.outer_optimizer import OuterOptimizer, update_running_statistics
from metarun.algorithms.outer_program import OuterTask, updates
from metarun.backbones.layers.context import BatchNormMode, ForwardContext
from metarun.backbones.layers.dropout import makes_noise
from metarun.backbones.layers.normalization import batch_norms, has_batch_norm
from metarun.backbones.network import Maps
from metarun.core import seeding
from metarun.core.checks import at_least
from metarun.core.types import Adapted, Metrics, Prediction, Progress, TaskBatch, TaskSpec
from metarun.execution.engine import Engine, TaskFunction

_UPDATE = ("update", "outer_step", "outer_gradients", "limited")
"""Methods that make up an update."""

Backbone = Callable[..., nn.Module]
"""Factory that maps `input_shape` and `output_dim` (None: features, no head) to a network."""

Optim = Callable[..., OuterOptimizer]
"""Factory that maps (name, parameter) pairs to an outer optimizer."""


@dataclass(frozen=True)
class LearnerSetup:
    """What a run gives to its learner, whichever it is: everything but the hyperparameters.

    Attributes:
        spec: Kind, shapes and sizes of the tasks.
        backbone: Factory of the network.
        optim: Factory of the outer optimizer.
        engine: Engine that maps functions of one task over a batch of tasks.
        bn: Source of the batch statistics at evaluation: `transductive` (all query rows of the
            task), `support`, or `running` (averages collected in training).
        eval_inner_steps: Adaptation steps at evaluation; None takes as many as in training.
        seed: Seed of the learner's random draws.
    """

    spec: TaskSpec
    backbone: Backbone
    optim: Optim
    engine: Engine
    bn: BatchNormMode = "transductive"
    eval_inner_steps: int | None = None
    seed: int = 0


class Algorithm(nn.Module, ABC):
    """A meta-learner, which owns its modules and its outer optimizer.

    A subclass takes the setup and its hyperparameters, `def __init__(self, setup, *, scale=1.0)`,
    and begins with `super().__init__(setup)`. It builds `self.net` with `build_network` and its
    optimizer with `build_optimizer`, and implements `update`, `adapt` and `answer`.

    Args:
        setup: Tasks, network, optimizer, engine and seed.

    Raises:
        ValueError: The algorithm cannot learn tasks of this kind, or a setting is out of range.
    """

    capabilities: Capabilities = Capabilities()
    """What the algorithm can do; a subclass states what differs."""

    net: nn.Module
    optimizer: OuterOptimizer
    _place: Tensor

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Evaluation calls `adapt` and `answer`, so that an override would be left out silently.
        if "predict" in vars(cls):
            raise TypeError(
                f"{cls.__name__} overrides predict: override adapt and answer, of which predict is "
                "one after the other"
            )

    def __init__(self, setup: LearnerSetup) -> None:
        super().__init__()
        name, can, spec = type(self).__name__, self.capabilities, setup.spec
        if spec.kind not in can.kinds:
            raise ValueError(
                f"{name} learns {' and '.join(can.kinds)}, but the data set has {spec.kind} "
                "tasks: choose another algo=… or data=… (`metarun list algo data`)"
            )
        if can.learns_online and spec.streams is None:
            raise ValueError(
                f"{name} learns from streams, but the data set is not a stream: use data=stream_…"
            )
        if spec.streams is not None and not can.learns_online:
            raise ValueError(
                f"the data set is a stream, but {name} learns separate tasks: use an algo for "
                "streams, such as online or oml (`metarun list`)"
            )
        if spec.streams is None and not can.accepts_any_way and spec.train_way != spec.output_dim:
            raise ValueError(
                f"train.way={spec.train_way} differs from way={spec.output_dim}, but {name} has "
                "a head of fixed width: make them equal"
            )
        if spec.ways_vary and not can.accepts_any_way:
            raise ValueError(
                f"tasks have up to {spec.output_dim} ways, but {name} has a head of fixed width: "
                "use one number, such as way=5, or an algo for any way, such as protonet"
            )
        if spec.shots_differ and can.needs_equal_shots:
            raise ValueError(
                f"{name} needs the same number of support rows of each class: use shot=1..10 "
                "without sizes=meta_dataset, or another algo"
            )
        at_least("eval", 0, inner_steps=setup.eval_inner_steps)
        self.spec = spec
        self.engine = setup.engine
        self.bn: BatchNormMode = setup.bn
        self.eval_inner_steps = setup.eval_inner_steps
        self.seed = setup.seed
        self._backbone = setup.backbone
        self._optim = setup.optim
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

    def outer_task(self, batch: TaskBatch, progress: Progress) -> OuterTask:
        """Return the function of one training task and its rows, which `outer_step` takes.

        An algorithm implements either this function or `update`. It changes no state, and what
        it returns does not depend on numbers that an update changes.

        Args:
            batch, progress: See `update`.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither `outer_task` nor `update`")

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        """Perform one meta-update and return its metrics: `loss` and the task metric.

        With several processes, the batch holds the tasks of this process (`progress.share`), and
        the metrics are means over these tasks. See `Capabilities.needs_whole_batch`.

        Args:
            batch: T training tasks.
            progress: Number of updates done, and of all updates.

        Raises:
            NonFiniteError: The loss or a gradient is not finite; no state has changed.
        """
        return self.outer_step(*self.outer_task(batch, progress), progress)

    def update_several(self, steps: Iterable[tuple[TaskBatch, Progress]]) -> list[Metrics]:
        """Perform the first of several meta-updates, where they are one call.

        `joins_updates` says whether they may be. The parameters are those after `update` up to
        rounding, and the same bit for bit for any number of updates in a call.

        Args:
            steps: Arguments of `update` for each of them.

        Returns:
            The metrics of the updates that were made, perhaps none. The next one is then one for
            `update`: only that raises an error.
        """
        planned = ((*self.outer_task(*step), step[1]) for step in steps)
        made = updates(self.resolved_engine(), self.net, self.optimizer, planned)
        return [{"loss": loss, self.spec.metric: score} for loss, score in made]

    @property
    def joins_updates(self) -> bool:
        """Whether `update_several` makes several updates in a call.

        They have to be those of `outer_task` and the optimizer alone, in compiled steps on a CPU.
        """
        return (
            self.engine.graph == "compile"
            and self.device.type == "cpu"
            and all(getattr(type(self), name) is getattr(Algorithm, name) for name in _UPDATE)
            and not has_batch_norm(self.net)
        )

    @abstractmethod
    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        """Learn T tasks from their support rows, without changing any state.

        The result carries no graph. It has all that `answer` reads of the support, and it can be
        saved by `torch.save` and loaded with `weights_only`.

        Args:
            support_x: Support inputs, (T, S, *input_shape).
            support_y: Support targets, (T, S) labels or (T, S, D) values.
        """

    @abstractmethod
    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        """Predict query rows of T tasks, without changing any state or `adapted`.

        The result carries no graph. Unless the algorithm is `transductive`, each query row is
        predicted independently of the others.

        Args:
            adapted: Result of `adapt` for the T tasks.
            query_x: Query inputs, (T, Q, *input_shape).
        """

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        """Adapt to T tasks and predict their query rows: `answer` after `adapt`."""
        return self.answer(self.adapt(support_x, support_y), query_x)

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
    def bn_statistics(self) -> str:
        """Batch-norm setting in effect; `none` where the network has no batch norm."""
        return self.bn if has_batch_norm(self.net) else "none"

    @property
    def transductive(self) -> bool:
        """Whether a prediction depends on the other query rows of its task."""
        return self.bn_statistics == "transductive"

    @property
    def keeps_support(self) -> bool:
        """Whether `answer` passes support and query rows through the network together.

        The support rows are then part of the result of `adapt`.
        """
        return False

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
        """Build the outer optimizer of all parameters registered so far.

        Without any there is nothing to meta-train, as with ProtoNet on features as they are.
        """
        parameters = list(self.named_parameters())
        if not parameters:
            self.capabilities = replace(self.capabilities, meta_trains=False)
        return self._optim(parameters)

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

    def ways(self, support_y: Tensor) -> int:
        """Return the number of classes W of tasks, given their support targets."""
        classes = self.spec.kind == "classification"
        return int(support_y.max()) + 1 if classes else self.spec.output_dim

    def training_ways(self, batch: TaskBatch) -> int:
        """Return the number of classes W of a batch of training tasks."""
        ids = batch.class_ids
        return self.spec.train_way if ids is None or not self.spec.ways_vary else ids.shape[1]

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

    def outer_step(
        self, task: TaskFunction, rows: tuple[Tensor, ...], progress: Progress
    ) -> Metrics:
        """Perform one meta-update by the gradient of a loss of single tasks; return its metrics.

        Args:
            task: Function of one task, `task(net, params, *rows) -> (loss, (loss, score,
                moments))`. The parameters have their names in the optimizer, the score is the task
                metric, and the moments are those of `ForwardContext.moments`.
            rows: Tensors with a leading dimension of T.
            progress: Number of updates done, and of all updates.

        Raises:
            NonFiniteError: A gradient is not finite; no state has changed.
        """
        grads, (losses, scores, moments) = self.outer_gradients(task, rows)
        self.optimizer.step(grads, progress, self.limited)
        update_running_statistics(self.net, moments)
        return {"loss": losses.mean(), self.spec.metric: scores.mean()}

    def outer_gradients(
        self, task: TaskFunction, rows: tuple[Tensor, ...]
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the gradient of the mean loss by name, and the extras stacked over tasks.

        The arguments are those of `outer_step`.
        """
        params: dict[str, Tensor] = {**self.optimizer.targets}
        return self.resolved_engine().gradients(task, self.net, params, rows)

    def limited(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the outer gradients after clipping of the algorithm's own; none here."""
        return grads

    def map_tasks(self, task: TaskFunction, *rows: Tensor) -> Any:
        """Return `task(net, params, *rows of one task)`, stacked over tasks, without a graph.

        Args:
            task: Function of one task, as in `Engine.map`.
            rows: Tensors with a leading dimension of T.
        """
        params = own_parameters(self.net)
        return self.resolved_engine().map(task, self.net, params, rows)

    def map_adapted(self, task: TaskFunction, adapted: Adapted, *rows: Tensor) -> Any:
        """Return `task(net, params, adapted, *rows)` of one task, stacked over tasks.

        The result has no graph.

        Args:
            task: Function of one task; `adapted` has no leading dimension there.
            adapted: Result of `adapt` for T tasks.
            rows: Tensors with a leading dimension of T.
        """
        names = tuple(adapted)

        def one(net: nn.Module, params: dict[str, Tensor], *values: Tensor) -> Any:
            own = dict(zip(names, values[len(rows) :], strict=True))
            return task(net, params, own, *values[: len(rows)])

        every = (*rows, *adapted.values())
        return self.resolved_engine().map(one, self.net, own_parameters(self.net), every)

    def support_pass(
        self, net: nn.Module, run: Callable[[ForwardContext], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run a pass over the support rows of one task at evaluation.

        Args:
            net: The network, or its replica.
            run: Function that passes the rows through the network with a context.

        Returns:
            The outputs, and with `bn=support` the statistics of this pass for `query_context`, by
            the names of the running statistics.
        """
        if self.bn != "support" or not has_batch_norm(net):
            return run(ForwardContext(running=self.bn == "running")), {}
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        outputs = run(ForwardContext(moments=moments, biased=True, double_backward=True))
        statistics: dict[str, Tensor] = {}
        for name, norm in batch_norms(net):
            mean, variance = moments[norm.name]
            statistics |= {f"{name}.running_mean": mean, f"{name}.running_var": variance}
        return outputs, statistics

    def query_context(self) -> ForwardContext:
        """Return the context of a pass over query rows at evaluation.

        With `bn=support`, the statistics of `support_pass` replace the running statistics.
        """
        return ForwardContext(running=self.bn != "transductive")


def _takes(make: Backbone, keyword: str) -> bool:
    parameters = inspect.signature(make).parameters.values()
    return any(p.name == keyword or p.kind is p.VAR_KEYWORD for p in parameters)


def own_parameters(net: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters by name, without frozen ones, as the engine expects them."""
    return {name: param for name, param in net.named_parameters() if param.requires_grad}


def forward(net: nn.Module, params: dict[str, Tensor], x: Tensor, ctx: ForwardContext) -> Tensor:
    """Run a network with the given parameters in place of its own."""
    outputs: Tensor = torch.func.functional_call(net, params, (x, ctx))
    return outputs


def with_tensors(net: nn.Module, tensors: dict[str, Tensor], function: Callable[[Any], Any]) -> Any:
    """Return `function(net)`, with the given tensors in place of the network's own.

    Args:
        net: The network.
        tensors: Parameters and buffers by name; it keeps its own of those not among them.
        function: Function that may call any method of the network.
    """
    given = {f"net.{name}": tensor for name, tensor in tensors.items()}
    return torch.func.functional_call(_Holder(net), given, (function,))


class _Holder(nn.Module):
    """Module whose call applies a function to the network that it holds."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.net)


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
