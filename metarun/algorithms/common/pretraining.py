"""Supervised training on all training classes, and its classification heads.

Only the body is reused on new tasks: the features of an ordinary classifier, without
meta-learning.

Shapes: N rows of a mini-batch, C training classes, T tasks, S support rows, Q query rows, W
outputs of a head, F features, … any leading dimensions, such as one of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward, task_metric
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.features import FeatureLearner
from metarun.algorithms.functional import strip_prefix
from metarun.algorithms.outer_program import OuterTask
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.dropout import makes_noise
from metarun.backbones.layers.normalization import has_batch_norm
from metarun.core import seeding
from metarun.core.checks import positive
from metarun.core.types import Progress, TaskBatch

HeadKind = Literal["linear", "cosine"]
Weights = dict[str, Tensor]

_MANY_OUTPUTS = 200


@dataclass(frozen=True, slots=True)
class Head:
    """A classification head: logits from features, as pure functions of weights.

    `linear` is x W^T + b. `cosine` is s g_k cos(x, v_k) with a learned length g_k and direction
    v_k for each class (`distLinear` of Chen et al.'s code: weight normalization, Salimans & Kingma
    2016; the paper itself has no g).

    Args:
        kind: Kind of head, `linear` or `cosine`.
        scale: Factor s of `cosine`; None takes the official code's value, which is 2 up to 200
            outputs and 10 beyond.

    Raises:
        ValueError: A setting is out of range.
    """

    kind: HeadKind = "linear"
    scale: float | None = None

    def __post_init__(self) -> None:
        positive("algo", null="or null", scale=self.scale)

    def start(self, key: int, num_features: int, num_outputs: int, like: Tensor) -> Weights:
        """Return initial weights from U(-1/sqrt(F), 1/sqrt(F)), as in `nn.Linear`.

        Args:
            key: Seeding key of the draws.
            num_features: Number of features, F.
            num_outputs: Number of outputs, W.
            like: Tensor with the device and dtype of the weights.

        Returns:
            `weight` (W, F) and `bias` (W), or `direction` (W, F) and `length` (W, 1).
        """
        bound = num_features**-0.5
        keys = torch.tensor(key, device=like.device)
        shape = (num_outputs, num_features)
        weight = seeding.uniform(keys, 0, shape, low=-bound, high=bound, dtype=like.dtype)
        if self.kind == "cosine":
            return {"direction": weight, "length": weight.norm(dim=1, keepdim=True)}
        bias = seeding.uniform(keys, 1, (num_outputs,), low=-bound, high=bound, dtype=like.dtype)
        return {"weight": weight, "bias": bias}

    def scores(self, weights: Weights, features: Tensor) -> Tensor:
        """Return logits (…, N, W) of features (…, N, F).

        The weights may have the same leading dimensions.
        """
        if self.kind == "linear":
            return torch.matmul(features, weights["weight"].mT) + weights["bias"].unsqueeze(-2)
        normal: Tensor = nn.functional.normalize(weights["direction"], dim=-1) * weights["length"]
        scale = self.scale or (2.0 if normal.shape[-2] <= _MANY_OUTPUTS else 10.0)
        return torch.matmul(unit(features), normal.mT) * scale


def unit(features: Tensor) -> Tensor:
    """Return vectors (…, F) scaled to length 1; a constant as in the code keeps zeros at zero."""
    length: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features / (length + 1e-5)


class Pretrained(FeatureLearner):
    """An algorithm whose body is pre-trained as a classifier of all training classes.

    One update is one step of ordinary supervised training. The support and query rows of all
    tasks form one mini-batch, with labels among all C classes. A mini-batch is therefore
    stratified: `train.way` classes with equally many images each. The papers draw images
    independently; a large `train.way` and a small `train.shot` + `train.query` come closest to
    this. The training metric is the accuracy over all C classes.

    Args:
        head: Head of the classifier, `linear` or `cosine`.
        scale: Factor of the cosine head; see `Head`.

    Raises:
        ValueError: A setting is out of range, the tasks are not classification, or the data set
            does not declare its number of training classes.
    """

    capabilities = Capabilities(kinds=("classification",), accepts_any_way=True)

    def __init__(
        self, setup: LearnerSetup, *, head: HeadKind = "linear", scale: float | None = None
    ) -> None:
        super().__init__(setup)
        if self.spec.num_train_classes is None:
            raise ValueError(
                f"{type(self).__name__} needs the number of training classes, which the data set "
                "does not declare (TaskSpec.num_train_classes): choose another data set"
            )
        self.head = Head(head, scale)
        with torch.no_grad():
            features = self.net(torch.zeros(2, *self.spec.input_shape))
        self.num_features = features.shape[1]
        key = seeding.key(self.seed, "classifier")
        weights = self.head.start(key, self.num_features, self.spec.num_train_classes, features)
        if "bias" in weights:
            weights["bias"].zero_()
        self.classifier = nn.ParameterDict({n: nn.Parameter(w) for n, w in weights.items()})
        if has_batch_norm(self.net) or makes_noise(self.net):
            whole = (
                "an update is one mini-batch, and its batch norm and masks depend on all rows: "
                "use backbone.norm=none or instance, or backbone.batch_norm=false"
            )
            self.capabilities = replace(self.capabilities, needs_whole_batch=whole)
        if not any(True for _ in self.net.parameters()):
            # On features as they are, the classifier is what trains.
            self.capabilities = replace(self.capabilities, meta_trains=True)
        # Again, now with the classifier.
        self.optimizer = self.build_optimizer()

    def outer_task(self, batch: TaskBatch, progress: Progress) -> OuterTask:
        def task(net: nn.Module, params: Weights, *rows: Tensor) -> tuple[Tensor, Any]:
            x, y, noise = rows
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            features = forward(
                net, strip_prefix("net.", params), x, ForwardContext(moments=moments, noise=noise)
            )
            scores = self.head.scores(strip_prefix("classifier.", params), features)
            loss = self.loss(scores, y)
            return loss, (loss, task_metric(self.spec, scores, y), moments)

        # A single task for the engine, which then uses fused operators.
        x, y = labeled_rows(batch)
        return task, (x[None], y[None], self.noise(progress, 1))

    def match_shapes(self, state: Mapping[str, Any]) -> None:
        for name, weights in self.classifier.items():
            stored = state.get(f"classifier.{name}")
            if stored is not None and stored.shape[1:] == weights.shape[1:]:
                weights.data = weights.new_zeros(stored.shape)

    def joint_features(self, support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of support rows, (T, S, F), and of query rows, (T, Q, F).

        They pass together; the setting `bn` chooses the batch statistics.
        """
        num_support = support_x.shape[1]
        ctx = self.joint_context(num_support)

        def task(net: nn.Module, params: Weights, *rows: Tensor) -> Tensor:
            return forward(net, params, torch.cat(rows), ctx)

        features = self.map_tasks(task, support_x, query_x)
        return features[:, :num_support], features[:, num_support:]


def labeled_rows(batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Return all rows of a batch and their labels among all training classes.

    Returns:
        Inputs (N, *input_shape) and labels (N,), for each task its support before its query rows.
    """
    assert batch.class_ids is not None
    labels = batch.class_ids.gather(1, torch.cat([batch.support_y, batch.query_y], 1))
    return torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1), labels.flatten()
