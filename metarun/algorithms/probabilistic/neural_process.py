"""Neural processes: conditional (Garnelo et al. 2018a), latent (2018b) and attentive (Kim 2019).

Official code: google-deepmind/neural-processes. The likelihood as an objective (Foong et al. 2020)
is `NLLLossLNPF` of YannDubs/Neural-Process-Family. Shapes: T tasks, S support rows, Q query rows,
N rows of a context, M rows asked about, L samples, D outputs, R numbers of a representation, Z
of the latent variable.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, own_parameters, task_metric
from metarun.algorithms.functional import Params
from metarun.algorithms.outer_optimizer import check_positive
from metarun.backbones.layers.context import BATCH_STATISTICS
from metarun.backbones.layers.normalization import has_batch_norm
from metarun.core import seeding
from metarun.core.types import Metrics, Prediction, Progress, TaskBatch

Path = Literal["mean", "attention", "none"]
Objective = Literal["elbo", "likelihood"]

_SLOT_CONTEXT, _SLOT_LATENT = 50, 51


class NeuralProcess(Algorithm):
    """Answers with a mean and a spread, given a representation of the support rows.

    An encoder maps each (x, y) of the context to R numbers, a decoder the representation and a
    new x to a mean and a spread there. On the deterministic path the representation is the mean
    over the context (Garnelo et al. 2018a, eq. 1 to 3), or what a query x finds in it by
    attention of several heads (Kim et al. 2019, section 3). On the latent path it is a sample of
    z ~ q(z | context), a normal whose parameters come from the mean of another encoder (Garnelo
    et al. 2018b, section 2). `cnp` has the first path, `np` the latent one, as in its paper (the
    code has both there), `anp` attention and the latent one.

    The loss is minus the mean log-likelihood of all targets: the support and query rows, of
    which the first N are the context; N is drawn for each update from `context` to all support
    rows (in the code to all but one, and the number of further targets is drawn too). With a
    latent path z comes from q(z | targets), and KL(q(z | targets) || q(z | context)) over the
    number of target values is added (Garnelo et al. 2018b, eq. 8). Spreads are 0.1 + 0.9
    softplus in the code; `min_spread` is their floor.

    That bound trains the decoder on z that have seen the answers. `objective=likelihood` trains
    it on z as they are at evaluation, drawn from q(z | context) (Foong et al. 2020, who have it
    in place of the bound): the loss is -log((1/L) sum_l prod_t p(y_t | x_t, z_l)), with t over
    all targets, over the number of target values. By Jensen's inequality it is, in the mean, an
    upper bound of minus the log-likelihood, and the tighter the greater L.

    At evaluation the context is the support. With a latent path the answer is the mean and the
    standard deviation of the mixture over `samples` of z, the same draws for every task.

    Encoders and decoder are made by the backbone, from one width to another.

    Args:
        deterministic: What the deterministic path is.
        width: R.
        latent: Z; 0 has no latent path.
        heads: Of the attention; they share R evenly.
        objective: What a latent path is trained by.
        train_samples: L of the likelihood in training; the bound has one.
        samples: L at evaluation.
        context: Fewest rows of a context in training; null has all support rows always.
        min_spread: Floor of the spread, in the unit of the targets.
        **common: Those of `Algorithm`.

    Raises:
        ValueError: A number or a word is out of range, there is no path, the backbone has batch
            norm, or the data are no regression.
    """

    kinds: ClassVar[tuple[str, ...]] = ("regression",)
    replays: ClassVar[bool] = True

    def __init__(
        self,
        *,
        deterministic: Path = "mean",
        width: int = 128,
        latent: int = 0,
        heads: int = 8,
        objective: Objective = "elbo",
        train_samples: int = 16,
        samples: int = 32,
        context: int | None = 3,
        min_spread: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if deterministic not in ("mean", "attention", "none"):
            raise ValueError(f"algo.deterministic={deterministic}: expected mean, attention, none")
        if deterministic == "none" and not latent:
            raise ValueError("algo.deterministic=none needs another path: use algo.latent=128")
        if objective not in ("elbo", "likelihood"):
            raise ValueError(f"algo.objective={objective}: expected elbo or likelihood")
        if objective == "likelihood" and not latent:
            raise ValueError("algo.objective=likelihood needs a latent path: use algo.latent=128")
        for name, value, least in (
            ("width", width, 1),
            ("latent", latent, 0),
            ("heads", heads, 1),
            ("train_samples", train_samples, 1),
            ("samples", samples, 1),
            ("context", 1 if context is None else context, 1),
        ):
            if value < least:
                raise ValueError(f"algo.{name}={value}: expected {least} or more")
        if deterministic == "attention" and width % heads:
            raise ValueError(f"algo.heads={heads} do not share algo.width={width} evenly")
        check_positive("algo.min_spread", min_spread)
        self.objective = objective
        self.train_samples = train_samples if objective == "likelihood" else 1
        self.samples = samples
        self.latent = latent
        self.least_context = context
        self.net = _Process(
            lambda inputs, outputs: self._backbone(input_shape=(inputs,), output_dim=outputs),
            math.prod(self.spec.input_shape),
            self.spec.output_dim,
            deterministic,
            width,
            latent,
            heads,
            min_spread,
        )
        if has_batch_norm(self.net):
            raise ValueError(
                "a neural process answers each row by itself, which batch norm does not: use "
                "backbone.batch_norm=false"
            )
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        size = self._context_size(batch.support_x.shape[1], progress)
        targets_x = torch.cat([batch.support_x, batch.query_x], 1)
        targets_y = torch.cat([batch.support_y, batch.query_y], 1)
        first = progress.first_task(batch.num_tasks)
        keys = seeding.task_keys(self.seed, "latent", first, batch.num_tasks, self.device)
        shape = (self.train_samples, self.latent)
        noise = seeding.normal(keys, _SLOT_LATENT, shape, dtype=self.dtype)
        bounded = self.objective == "elbo"

        def task(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Any]:
            x, y, noise = rows
            means, spreads, divergence, _ = torch.func.functional_call(
                net, params, (x[:size], y[:size], x, noise, y if bounded else None)
            )
            loss = -log_likelihood(y, means, spreads) / y.numel() + divergence / y.numel()
            unseen = slice(size if size < len(y) else 0, None)
            return loss, (loss, task_metric(self.spec, means.mean(0)[unseen], y[unseen]))

        grads, (losses, scores) = self.resolved_engine().gradients(
            task,
            self.net,
            own_parameters(self.net),
            (targets_x, targets_y, noise),
            key=self.replay_key(size),
        )
        self.optimizer.step({f"net.{name}": grad for name, grad in grads.items()}, progress)
        return {"loss": losses.mean(), self.spec.metric: scores.mean()}

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        samples = self.samples if self.latent else 1
        key = torch.tensor(seeding.key(self.seed, "latent"), device=self.device)
        noise = seeding.normal(key, _SLOT_LATENT, (samples, self.latent), dtype=self.dtype)

        def task(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            means, spreads, _, seen = torch.func.functional_call(net, params, (*rows, noise))
            mean = means.mean(0)
            variance = spreads.square().mean(0) + (means - mean).square().mean(0)
            return mean, variance.sqrt(), seen

        mean, spread, embedding = self.map_tasks(task, support_x, support_y, query_x)
        return Prediction(mean, spread=spread, embedding=embedding)

    def _context_size(self, rows: int, progress: Progress) -> int:
        """N of one update."""
        if self.least_context is None or self.least_context >= rows:
            return rows
        key = torch.tensor(seeding.key(self.seed, "context", progress.step))
        choices = rows - self.least_context + 1
        return self.least_context + int(seeding.integers(key, _SLOT_CONTEXT, choices))


class _Process(nn.Module):
    """Encoders, attention and decoder of one task; `make` maps one width to another."""

    def __init__(
        self,
        make: Any,
        inputs: int,
        outputs: int,
        deterministic: Path,
        width: int,
        latent: int,
        heads: int,
        min_spread: float,
    ) -> None:
        super().__init__()
        self.encoder = make(inputs + outputs, width) if deterministic != "none" else None
        self.attention: Attention | None = None
        if deterministic == "attention":
            self.attention = Attention(make(inputs, width), width, heads)
        self.latent_encoder = make(inputs + outputs, width) if latent else None
        if latent:
            # Half-way between the two widths, as in the code.
            self.latent_hidden = nn.Linear(width, (width + latent) // 2)
            self.latent_out = nn.Linear((width + latent) // 2, 2 * latent)
        size = (width if deterministic != "none" else 0) + latent
        self.decoder = make(inputs + size, 2 * outputs)
        self.min_spread = min_spread

    def forward(
        self, x: Tensor, y: Tensor, asked: Tensor, noise: Tensor, answer: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means and spreads (L, M, D) at rows (M, …), the divergence of the latent normals, and
        the context as a vector: the mean of q(z | context), else its mean representation.

        Args:
            x, y: The context, (N, …) and (N, D).
            asked: (M, …).
            noise: (L, Z) standard normal.
            answer: (M, D) where z comes from the targets: in training by the bound.
        """
        x, asked = x.flatten(1), asked.flatten(1)
        pairs = torch.cat([x, y], 1)
        parts = [asked]
        if self.encoder is not None:
            rows = self.encoder(pairs, BATCH_STATISTICS)
            vector = rows.mean(0)
            if self.attention is None:
                parts.append(rows.mean(0).expand(len(asked), -1))
            else:
                parts.append(self.attention(asked, x, rows))
        seen = torch.cat(parts, 1).expand(len(noise), -1, -1)
        divergence = y.new_zeros(())
        if self.latent_encoder is not None:
            mean, spread = self._latent(pairs)
            vector = mean
            if answer is not None:
                prior = mean, spread
                mean, spread = self._latent(torch.cat([asked, answer], 1))
                divergence = normal_divergence((mean, spread), prior)
            z = mean + spread * noise
            seen = torch.cat([seen, z[:, None].expand(-1, len(asked), -1)], 2)
        means, raw = (
            self.decoder(seen.flatten(0, 1), BATCH_STATISTICS)
            .unflatten(0, seen.shape[:2])
            .chunk(2, 2)
        )
        spreads = self.min_spread + (1.0 - self.min_spread) * nn.functional.softplus(raw)
        return means, spreads, divergence, vector

    def _latent(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread (Z,) of q(z | pairs)."""
        hidden = self.latent_hidden(self.latent_encoder(pairs, BATCH_STATISTICS).mean(0)).relu()  # type: ignore[misc]
        mean, raw = self.latent_out(hidden).chunk(2)
        return mean, 0.1 + 0.9 * raw.sigmoid()


class Attention(nn.Module):
    """What queries find among the rows of a context, by scaled products of several heads.

    Args:
        embed: Maps inputs to R numbers, keys and queries alike.
        width: R.
        heads: They share R evenly.
    """

    def __init__(self, embed: nn.Module, width: int, heads: int) -> None:
        super().__init__()
        self.embed = embed
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, asked: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """(M, R) for inputs (M, …), of the representations (N, R) of inputs (N, …)."""
        queries, keys, values = (
            part.unflatten(1, (self.heads, -1)).transpose(0, 1)
            for part in (
                self.query(self.embed(asked, BATCH_STATISTICS)),
                self.key(self.embed(x, BATCH_STATISTICS)),
                self.value(rows),
            )
        )
        weights = (queries @ keys.mT / math.sqrt(keys.shape[2])).softmax(2)
        found: Tensor = self.out((weights @ values).transpose(0, 1).flatten(1))
        return found


def log_density(y: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """The logarithm of the normal density of each number."""
    return -0.5 * (((y - mean) / spread).square() + math.log(2.0 * math.pi)) - spread.log()


def log_likelihood(y: Tensor, means: Tensor, spreads: Tensor) -> Tensor:
    """log((1/L) sum_l prod_t p(y_t | x_t, z_l)) of targets (M, D), given normals (L, M, D)."""
    joint = log_density(y, means, spreads).sum((1, 2))
    return joint.logsumexp(0) - math.log(len(joint))


def normal_divergence(q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor]) -> Tensor:
    """KL(q || p) of independent normals, given their means and spreads (Z,)."""
    (mean, spread), (other, width) = q, p
    ratio = spread / width
    return (
        0.5 * (ratio.square() + ((mean - other) / width).square() - 1.0).sum() - ratio.log().sum()
    )
