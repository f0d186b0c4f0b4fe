"""Neural processes against step-by-step computations of their equations; the exact process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from metarun.algorithms.probabilistic.gp_exact import ExactGP
from metarun.algorithms.probabilistic.neural_process import (
    Attention,
    NeuralProcess,
    log_density,
    log_likelihood,
)
from metarun.backbones.mlp import MLP
from metarun.config.build import Experiment
from metarun.config.build import build_experiment as build_experiment
from metarun.core.types import Prediction, Progress, TaskBatch, TaskSpec
from metarun.evaluation.episodes import evaluate
from metarun.evaluation.measures import Answers, coverage
from metarun.evaluation.measures import log_likelihood as density_measure
from tests.helpers import composed

SMALL = [
    "data=gp", "shot=6", "query=4", "backbone.hidden=[8,8]", "precision=float64", "device=cpu",
    "engine=loop",
]  # fmt: skip
NARROW = ["algo.width=8", "algo.heads=2", "algo.min_spread=0.1"]


def build(*words: str) -> Experiment:
    narrow = [] if "algo=gp_exact" in words else NARROW
    return build_experiment(composed(*SMALL, *narrow, *words))


def encoded(module: Any, rows: Tensor) -> Tensor:
    """Return the outputs of a small MLP, computed layer by layer."""
    for linear in module.body.linears:
        rows = nn.functional.relu(nn.functional.linear(rows, linear.weight, linear.bias))
    return nn.functional.linear(rows, module.head.weight, module.head.bias)


@torch.no_grad()
def test_a_conditional_process_is_encode_average_decode() -> None:
    made = build("algo=cnp")
    algorithm, batch = made.algorithm, made.source.batch("test", 0, 2)
    net: Any = algorithm.net
    answer = algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    assert answer.spread is not None
    for task in range(2):
        rows = [
            encoded(net.encoder, torch.cat([x, y]))
            for x, y in zip(batch.support_x[task], batch.support_y[task], strict=True)
        ]
        mean_row = sum(rows) / len(rows)
        for query in range(4):
            out = encoded(net.decoder, torch.cat([batch.query_x[task, query], mean_row]))
            spread = 0.1 + 0.9 * math.log1p(math.exp(float(out[1])))
            assert float(answer.outputs[task, query]) == pytest.approx(float(out[0]), rel=1e-10)
            assert float(answer.spread[task, query]) == pytest.approx(spread, rel=1e-10)


def latent(net: Any, x: Tensor, y: Tensor) -> Normal:
    hidden = encoded(net.latent_encoder, torch.cat([x, y], 1)).mean(0)
    hidden = nn.functional.relu(net.latent_hidden(hidden))
    mean, raw = net.latent_out(hidden).chunk(2)
    return Normal(mean, 0.1 + 0.9 * torch.sigmoid(raw))


@pytest.mark.parametrize("size", [2, 6])
def test_the_loss_of_a_latent_process_is_its_bound_by_torchs_distributions(size: int) -> None:
    made = build("algo=np", "algo.latent=3")
    net: Any = made.algorithm.net
    batch = made.source.batch("train", 0, 1)
    x = torch.cat([batch.support_x, batch.query_x], 1)[0]
    y = torch.cat([batch.support_y, batch.query_y], 1)[0]
    noise = torch.randn(1, 3, dtype=torch.float64)
    means, spreads, divergence = net(x[:size], y[:size], x, noise, y)
    prior, posterior = latent(net, x[:size], y[:size]), latent(net, x, y)
    expected = kl_divergence(posterior, prior).sum()
    torch.testing.assert_close(divergence, expected, rtol=1e-10, atol=1e-12)
    z = posterior.mean + posterior.stddev * noise[0]
    out = encoded(net.decoder, torch.cat([x, z.expand(len(x), -1)], 1))
    normal = Normal(out[:, :1], 0.1 + 0.9 * nn.functional.softplus(out[:, 1:]))
    torch.testing.assert_close(log_density(y, means[0], spreads[0]), normal.log_prob(y))


@torch.no_grad()
@pytest.mark.parametrize("algo", ["cnp", "np", "anp"])
def test_a_task_is_embedded_where_its_context_puts_it(algo: str) -> None:
    made = build(f"algo={algo}")
    net: Any = made.algorithm.net
    batch = made.source.batch("test", 0, 2)
    found = made.algorithm.predict(batch.support_x, batch.support_y, batch.query_x).embedding
    assert found is not None
    for task in range(2):
        x, y = batch.support_x[task], batch.support_y[task]
        if algo == "cnp":
            wanted = encoded(net.encoder, torch.cat([x, y], 1)).mean(0)
        else:
            wanted = latent(net, x, y).mean
        torch.testing.assert_close(found[task], wanted)


@pytest.mark.parametrize("algo", ["cnp", "np", "anp"])
def test_an_update_descends_the_loss_that_its_docstring_says(algo: str) -> None:
    made = build(f"algo={algo}", "optim.method=sgd", "optim.lr=0.1", "algo.context=6")
    algorithm = made.algorithm
    net: Any = algorithm.net
    batch = made.source.batch("train", 0, 3)
    before = {name: p.clone() for name, p in net.named_parameters()}
    from metarun.core import seeding

    keys = seeding.task_keys(algorithm.seed, "latent", 0, 3, algorithm.device)
    noise = seeding.normal(keys, 51, (1, 0 if algo == "cnp" else 128), dtype=torch.float64)
    losses = []
    for task in range(3):
        cx, cy = batch.support_x[task], batch.support_y[task]
        x, y = torch.cat([cx, batch.query_x[task]]), torch.cat([cy, batch.query_y[task]])
        means, spreads, divergence = net(cx, cy, x, noise[task], y)
        losses.append(-Normal(means[0], spreads[0]).log_prob(y).mean() + divergence / len(y))
    loss = torch.stack(losses).mean()
    wanted = dict(zip(before, torch.autograd.grad(loss, list(net.parameters())), strict=True))
    metrics = algorithm.update(batch, Progress(0, 10))
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-10)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.1 * wanted[name])


def normals(samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets (7, 2), and means and standard deviations (L, 7, 2) of normals."""
    random = np.random.default_rng(samples)
    y, means = random.normal(size=(7, 2)), random.normal(size=(samples, 7, 2))
    spreads = random.uniform(0.1, 2.0, size=(samples, 7, 2))
    return torch.tensor(y), torch.tensor(means), torch.tensor(spreads)


