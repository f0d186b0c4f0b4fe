"""Neural processes: conditional (Garnelo et al. 2018a), latent (2018b) and attentive (Kim 2019).

Official code: google-deepmind/neural-processes. The likelihood as an objective (Foong et al. 2020)
follows `NLLLossLNPF` of YannDubs/Neural-Process-Family. Shapes: T tasks, S support rows, Q query
rows, N context rows, M target rows, L samples, D outputs, R dimensions of a representation, Z of
the latent variable.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, LearnerSetup, task_metric, with_tensors
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.functional import Params, strip_prefix
from metarun.algorithms.outer_program import OuterTask
from metarun.backbones.layers.context import BATCH_STATISTICS
from metarun.backbones.layers.normalization import has_batch_norm
from metarun.core import seeding
from metarun.core.checks import at_least, positive
from metarun.core.types import Adapted, Prediction, Progress, TaskBatch

Path = Literal["mean", "attention", "none"]
Objective = Literal["elbo", "likelihood"]

_SLOT_CONTEXT, _SLOT_LATENT = 50, 51


class NeuralProcess(Algorithm):
    """Predicts a mean and a spread (standard deviation) from a representation of the support.

    An encoder maps each context pair (x, y) to R numbers. A decoder maps the representation and a
    target x to a mean and a spread. On the deterministic path the representation is the mean over
    the context (Garnelo et al. 2018a, eq. 1 to 3), or multi-head attention of a target x to the
    context (Kim et al. 2019, section 3). On the latent path it is a sample z ~ q(z | context), a
    normal distribution whose parameters come from the mean of a second encoder (Garnelo et al.
    2018b, section 2). `cnp` has the deterministic path; `np` has the latent path, as in its paper
    (the code has both); `anp` has attention and the latent path.

    The loss is minus the mean log-likelihood of all targets: the support and query rows. The first
    N of them are the context. N is drawn for each update from `context` to all support rows (in
    the code to all but one, and the number of further targets is drawn too). With a latent path z
    comes from q(z | targets), and KL(q(z | targets) || q(z | context)) divided by the number of
    target values is added (Garnelo et al. 2018b, eq. 8). In the code a spread is 0.1 + 0.9
    softplus; `min_spread` is this floor.

    This bound trains the decoder on z that depend on the targets. `objective=likelihood` trains it
    on z as at evaluation, drawn from q(z | context); Foong et al. (2020) replace the bound by it.
    The loss is -log((1/L) sum_l prod_t p(y_t | x_t, z_l)), with t over all targets, divided by the
    number of target values. By Jensen's inequality its expectation is an upper bound of minus the
    log-likelihood, and the bound is tighter for larger L.

    At evaluation the context is the support. With a latent path the prediction is the mean and the
    standard deviation of the mixture over `samples` of z, with the same draws for every task.

    The backbone builds the encoders and the decoder, from one width to another.

    Args:
        deterministic: Kind of the deterministic path: `mean`, `attention` or `none`.
        width: Width R of the representation.
        latent: Width Z of the latent variable; 0 means no latent path.
        heads: Attention heads; R has to be a multiple of their number.
        objective: Objective of a latent path, `elbo` or `likelihood`.
        train_samples: Samples L of the likelihood in training; the bound uses one.
        samples: Samples L at evaluation.
        context: Smallest number of context rows in training; null always uses all support rows.
        min_spread: Floor of the spread, in units of the targets.

    Raises:
        ValueError: A number or a word is out of range, there is no path, the backbone has batch
            norm, or the tasks are not regression.
    """

    capabilities = Capabilities(kinds=("regression",))

    def __init__(
        self,
        setup: LearnerSetup,
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
    ) -> None:
        super().__init__(setup)
        if deterministic == "none" and not latent:
            raise ValueError("algo.deterministic=none needs another path: use algo.latent=128")
        if objective == "likelihood" and not latent:
            raise ValueError("algo.objective=likelihood needs a latent path: use algo.latent=128")
        at_least("algo", 0, latent=latent)
        at_least("algo", 1, width=width, heads=heads, context=context)
        at_least("algo", 1, samples=samples, train_samples=train_samples)
        if deterministic == "attention" and width % heads:
            raise ValueError(f"algo.heads={heads}: expected a divisor of algo.width={width}")
        positive("algo", min_spread=min_spread)
        self.objective = objective
        self.train_samples = train_samples if objective == "likelihood" else 1
        self.samples = samples
        self.latent = latent
        self.embedding = "mean" if latent else "representation"
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
                "a neural process predicts each row separately, but batch norm mixes rows: use "
                "backbone.batch_norm=false"
            )
        self.optimizer = self.build_optimizer()

    def outer_task(self, batch: TaskBatch, progress: Progress) -> OuterTask:
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
            own = strip_prefix("net.", params)
            means, spreads, divergence = torch.func.functional_call(
                net, own, (x[:size], y[:size], x, noise, y if bounded else None)
            )
            loss = -log_likelihood(y, means, spreads) / y.numel() + divergence / y.numel()
            unseen = slice(size if size < len(y) else 0, None)
            return loss, (loss, task_metric(self.spec, means.mean(0)[unseen], y[unseen]), {})

        return task, (targets_x, targets_y, noise)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        def task(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Params:
            read: Params = with_tensors(net, params, lambda net: net.read(x, y))
            return read

        adapted: Adapted = self.map_tasks(task, support_x, support_y)
        return adapted

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        samples = self.samples if self.latent else 1
        key = torch.tensor(seeding.key(self.seed, "latent"), device=self.device)
        noise = seeding.normal(key, _SLOT_LATENT, (samples, self.latent), dtype=self.dtype)

        def task(net: nn.Module, params: Params, read: Params, x: Tensor) -> tuple[Tensor, Tensor]:
            means, spreads = with_tensors(net, params, lambda net: net.decode(read, x, noise))
            mean = means.mean(0)
            variance = spreads.square().mean(0) + (means - mean).square().mean(0)
            return mean, variance.sqrt()

        mean, spread = self.map_adapted(task, adapted, query_x)
        return Prediction(mean, spread=spread, embedding=adapted[self.embedding])

    def _context_size(self, rows: int, progress: Progress) -> int:
        """Return the number of context rows N of one update."""
        if self.least_context is None or self.least_context >= rows:
            return rows
        key = torch.tensor(seeding.key(self.seed, "context", progress.step))
        choices = rows - self.least_context + 1
        return self.least_context + int(seeding.integers(key, _SLOT_CONTEXT, choices))


class _Process(nn.Module):
    """Encoders, attention and decoder of one task; `make` builds a network between two widths."""

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
            # Halfway between the two widths, as in the code.
            self.latent_hidden = nn.Linear(width, (width + latent) // 2)
            self.latent_out = nn.Linear((width + latent) // 2, 2 * latent)
        size = (width if deterministic != "none" else 0) + latent
        self.decoder = make(inputs + size, 2 * outputs)
        self.min_spread = min_spread

    def forward(
        self, x: Tensor, y: Tensor, asked: Tensor, noise: Tensor, answer: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the predictions and the divergence in training.

        Args:
            x, y: Context rows (N, …) and their values (N, D).
            asked: (M, …) target rows.
            noise: (L, Z) standard normal samples.
            answer: (M, D) values of the target rows if z is drawn given them, as the bound does;
                None draws z given the context.

        Returns:
            Means and spreads (L, M, D), and the KL divergence of the latent distributions.
        """
        read = self.read(x, y)
        divergence = y.new_zeros(())
        if self.latent_encoder is not None and answer is not None:
            prior = read["mean"], read["spread"]
            mean, spread = self._latent(torch.cat([asked.flatten(1), answer], 1))
            divergence = normal_divergence((mean, spread), prior)
            read |= {"mean": mean, "spread": spread}
        return *self.decode(read, asked, noise), divergence

    def read(self, x: Tensor, y: Tensor) -> Params:
        """Return what the decoder reads of a context (N, …), (N, D).

        It is the representation, the mean or the keys and values of attention, and the `mean` and
        the `spread` (Z,) of q(z | context).
        """
        x = x.flatten(1)
        pairs = torch.cat([x, y], 1)
        read: Params = {}
        if self.encoder is not None:
            rows = self.encoder(pairs, BATCH_STATISTICS)
            read["representation"] = rows.mean(0)
            if self.attention is not None:
                read["keys"], read["values"] = self.attention.read(x, rows)
        if self.latent_encoder is not None:
            read["mean"], read["spread"] = self._latent(pairs)
        return read

    def decode(self, read: Params, asked: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and spreads (L, M, D) of target rows (M, …), from the result of `read`."""
        asked = asked.flatten(1)
        parts = [asked]
        if self.attention is not None:
            parts.append(self.attention(asked, read["keys"], read["values"]))
        elif self.encoder is not None:
            parts.append(read["representation"].expand(len(asked), -1))
        seen = torch.cat(parts, 1).expand(len(noise), -1, -1)
        if self.latent_encoder is not None:
            z = read["mean"] + read["spread"] * noise
            seen = torch.cat([seen, z[:, None].expand(-1, len(asked), -1)], 2)
        means, raw = (
            self.decoder(seen.flatten(0, 1), BATCH_STATISTICS)
            .unflatten(0, seen.shape[:2])
            .chunk(2, 2)
        )
        return means, self.min_spread + (1.0 - self.min_spread) * nn.functional.softplus(raw)

    def _latent(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation (Z,) of q(z | pairs)."""
        hidden = self.latent_hidden(self.latent_encoder(pairs, BATCH_STATISTICS).mean(0)).relu()  # type: ignore[misc]
        mean, raw = self.latent_out(hidden).chunk(2)
        return mean, 0.1 + 0.9 * raw.sigmoid()


class Attention(nn.Module):
    """Multi-head scaled dot-product attention of target rows to context rows.

    Args:
        embed: Network from inputs to R numbers, for keys and queries.
        width: Width R of the representations.
        heads: Number of heads, a divisor of R.
    """

    def __init__(self, embed: nn.Module, width: int, heads: int) -> None:
        super().__init__()
        self.embed = embed
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def read(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (H, N, R / H) of context inputs (N, …) and rows (N, R)."""
        keys = self._by_head(self.key(self.embed(x, BATCH_STATISTICS)))
        return keys, self._by_head(self.value(rows))

    def forward(self, asked: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attended representations (M, R) of target inputs (M, …)."""
        queries = self._by_head(self.query(self.embed(asked, BATCH_STATISTICS)))
        weights = (queries @ keys.mT / math.sqrt(keys.shape[2])).softmax(2)
        found: Tensor = self.out((weights @ values).transpose(0, 1).flatten(1))
        return found

    def _by_head(self, part: Tensor) -> Tensor:
        heads: Tensor = part.unflatten(1, (self.heads, -1)).transpose(0, 1)
        return heads


def log_density(y: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Return the logarithm of the normal density of each value."""
    return -0.5 * (((y - mean) / spread).square() + math.log(2.0 * math.pi)) - spread.log()


def log_likelihood(y: Tensor, means: Tensor, spreads: Tensor) -> Tensor:
    """Return log((1/L) sum_l prod_t p(y_t | x_t, z_l)) of targets (M, D).

    Args:
        y: (M, D) targets.
        means, spreads: (L, M, D) parameters of the normal distributions.
    """
    joint = log_density(y, means, spreads).sum((1, 2))
    return joint.logsumexp(0) - math.log(len(joint))


def normal_divergence(q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor]) -> Tensor:
    """Return KL(q || p) of independent normals, given their means and standard deviations (Z,)."""
    (mean, spread), (other, width) = q, p
    ratio = spread / width
    return (
        0.5 * (ratio.square() + ((mean - other) / width).square() - 1.0).sum() - ratio.log().sum()
    )
