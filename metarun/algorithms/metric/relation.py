"""Relation networks (Sung et al. 2018; code floodsung/LearningToCompare_FSL).

Shapes: S support rows, Q query rows, W ways, C H W' channels, height and width of a feature map.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, with_tensors
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.episodic import EpisodicLearner
from metarun.algorithms.functional import Params, add_prefix, strip_prefix
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.conv_block import conv_and_norm
from metarun.backbones.layers.normalization import BatchNorm
from metarun.backbones.layers.pooling import halved
from metarun.core.checks import at_least, positive
from metarun.core.types import Adapted, Prediction


class RelationNet(EpisodicLearner):
    """Relation network: scores the similarity of a query and a class with a learned network.

    The relation score is r(k, x) = g([sum of f over the support rows of class k, f(x)]), between 0
    and 1 (eq. 1; section 3.2 for several shots). f are feature maps, concatenated along their
    channels. The loss is the mean squared difference of r from 1 for the query's class and from 0
    for the others. The paper's eq. 2 has the sum, the code the mean.

    The outputs are r before its sigmoid. If the scores are the probabilities of W independent
    matches, the softmax of the outputs is their distribution given that exactly one is true.

    The code always keeps batch norm in training mode, with separate batches for support rows,
    query rows, and all pairs of a class and a query. This is `bn=transductive`. With `bn=support`,
    f takes its statistics from the support rows, and g from the pairs of a class and a support
    row. With `bn=running`, both use statistics collected from query rows and pairs.

    Args:
        hidden: Units of the dense layer between g's maps and its score.
        padding: Padding of g's convolutions: 1 in the code for Omniglot, 0 for miniImageNet.
        clip_norm: Largest Euclidean norm of the gradient of f and, separately, of g; None is no
            bound.

    Raises:
        ValueError: A setting is out of range, the tasks are not classification, or the backbone
            has no feature maps or ones too small to be halved twice more.
    """

    capabilities = Capabilities(
        kinds=("classification",), accepts_any_way=True, label_equivariant=True
    )

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        hidden: int = 8,
        padding: int = 1,
        clip_norm: float | None = 0.5,
    ) -> None:
        super().__init__(setup)
        at_least("algo", 1, hidden=hidden)
        if padding not in (0, 1):
            raise ValueError(f"algo.padding={padding}: expected 0 or 1")
        positive("algo", null="or null", clip_norm=clip_norm)
        self.clip_norm = clip_norm
        embedding = self.build_maps("early")
        with torch.no_grad():
            shape = embedding(torch.zeros(2, *self.spec.input_shape)).shape[1:]
        self.net = _Relation(embedding, shape, hidden, padding)
        self.net.apply(_initialize)
        self.optimizer = self.build_optimizer()

    @property
    def keeps_support(self) -> bool:
        return False

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        ways = self.ways(support_y)

        def task(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Params:
            def run(ctx: ForwardContext) -> Tensor:
                classes: Tensor = with_tensors(
                    net, params, lambda net: net.classes(x, y, ways, ctx)
                )
                return classes

            classes, statistics = self.support_pass(net, run)
            return {"classes": classes, **add_prefix("net.", statistics)}

        adapted: Adapted = self.map_tasks(task, support_x, support_y)
        return adapted

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        ctx = self.query_context()

        def task(net: nn.Module, params: Params, own: Params, x: Tensor) -> Tensor:
            def scores(net: _Relation) -> Tensor:
                scores: Tensor = net.relation(own["classes"], net.embedding(x, ctx), ctx)
                return scores

            outputs: Tensor = with_tensors(net, params | strip_prefix("net.", own), scores)
            return outputs

        return Prediction(self.map_adapted(task, adapted, query_x))

    def answers(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        ways: int,
        ctx: ForwardContext,
    ) -> Tensor:
        """Return the scores (Q, W) of one task's queries, before the sigmoid."""
        rows = (support_x, support_y, query_x)
        scores: Tensor = torch.func.functional_call(net, params, (*rows, ways, ctx))
        return scores

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of the scores, sigmoid of outputs (Q, W) (eq. 2)."""
        matches = targets[:, None] == torch.arange(outputs.shape[1], device=targets.device)
        return (outputs.sigmoid() - matches.to(outputs.dtype)).square().mean()

    def limited(self, grads: Params) -> Params:
        if self.clip_norm is None:
            return grads
        factors = {
            module: self.clip_norm / _norm(grads, f"net.{module}.").clamp(min=self.clip_norm)
            for module in ("embedding", "relation")
        }
        return {name: grad * factors[name.split(".")[1]] for name, grad in grads.items()}


class _Relation(nn.Module):
    """The modules f and g, which map the rows of a task to a score for each query and class."""

    def __init__(self, embedding: nn.Module, shape: torch.Size, hidden: int, padding: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.relation = _Comparison(shape, hidden, padding)

    def forward(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, ways: int, ctx: ForwardContext
    ) -> Tensor:
        classes = self.classes_of(self.embedding(support_x, ctx), support_y, ways)
        # After the support, so that running statistics are of query rows, as in the code.
        scores: Tensor = self.relation(classes, self.embedding(query_x, ctx), ctx)
        return scores

    def classes(self, x: Tensor, labels: Tensor, ways: int, ctx: ForwardContext) -> Tensor:
        """Return the maps (W, C, H, W') of the classes, and pass the support's pairs through g."""
        maps = self.embedding(x, ctx)
        classes = self.classes_of(maps, labels, ways)
        if ctx.moments is not None:
            # g takes its statistics from the pairs of a class and a support row.
            self.relation(classes, maps, ctx)
        return classes

    def classes_of(self, maps: Tensor, labels: Tensor, ways: int) -> Tensor:
        """Return the sum of the support's maps (S, C, H, W') for each class, (W, C, H, W')."""
        member = labels[None] == torch.arange(ways, device=labels.device)[:, None]
        classes: Tensor = (member.to(maps.dtype) @ maps.flatten(1)).unflatten(1, maps.shape[1:])
        return classes


class _Comparison(nn.Module):
    """The module g: two convolution blocks and two dense layers on pairs of maps (section 3.4)."""

    def __init__(self, shape: torch.Size, hidden: int, padding: int) -> None:
        super().__init__()
        channels, *sides = shape
        for _ in range(2):
            sides = [(side - 2 + 2 * padding) // 2 for side in sides]
        if min(sides) < 1:
            raise ValueError(
                f"the feature maps are {shape[1]}x{shape[2]}, too small to be halved twice with "
                f"algo.padding={padding}: use larger images"
            )
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, channels, 3, padding=padding) for inputs in (2 * channels, channels)
        )
        self.norms = nn.ModuleList(BatchNorm(channels, f"relation.{i}") for i in range(2))
        self.hidden = nn.Linear(channels * sides[0] * sides[1], hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, classes: Tensor, maps: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the scores (Q, W) of query maps (Q, C, H, W') and classes (W, C, H, W')."""
        x = self._of_pairs(classes, maps).flatten(0, 1)
        x = torch.relu(halved(self.norms[0](x, ctx)))
        x = torch.relu(conv_and_norm(self.convs[1], self.norms[1], x, ctx, pool=halved))
        scores: Tensor = self.score(torch.relu(self.hidden(x.flatten(1))))
        return scores.view(len(maps), len(classes))

    def _of_pairs(self, classes: Tensor, maps: Tensor) -> Tensor:
        """Return the first convolution (Q, W, C, H, W') of all pairs of a class and a query.

        Convolving two concatenated maps is to add the convolutions of each. This convolves W + Q
        maps in place of W Q pairs of them, most of the arithmetic of a step.
        """
        conv = self.convs[0]
        assert isinstance(conv, nn.Conv2d)
        of_classes, of_maps = conv.weight.chunk(2, 1)
        convolve = partial(nn.functional.conv2d, padding=conv.padding)
        return convolve(classes, of_classes, conv.bias) + convolve(maps, of_maps)[:, None]


def _norm(grads: Params, prefix: str) -> Tensor:
    norms = [grad.norm() for name, grad in grads.items() if name.startswith(prefix)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _initialize(module: nn.Module) -> None:
    """Initialize a layer of f or g as the official code does."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.ones_(module.bias)