def test_the_likelihood_of_one_sample_is_that_of_its_normals() -> None:
    y, means, spreads = normals(1)
    expected = Normal(means[0], spreads[0]).log_prob(y).sum()
    torch.testing.assert_close(log_likelihood(y, means, spreads), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("samples", [2, 5, 32])
def test_the_likelihood_is_the_mean_over_samples_of_products_over_targets(samples: int) -> None:
    y, means, spreads = normals(samples)
    joint = [
        sum(
            stats.norm(means[s, row, column], spreads[s, row, column]).logpdf(y[row, column])
            for row in range(7)
            for column in range(2)
        )
        for s in range(samples)
    ]
    expected = special.logsumexp(joint, b=1.0 / samples)
    assert float(log_likelihood(y, means, spreads)) == pytest.approx(expected, rel=1e-12)


def test_the_likelihood_is_finite_where_every_product_is_below_the_smallest_number() -> None:
    y = torch.full((40, 1), 9.0, dtype=torch.float64)
    means = torch.zeros(3, 40, 1, dtype=torch.float64, requires_grad=True)
    value = log_likelihood(y, means, torch.full_like(means, 0.1))
    value.backward()
    assert value < -1e5
    assert means.grad is not None
    assert means.grad.isfinite().all()


LIKELIHOOD = [
    "algo.objective=likelihood", "algo.train_samples=4", "algo.context=6", "optim.method=sgd",
    "optim.lr=0.1", "optim.schedule=constant",
]  # fmt: skip


@pytest.mark.parametrize(
    "words", [["algo=np"], ["algo=np", "algo.deterministic=mean"], ["algo=anp"]]
)
def test_an_update_by_the_likelihood_sees_no_target_in_its_latent_variable(
    words: list[str],
) -> None:
    made = build(*words, *LIKELIHOOD)
    algorithm = made.algorithm
    net: Any = algorithm.net
    batch = made.source.batch("train", 0, 3)
    before = {name: p.clone() for name, p in net.named_parameters()}
    from metarun.core import seeding

    keys = seeding.task_keys(algorithm.seed, "latent", 21, 3, algorithm.device)
    noise = seeding.normal(keys, 51, (4, 128), dtype=torch.float64)
    losses = []
    for task in range(3):
        cx, cy = batch.support_x[task], batch.support_y[task]
        x, y = torch.cat([cx, batch.query_x[task]]), torch.cat([cy, batch.query_y[task]])
        # At evaluation there are the context and the target rows.
        means, spreads, _ = net(cx, cy, x, noise[task])
        z = latent(net, cx, cy)
        seen = z.mean + z.stddev * noise[task]
        if words == ["algo=np"]:
            rows = [encoded(net.decoder, torch.cat([x, s.expand(len(x), -1)], 1)) for s in seen]
            torch.testing.assert_close(means, torch.stack(rows)[..., :1])
        each = [Normal(m, s).log_prob(y).sum().exp() for m, s in zip(means, spreads, strict=True)]
        losses.append(-torch.log(sum(each) / 4) / len(y))
    loss = torch.stack(losses).mean()
    wanted = dict(zip(before, torch.autograd.grad(loss, list(net.parameters())), strict=True))
    metrics = algorithm.update(batch, Progress(7, 10))
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-10)
    for name, parameter in net.named_parameters():
        assert wanted[name].isfinite().all()
        torch.testing.assert_close(parameter, before[name] - 0.1 * wanted[name])


