"""A meta-learner that selects a base-learner for each task.

Algorithm selection by features of the problem (Rice 1976). The main features are the
cross-validation results of the base-learners ("landmarks", Pfahringer et al. 2000). Their
cross-validation scores are the prior mean of the selector; it learns a residual. Shapes: T tasks,
S support rows, Q query rows, R rows, F features of a row, W ways, D outputs, B base-learners, K
inputs of the residual.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from metarun.algorithms.base import (
    Algorithm,
    LearnerSetup,
    forward,
    own_parameters,
    task_metric,
)
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.outer_optimizer import NonFiniteError
from metarun.algorithms.selection import portfolio
from metarun.algorithms.selection.cache import CachedStudy
from metarun.backbones.layers.context import ForwardContext
from metarun.core.checks import at_least, positive
from metarun.core.distributed import gather_rows, local_size
from metarun.core.types import Adapted, LearnedState, Metrics, Prediction, Progress, TaskBatch

Choice = Literal["pick", "weigh"]

_PERFORMANCES = 5
_TASK_FEATURES = 7
_MOST_KEPT = 2**29
"""Largest size in bytes of the predictions that are kept in memory."""
_WORST = 5.0
"""Largest loss of a row in the inputs and targets of the residual."""


class Selector(Algorithm):
    """Runs every base-learner of a portfolio on a task's support, and chooses among them.

    Each base-learner is cross-validated on the support. Its score is

        cross-validation score + trust(task) * residual(base-learner, task).

    The residual predicts how much more a base-learner gains on the query rows, compared with the
    average of all, than cross-validation says. It is a Bayesian linear regression with zero mean,
    fitted in closed form to all training tasks. Its inputs are results of the cross-validation
    (score, loss, standard deviation of the loss, squared error, squared distance from the mean
    prediction of all) and, with weights of their own for each base-learner, features of the task:
    rows, features, share of variance between classes (or correlation with the target),
    correlation of features, skewness and kurtosis. The trust is the variance of the residual,
    averaged over the training tasks, divided by its variance for this task; at most 1. Without
    training the selector is cross-validation, and far from the training tasks it approaches it.

    With `choice=pick` the base-learner with the greatest score is trained on the whole support
    and predicts. With `choice=weigh` all of them predict, with weights given by the softmax of
    the scores in standard errors of the cross-validation.

    The predictions of the base-learners are cached, so each task is computed once. They depend on
    nothing that is learned. The outer optimizer is unused.

    Base-learners use the rows as they are. With `features=RUN` they use features of images from
    the network of a finished run, with the run's backbone and its running statistics.

    Args:
        learners: Names of the base-learners; None takes all for the kind of task. Of equal scores
            the first wins. Classification: `centroid`, `knn`, `ridge`, `logistic`, `bayes`,
            `tree`, `mlp_RATE`; regression: `mean`, `knn`, `ridge`, `tree`, `mlp_RATE`.
        choice: Use of the scores: `pick` or `weigh`.
        prior: Weight of the prior of the residual, in training tasks: after so many, the weight
            of an input that varies alone is half of its least-squares value.
        folds: Folds of the cross-validation, at most the rows of the smallest class.
        processes: Processes that run base-learners; None is one for each core.
        cache: Folder that keeps predictions between runs; None keeps them in memory only.
        features: Learned state of a finished run, given as its folder on the command line.

    Raises:
        ValueError: A name or a number is wrong, scikit-learn is missing, or the run's network
            does not fit.
    """

    capabilities = Capabilities(
        package="sklearn", least_shot=2, accepts_any_way=True, label_equivariant=True
    )

    moments: Tensor
    tasks: Tensor

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        learners: Sequence[str] | None = None,
        choice: Choice = "pick",
        prior: float = 30.0,
        folds: int = 5,
        processes: int | None = None,
        cache: str | None = None,
        features: LearnedState | None = None,
    ) -> None:
        super().__init__(setup)
        try:
            import sklearn
        except ImportError:
            raise ValueError("algo=selector needs scikit-learn: pip install '.[sklearn]'") from None
        from joblib import cpu_count

        positive("algo", prior=prior)
        at_least("algo", 2, folds=folds)
        at_least("algo", 1, processes=processes)
        self.learners = _checked(self.spec.kind, learners)
        self.choice: Choice = choice
        self.prior = prior
        self.folds = folds
        self.processes = processes or max(1, cpu_count() // local_size())
        # Another version may predict differently.
        edition = f"{portfolio.EDITION}-scikit-learn-{sklearn.__version__}"
        place = None if cache is None else Path(cache).expanduser() / edition
        self._study = CachedStudy(place)
        self._kept: dict[str, portfolio.Study] = {}
        self._bytes = 0
        if features is not None and self.bn != "running":
            raise ValueError(
                f"bn={self.bn}: algo.features processes rows separately: use bn=running"
            )
        self.net = nn.Identity() if features is None else self._trained(features)
        size = _PERFORMANCES + len(self.learners) * (1 + _TASK_FEATURES) + 1
        # Mean products of the residual's inputs and its target (the last) over training tasks.
        self.register_buffer("moments", torch.zeros(size, size))
        self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        support_y, query_y = batch.support_y, batch.query_y
        held_out, answers, rows = self.studied(batch.support_x, support_y, batch.query_x)
        evidence = self.evidence(held_out, rows, support_y)
        reached = self._correct_and_losses(answers.double(), query_y, support_y)[0]
        target = _contrast(reached.clamp(-_WORST, _WORST).mean(2)) - evidence[..., 0]
        residual = self.residual(evidence)
        scores = self.validated(held_out, support_y) + residual
        mixed = self._answer(scores, held_out, answers, support_y)
        seen = gather_rows(torch.cat([evidence, target[..., None]], 2), progress.share)
        products = torch.einsum("tbi,tbj->ij", seen, seen) / (len(seen) * len(self.learners))
        if not torch.isfinite(products).all():
            raise NonFiniteError("the mean product of inputs and targets", float(products.sum()))
        self.tasks += len(seen)
        self.moments.lerp_(products.to(self.moments), len(seen) / int(self.tasks))
        score = task_metric(self.spec, mixed, query_y).mean()
        return {"loss": (residual - target).square().mean(), self.spec.metric: score}

    @property
    def keeps_support(self) -> bool:
        # scikit-learn's models are not tensors: a prediction trains them again.
        return True

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        return {"support_x": support_x, "support_y": support_y}

    @torch.no_grad()
    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        """Predict as in `Algorithm`; strategies are the base-learners, the embedding the scores.

        Alternatives are `cv_winner`, the best base-learner by cross-validation alone, and
        `committee`, the mean of all.
        """
        support_y = adapted["support_y"]
        held_out, answers, rows = self.studied(adapted["support_x"], support_y, query_x)
        validated = self.validated(held_out, support_y)
        scores = validated + self.residual(self.evidence(held_out, rows, support_y))
        mixed = self._answer(scores, held_out, answers, support_y)
        strategies = {name: answers[:, number] for number, name in enumerate(self.learners)}
        alternatives = {
            "committee": answers.mean(1),
            "cv_winner": _picked(validated, answers),
        }
        outputs = mixed.log() if self.spec.kind == "classification" else mixed
        return Prediction(
            outputs, embedding=scores, strategies=strategies, alternatives=alternatives
        )

    def residual(self, evidence: Tensor) -> Tensor:
        """Return trust times residual (T, B), given the result of `evidence`.

        The residual is the mean of a Bayesian linear regression (Bishop 2006, section 3.3), whose
        variances are in units of the noise. One prior suits all inputs, since they are divided by
        their root mean square in training.
        """
        moments, tasks = self.moments.double(), int(self.tasks)
        scale = moments.diagonal()[:-1].sqrt()
        # An input that has always been zero keeps its prior.
        scale = torch.where(scale > 0.0, scale, 1.0)
        inputs = moments[:-1, :-1] / scale / scale[:, None]
        prior = self.prior * torch.eye(len(scale), dtype=inputs.dtype, device=inputs.device)
        covariance = torch.linalg.inv(prior + tasks * inputs)
        weights = covariance @ (tasks * moments[:-1, -1] / scale)
        flat = evidence / scale
        variance = ((flat @ covariance) * flat).sum(2).mean(1)
        trust = ((covariance * inputs).sum() / variance).clamp(max=1.0)
        residual: Tensor = trust[:, None] * (flat @ weights)
        return residual

    def evidence(self, held_out: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the inputs (T, B, K) of the residual, as differences from the mean of all.

        They are the cross-validation results, and for each base-learner a constant and the
        features of the task.

        Args:
            held_out: (T, B, S, D) out-of-fold predictions of the support rows.
            rows: (T, S, F) support rows.
            labels: (T, S) labels, or (T, S, D) values.
        """
        task = task_features(self.spec.kind, rows, labels)
        task = nn.functional.pad(task, (1, 0), value=1.0)
        names = torch.eye(held_out.shape[1], dtype=task.dtype, device=task.device)
        named = (names[:, :, None] * task[:, None, None]).flatten(2)
        return _contrast(torch.cat([self.performances(held_out, labels), named], 2))

    def validated(self, held_out: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-validation score (T, B): the metric, with ties broken by the loss."""
        # In float64: in float32 rounding would lose the small term of the loss.
        right, losses = self._correct_and_losses(held_out.double(), labels, labels)
        return right.mean(2) - 1e-6 * losses.mean(2)

    def performances(self, held_out: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-validation results (T, B, 5) of each base-learner; see the class.

        Squared error and distance are the two terms of the error of the mean prediction (Krogh and
        Vedelsby 1995).
        """
        held_out = held_out.double()
        right, losses = self._correct_and_losses(held_out, labels, labels)
        classify = self.spec.kind == "classification"
        goal = nn.functional.one_hot(labels, held_out.shape[3]) if classify else labels
        unit = 1.0 if classify else _variance(labels)[..., None, None]
        error, far = (
            ((held_out - other).square() / unit).sum(3).clamp(max=_WORST)
            for other in (goal[:, None], held_out.mean(1, keepdim=True))
        )
        right, losses = right.clamp(min=-_WORST), losses.clamp(max=_WORST)
        means = [part.mean(2) for part in (right, losses, error, far)]
        return torch.stack([*means, losses.std(2)], 2)

    def _answer(self, scores: Tensor, held_out: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
        """Return the chosen or weighted (T, Q, D) of the answers (T, B, Q, D)."""
        if self.choice == "pick":
            return _picked(scores, answers)
        right = self._correct_and_losses(held_out.double(), labels, labels)[0]
        spread = _contrast(right.clamp(min=-_WORST)).square().mean((1, 2), keepdim=True)
        error = (spread[..., 0] / right.shape[2]).sqrt()
        return _mixed(scores / (error + 1e-6), answers)

    def _correct_and_losses(
        self, answers: Tensor, targets: Tensor, support_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return whether answers (T, B, R, D) are correct, and their losses, both (T, B, R).

        A regression has minus the loss in place of correctness, in variances of `support_y`.
        """
        losses = _losses(self.spec.kind, answers, targets)
        if self.spec.kind == "regression":
            losses = losses / _variance(support_y)[:, None]
            return -losses, losses
        # Of several classes that are equally likely each is a share of the answer: the first of
        # them would depend on how the classes are numbered.
        likeliest = (answers == answers.amax(3, keepdim=True)).to(losses)
        shares = likeliest / likeliest.sum(3, keepdim=True)
        return _of_targets(shares, targets), losses

    def studied(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the base-learners on tasks, or take their predictions from the cache.

        Returns:
            (T, B, S, D) out-of-fold predictions of the support, (T, B, Q, D) predictions of the
            queries, and the (T, S, F) support rows that the base-learners used.
        """
        from joblib import Parallel, delayed
        from joblib import hash as digest

        seen, asked = self._seen(support_x), self._seen(query_x)
        ctx = {
            "ways": int(support_y.max()) + 1 if self.spec.kind == "classification" else None,
            "names": self.learners,
            "folds": self.folds,
        }
        # scikit-learn computes in float64.
        arrays = [part.cpu().numpy() for part in (seen.double(), support_y, asked.double())]
        wanted = [
            {"x": x, "y": y, "asked": queries, **ctx} for x, y, queries in zip(*arrays, strict=True)
        ]
        marks = [digest(task) for task in wanted]
        new = [number for number, mark in enumerate(marks) if mark not in self._kept]
        # The run itself handles Ctrl-C, at the end of an update.
        apart = {"n_jobs": self.processes, "initializer": _ignore_interrupts}
        several = len(new) > 1 and self.processes > 1
        parallel = Parallel(**apart) if several else Parallel(1)
        made = parallel(delayed(self._study)(**wanted[number]) for number in new)
        self._kept |= {marks[number]: one for number, one in zip(new, made, strict=True)}
        studies = [self._kept[mark] for mark in marks]
        self._bytes += sum(_size(one) for one in made)
        while self._bytes > _MOST_KEPT:
            self._bytes -= _size(self._kept.pop(next(iter(self._kept))))
        held_out, answers = (
            torch.from_numpy(np.stack(parts)).to(self.device, self.dtype)
            for parts in zip(*studies, strict=True)
        )
        return held_out, answers, seen

    def _seen(self, x: Tensor) -> Tensor:
        """Return the rows (T, R, F) that base-learners use, given rows (T, R, *input_shape)."""
        if isinstance(self.net, nn.Identity):
            return x.flatten(2)
        with torch.no_grad():
            rows = forward(
                self.net, own_parameters(self.net), x.flatten(0, 1), ForwardContext(running=True)
            )
        return rows.reshape(*x.shape[:2], -1)

    def _trained(self, learned: LearnedState) -> nn.Module:
        """Return the network of a finished run, without its head.

        Raises:
            ValueError: The run has other parameters or shapes.
        """
        run, state = learned.run, learned.state
        net = self.build_network(None)
        own = net.state_dict()
        found = {name: state.get(f"net.{name}") for name in own}
        unlike = [n for n, v in found.items() if v is None or v.shape != own[n].shape]
        if unlike:
            raise ValueError(
                f"algo.features={run}: its network does not fit (no {unlike[0]} of this shape): "
                "use its backbone=… and data of its size"
            )
        net.load_state_dict(found)
        for param in net.parameters():
            param.requires_grad_(False)
        return net


def task_features(kind: str, rows: Tensor, labels: Tensor) -> Tensor:
    """Return simple features (T, 7) of tasks, each of order one.

    They are the logarithms of the numbers of rows and of non-constant columns; the mean and the
    largest share of a column's variance between classes (in a regression, its squared correlation
    with the values); the mean squared correlation of columns; their mean absolute skewness; and
    their mean excess kurtosis.

    Args:
        kind: Kind of the tasks, `classification` or `regression`.
        rows: (T, S, F) support rows.
        labels: (T, S) labels, or (T, S, D) values.
    """
    rows = rows.double()
    num_rows = rows.shape[1]
    centered = rows - rows.mean(1, keepdim=True)
    deviation = centered.square().mean(1, keepdim=True).sqrt()
    varies = (deviation > 1e-9).double()
    scaled = centered / torch.where(deviation > 1e-9, deviation, 1.0)
    number = varies.sum((1, 2)).clamp(min=1.0)
    if kind == "classification":
        hot = nn.functional.one_hot(labels).double()
        means = (hot.mT @ scaled) / hot.sum(1).clamp(min=1.0)[..., None]
        between = (hot.mean(1)[..., None] * means.square()).sum(1)
    else:
        values = labels.double() - labels.double().mean(1, keepdim=True)
        unit = values / values.square().mean(1, keepdim=True).sqrt().clamp(min=1e-9)
        between = ((unit.mT @ scaled) / num_rows).square().mean(1)
    # The sum of squared correlations of all pairs of columns, from the S x S matrix of rows.
    pairs = (scaled @ scaled.mT / num_rows).square().sum((1, 2)) - number
    evidence = [
        torch.full_like(number, num_rows).log() / 3.0,
        number.log() / 3.0,
        between.sum(1) / number,
        between.amax(1),
        pairs / (number * (number - 1.0)).clamp(min=1.0),
        scaled.pow(3).mean(1).abs().sum(1) / number,
        ((scaled.pow(4).mean(1) - 3.0) * varies[:, 0]).sum(1) / number / 3.0,
    ]
    return torch.stack(evidence, 1)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _size(study: portfolio.Study) -> int:
    """Return the size in bytes."""
    return study.held_out.nbytes + study.answers.nbytes


def _contrast(values: Tensor) -> Tensor:
    """Return (T, B, …) values as differences from their mean over the base-learners."""
    return values - values.mean(1, keepdim=True)


def _mixed(scores: Tensor, answers: Tensor) -> Tensor:
    """Return the mean (T, Q, D) of answers (T, B, Q, D), weighted by softmax of scores (T, B)."""
    return (scores.softmax(1).to(answers)[:, :, None, None] * answers).sum(1)


def _picked(scores: Tensor, answers: Tensor) -> Tensor:
    """Return those of the answers (T, B, Q, D) that have the greatest score (T, B), (T, Q, D).

    Of scores that are equal but for rounding the first wins, so that the choice does not depend
    on how many tasks are answered together.
    """
    best = scores.amax(1, keepdim=True)
    tied = scores >= best - 100 * torch.finfo(scores.dtype).eps * best.abs()
    numbers = torch.arange(scores.shape[1], device=scores.device)
    first = torch.where(tied, numbers, scores.shape[1] - 1).amin(1)
    return answers[torch.arange(len(answers), device=answers.device), first]


def _losses(kind: str, answers: Tensor, targets: Tensor) -> Tensor:
    """Return the losses (T, B, R): cross-entropy of probabilities, or squared error of values."""
    if kind == "regression":
        return (answers - targets[:, None]).square().mean(3)
    return -_of_targets(answers, targets).log()


def _of_targets(values: Tensor, labels: Tensor) -> Tensor:
    """Return, of values (T, B, R, W) for every class, those of the labels (T, R): (T, B, R)."""
    return values.gather(3, labels[:, None, :, None].expand(*values.shape[:3], 1))[..., 0]


def _variance(values: Tensor) -> Tensor:
    """Return the variance (T, 1) of values (T, S, D)."""
    spread = (values - values.mean(1, keepdim=True)).square().mean((1, 2))
    return spread.clamp(min=1e-12)[:, None]


def _checked(kind: str, learners: Sequence[str] | None) -> list[str]:
    known = portfolio.known(kind)
    if learners is None:
        return known
    for name in learners:
        if name not in known and portfolio.rate(name) is None:
            raise ValueError(
                f"algo.learners: {name} is not a base-learner for {kind}: expected some of "
                f"{', '.join(known)} (any rate)"
            )
    if len(learners) < 2 or len(set(learners)) < len(learners):
        raise ValueError("algo.learners: expected two or more names, each once")
    return list(learners)