def test_an_update_by_the_likelihood_is_a_function_of_the_step() -> None:
    def updated(step: int) -> list[Tensor]:
        made = build("algo=np", *LIKELIHOOD)
        made.algorithm.update(made.source.batch("train", 0, 3), Progress(step, 10))
        return list(made.algorithm.parameters())

    first, again, other = updated(3), updated(3), updated(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("engine", ["vmap", "threads"])
def test_the_likelihood_is_the_same_by_every_engine(engine: str) -> None:
    def updated(engine: str) -> list[Tensor]:
        made = build("algo=anp", *LIKELIHOOD, f"engine={engine}")
        made.algorithm.update(made.source.batch("train", 0, 3), Progress(0, 10))
        return list(made.algorithm.parameters())

    for here, loop in zip(updated(engine), updated("loop"), strict=True):
        torch.testing.assert_close(here, loop, rtol=1e-10, atol=1e-12)


def test_attention_is_torchs_multihead_attention() -> None:
    torch.manual_seed(0)
    mine = Attention(MLP((1,), 8, hidden=[4]), 8, 2).double()
    theirs = nn.MultiheadAttention(8, 2, bias=False, batch_first=True).double()
    weights = [mine.query.weight, mine.key.weight, mine.value.weight]
    theirs.in_proj_weight.data.copy_(torch.cat(weights))
    theirs.out_proj.weight.data.copy_(mine.out.weight)
    x, asked, rows = (torch.randn(n, d, dtype=torch.float64) for n, d in ((5, 1), (3, 1), (5, 8)))
    keys, queries = mine.embed(x), mine.embed(asked)
    expected, _ = theirs(queries[None], keys[None], rows[None])
    torch.testing.assert_close(mine(asked, *mine.read(x, rows)), expected[0])


def test_a_latent_answer_is_the_mixture_over_its_samples() -> None:
    made = build("algo=np", "algo.latent=3", "algo.samples=5")
    net: Any = made.algorithm.net
    batch = made.source.batch("test", 0, 1)
    from metarun.core import seeding

    key = torch.tensor(seeding.key(made.algorithm.seed, "latent"))
    noise = seeding.normal(key, 51, (5, 3), dtype=torch.float64)
    means, spreads, _ = net(batch.support_x[0], batch.support_y[0], batch.query_x[0], noise)
    answer = made.algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    assert answer.spread is not None
    torch.testing.assert_close(answer.outputs[0], means.mean(0))
    # The law of total variance, over the five parts of equal weight.
    second = (spreads**2 + means**2).mean(0) - means.mean(0) ** 2
    torch.testing.assert_close(answer.spread[0], second.sqrt())


def test_contexts_of_training_have_every_size_that_is_allowed() -> None:
    algorithm = build("algo=cnp", "algo.context=4").algorithm
    assert isinstance(algorithm, NeuralProcess)
    sizes = [algorithm._context_size(6, Progress(step, 200)) for step in range(200)]
    assert sorted(set(sizes)) == [4, 5, 6]
    algorithm.least_context = None
    assert {algorithm._context_size(6, Progress(step, 9)) for step in range(9)} == {6}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["algo=cnp", "algo.deterministic=none"], "needs another path: use algo.latent=128"),
        (["algo=np", "algo.width=0"], "algo.width=0: expected 1 or more"),
        (["algo=np", "algo.objective=vi"], "algo.objective=vi: expected elbo or likelihood"),
        (["algo=cnp", "algo.objective=likelihood"], "likelihood needs a latent path"),
        (["algo=np", "algo.train_samples=0"], "algo.train_samples=0: expected 1 or more"),
        (["algo=anp", "algo.heads=3"], "algo.heads=3: expected a divisor of algo.width=8"),
        (["algo=cnp", "algo.min_spread=0"], "algo.min_spread=0.0: expected a positive number"),
        (["algo=cnp", "backbone.batch_norm=true"], "use backbone.batch_norm=false"),
        (["algo=gp_exact", "algo.lengthscale=-1"], "algo.lengthscale=-1.0: expected a positive"),
        (["algo=gp_exact", "algo.noise=-1"], "algo.noise=-1.0: expected 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], part: str) -> None:
    with pytest.raises(ValueError, match=r"algo|backbone") as error:
        build(*words)
    assert part in str(error.value)


# The exact process.


def test_the_exact_posterior_is_the_closed_form() -> None:
    made = build("algo=gp_exact")
    batch = made.source.batch("test", 0, 3)
    answer = made.algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    assert answer.spread is not None

    def kernel(a: Any, b: Any) -> Any:
        return np.exp(-0.5 * ((a - b.T) / 0.4) ** 2)

    for task in range(3):
        x, y, asked = (t[task].numpy() for t in (batch.support_x, batch.support_y, batch.query_x))
        inverse = np.linalg.inv(kernel(x, x) + 0.02**2 * np.eye(6))
        cross = kernel(asked, x)
        mean = cross @ inverse @ y
        variance = 1.0 + 0.02**2 - np.diag(cross @ inverse @ cross.T)
        np.testing.assert_allclose(answer.outputs[task].numpy(), mean, atol=1e-6)
        np.testing.assert_allclose(answer.spread[task, :, 0].numpy(), np.sqrt(variance), atol=1e-6)


def test_the_exact_process_is_as_sure_as_it_may_be_on_its_own_curves() -> None:
    made = build("algo=gp_exact", "query=20")
    measured = evaluate(made.algorithm, made.source, "test", 100, 50)
    covered = measured.arrays["coverage"]
    assert abs(covered.mean() - 0.95) < 3 * covered.std() / 10
    batch = made.source.batch("test", 0, 100)
    answer = made.algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    assert answer.spread is not None
    # Neither smaller nor larger spreads have a better log-likelihood.
    for factor in (0.7, 1.4):
        other = Prediction(answer.outputs, spread=factor * answer.spread)
        values = density_measure(Answers(made.source.spec, batch, other))
        assert values is not None
        assert float(values.mean()) < measured.arrays["log_likelihood"].mean()


def test_a_range_of_lengthscales_is_fitted() -> None:
    made = build("algo=gp_exact", "data.lengthscale=[0.2,0.8]", "shot=20")
    assert isinstance(made.algorithm, ExactGP)
    assert made.algorithm.lengthscale == (0.2, 0.8)
    wrong = build("algo=gp_exact", "data.lengthscale=[0.2,0.8]", "algo.lengthscale=0.2", "shot=20")
    fitted, fixed = (
        evaluate(m.algorithm, m.source, "test", 30, 30).arrays["log_likelihood"].mean()
        for m in (made, wrong)
    )
    assert fitted > fixed


# Metrics of predicted spreads.


def test_sureness_is_counted_by_hand() -> None:
    means = torch.tensor([[[0.0], [1.0], [2.0], [0.0]]])
    spread = torch.tensor([[[1.0], [0.5], [2.0], [0.1]]])
    targets = torch.tensor([[[1.9], [2.0], [2.0], [0.2]]])
    batch = TaskBatch(targets, targets, targets, targets)
    answers = Answers(TaskSpec("regression", (1,), 1, 1), batch, Prediction(means, spread=spread))
    figures = {**density_measure.of(answers), **coverage.of(answers)}
    normals = stats.norm([0.0, 1.0, 2.0, 0.0], [1.0, 0.5, 2.0, 0.1])
    density = normals.logpdf([1.9, 2.0, 2.0, 0.2]).mean()
    assert float(figures["log_likelihood"]) == pytest.approx(density, rel=1e-6)
    assert float(figures["coverage"]) == pytest.approx(0.5)  # 1.9, 2.0, 0.0 and 2.0 spreads away
