"""Base-learners, and their predictions on one task: out of fold on the support, and on queries.

They are scikit-learn's, except the nearest centroid and the small networks, of which all folds
and rates train together. Every function is a pure function of one task as arrays, so it can run
in any process and its result can be cached on disk.

Shapes: S support rows, Q query rows, R rows, F features, W ways, D outputs (W probabilities, or
the values of a regression), B learners.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EDITION = 1
"""Version of the cache on disk; increase it when the predictions of any learner change."""
_FLOOR = 1e-3
"""Smallest probability of a class: a tree gives 0 to classes that it has not seen."""
_HIDDEN = 32
_STEPS = 50
_MOMENTUM = 0.9
_RATES = {"classification": (0.01, 0.1, 0.5), "regression": (0.01, 0.03, 0.1)}
_FARTHEST = 10.0
"""Largest prediction of a network, in standard deviations of its targets.

A network that diverges still gives a finite prediction.
"""


class Study(NamedTuple):
    """Predictions of the learners on a task.

    Attributes:
        held_out: (B, S, D) predictions of each support row by a learner trained on other folds.
        answers: (B, Q, D) predictions of the query rows by learners trained on the whole support.
    """

    held_out: Array
    answers: Array


def known(kind: str) -> list[str]:
    """Return the names of the learners for a kind of task.

    The name of a network ends with its learning rate.
    """
    return [*_MAKERS[kind], *(f"mlp_{rate}" for rate in _RATES[kind])]


def rate(name: str) -> float | None:
    """Return the learning rate in the name of a network, `mlp_RATE`; None for other names."""
    if not name.startswith("mlp_"):
        return None
    try:
        value = float(name.removeprefix("mlp_"))
    except ValueError:
        return None
    return value if 0.0 < value < np.inf else None


def study(
    x: Array, y: NDArray[Any], asked: Array, *, ways: int | None, names: Sequence[str], folds: int
) -> Study:
    """Run every learner on a task, and return their predictions.

    Predictions do not depend on the order of the support rows or on the numbers of the classes:
    rows are sorted, and classes are numbered in the order of the sorted rows, before any fit.
    Only for equal rows of different classes does their order matter. Features are standardized
    by the mean and the standard deviation of the training rows of each fit.

    Args:
        x: (S, F) support rows.
        y: (S,) labels, or (S, D) values.
        asked: (Q, F) query rows.
        ways: Number of classes W; None for regression.
        names: Names of the learners.
        folds: Folds of the cross-validation, at most the rows of the smallest class.

    Raises:
        ValueError: A class or a regression has only one row, so that no row can be held out.
    """
    # Equal rows of a regression are sorted by their values.
    last = () if ways is not None else tuple(y.reshape(len(y), -1).T)
    order = np.lexsort((*last, *x.T[::-1]))
    x, y = x[order], y[order]
    if ways is None:
        targets = y.astype(np.float64).reshape(len(y), -1)
        numbers = np.zeros(0, dtype=np.int64)
    else:
        _, first = np.unique(y, return_index=True)
        # Classes without support rows come last.
        seen = y[np.sort(first)]
        numbers = np.concatenate([seen, np.setdiff1d(np.arange(ways), seen)])
        y = np.argsort(numbers)[y]
        targets = np.eye(ways)[y]
    parts = _folds(y if ways is not None else None, len(y), folds)
    trains = [np.flatnonzero(parts != fold) for fold in range(parts.max() + 1)]
    trains.append(np.arange(len(x)))
    everything = np.concatenate([x, asked])
    scaled = np.stack([_scaled(everything, rows) for rows in trains])
    makers = _MAKERS["regression" if ways is None else "classification"]
    outputs = np.empty((len(names), len(trains), len(everything), targets.shape[1]))
    from threadpoolctl import threadpool_limits

    # With tables this small several threads are slower, ten times so if cores are busy.
    with warnings.catch_warnings(), threadpool_limits(1), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for number, name in enumerate(names):
            if name in makers:
                for fold, rows in enumerate(trains):
                    learned, goal = scaled[fold, rows], targets[rows]
                    # From equal rows only the mean of the targets can be learned.
                    outputs[number, fold] = (
                        makers[name](learned, goal, scaled[fold]) if learned.any() else goal.mean(0)
                    )
        networks = [number for number, name in enumerate(names) if name not in makers]
        if networks:
            rates = np.array([rate(names[number]) for number in networks], dtype=np.float64)
            outputs[networks] = _networks(scaled, targets, trains, rates, classify=ways is not None)
    if ways is not None:
        outputs = np.maximum(outputs, _FLOOR)
        outputs /= outputs.sum(-1, keepdims=True)
    held_out = outputs[:, parts, np.arange(len(x))]
    answers = outputs[:, -1, len(x) :]
    back = np.argsort(order)
    columns = slice(None) if ways is None else np.argsort(numbers)
    return Study(held_out[:, back][..., columns], answers[..., columns])


def _folds(labels: NDArray[Any] | None, rows: int, folds: int) -> NDArray[np.int64]:
    """Return the fold (S,) of each row, such that each fold has an even share of each class."""
    classes = (
        [np.arange(rows)]
        if labels is None
        else [np.flatnonzero(labels == label) for label in np.unique(labels)]
    )
    fewest = min(len(own) for own in classes)
    if fewest < 2:
        raise ValueError("cross-validation needs two rows of each class: use shot=2 or more")
    folds = min(folds, fewest)
    parts = np.empty(rows, dtype=np.int64)
    # In turn, also from one class to the next, so that folds have the same size.
    parts[np.concatenate(classes)] = np.arange(rows) % folds
    return parts


def _scaled(x: Array, rows: NDArray[np.int64]) -> Array:
    mean, deviation = x[rows].mean(0), x[rows].std(0)
    centered: Array = x - mean
    return centered / np.where(deviation > 1e-12, deviation, 1.0)


Maker = Callable[[Array, Array, Array], Array]


def _classifier(make: Callable[[int], Any]) -> Maker:
    """Return a learner that gives the probabilities of a scikit-learn classifier.

    Args:
        make: Function from the number of training rows to the classifier.
    """

    def run(x: Array, targets: Array, asked: Array) -> Array:
        model = make(len(x)).fit(x, targets.argmax(1))
        probabilities = np.zeros((len(asked), targets.shape[1]))
        probabilities[:, model.classes_] = model.predict_proba(asked)
        return probabilities

    return run


def _regressor(make: Callable[[int], Any]) -> Maker:
    """Return a learner that gives the predictions of a scikit-learn regressor.

    Args:
        make: Function from the number of training rows to the regressor.
    """

    def run(x: Array, targets: Array, asked: Array) -> Array:
        values = make(len(x)).fit(x, targets).predict(asked)
        return np.asarray(values, dtype=np.float64).reshape(len(asked), -1)

    return run


def _centroid(x: Array, targets: Array, asked: Array) -> Array:
    """Return class probabilities under normal distributions about the class means.

    They share one variance for all directions. scikit-learn's nearest centroid is not used: it
    fails if a class has one row.
    """
    counts = targets.sum(0)
    means = (targets.T @ x) / np.maximum(counts, 1.0)[:, None]
    within = ((x - targets @ means) ** 2).mean()
    far = ((asked[:, None] - means) ** 2).sum(2) / (2.0 * (within if within > 1e-6 else 1.0))
    return _softmax(np.where(counts > 0, -far, -np.inf))


def _knn(rows: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(5, rows), weights="distance")


def _knn_values(rows: int) -> Any:
    from sklearn.neighbors import KNeighborsRegressor

    return KNeighborsRegressor(min(5, rows), weights="distance")


def _ridge(rows: int) -> Any:
    from sklearn.linear_model import Ridge

    return Ridge(alpha=0.1 * rows)


def _logistic(rows: int) -> Any:  # noqa: ARG001
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression()


def _bayes(rows: int) -> Any:  # noqa: ARG001
    from sklearn.naive_bayes import GaussianNB

    return GaussianNB(var_smoothing=1e-2)


def _tree(rows: int) -> Any:  # noqa: ARG001
    from sklearn.tree import DecisionTreeClassifier

    return DecisionTreeClassifier(random_state=0)


def _tree_values(rows: int) -> Any:  # noqa: ARG001
    from sklearn.tree import DecisionTreeRegressor

    return DecisionTreeRegressor(random_state=0, min_samples_leaf=2)


def _mean(rows: int) -> Any:  # noqa: ARG001
    from sklearn.dummy import DummyRegressor

    return DummyRegressor()


_MAKERS: dict[str, dict[str, Maker]] = {
    "classification": {
        "centroid": _centroid,
        "knn": _classifier(_knn),
        # Least squares on labels of 0 and 1, which estimates their probabilities.
        "ridge": _regressor(_ridge),
        "logistic": _classifier(_logistic),
        "bayes": _classifier(_bayes),
        "tree": _classifier(_tree),
    },
    "regression": {
        "mean": _regressor(_mean),
        "knn": _regressor(_knn_values),
        "ridge": _regressor(_ridge),
        "tree": _regressor(_tree_values),
    },
}


def _networks(
    x: Array,
    targets: Array,
    trains: Sequence[NDArray[np.int64]],
    rates: Array,
    *,
    classify: bool,
) -> Array:
    """Train networks with one hidden layer, one for each rate and fold, and return predictions.

    All start from the same weights and take a fixed number of steps.

    Args:
        x: (folds, R, F) rows as each fold scales them, those of the support first.
        targets: (S, D) targets of the support rows.
        trains: Training rows of each fold.
        rates: Learning rates of gradient descent with momentum.
        classify: Whether the loss is cross-entropy; otherwise it is the squared error on
            standardized targets.

    Returns:
        (rates, folds, R, D) probabilities, or values.
    """
    shares = np.zeros((len(trains), len(targets), 1))
    for share, rows in zip(shares, trains, strict=True):
        share[rows] = 1.0 / len(rows)
    mean = np.zeros((len(trains), 1, targets.shape[1]))
    spread = np.ones_like(mean)
    if not classify:
        mean = (shares * targets).sum(1, keepdims=True)
        spread = np.sqrt((shares * (targets - mean) ** 2).sum(1, keepdims=True))
        spread = np.where(spread > 1e-12, spread, 1.0)
    goal = (targets - mean) / spread
    features, outputs = x.shape[2], targets.shape[1]
    draws = np.random.default_rng(0)
    start = [
        draws.standard_normal((features, _HIDDEN)) / np.sqrt(features),
        np.zeros((1, _HIDDEN)),
        # An untrained network predicts equal probabilities.
        np.zeros((_HIDDEN, outputs)),
        np.zeros((1, outputs)),
    ]
    shape = (len(rates), len(trains))
    weights = [np.broadcast_to(part, (*shape, *part.shape)).copy() for part in start]
    speeds = [np.zeros_like(part) for part in weights]
    seen = x[:, : len(targets)]
    for _ in range(_STEPS):
        hidden, raw = _forward(weights, seen)
        error = shares * (_softmax(raw) - goal if classify else raw - goal)
        back = (error @ weights[2].swapaxes(-1, -2)) * (1.0 - hidden**2)
        slopes = [
            seen.swapaxes(-1, -2) @ back,
            back.sum(-2, keepdims=True),
            hidden.swapaxes(-1, -2) @ error,
            error.sum(-2, keepdims=True),
        ]
        for weight, speed, slope in zip(weights, speeds, slopes, strict=True):
            speed *= _MOMENTUM
            speed += slope
            weight -= rates[:, None, None, None] * speed
    raw = _forward(weights, x)[1]
    if classify:
        return _softmax(raw)
    near: Array = np.clip(np.nan_to_num(raw), -_FARTHEST, _FARTHEST) * spread + mean
    return near


def _forward(weights: Sequence[Array], x: Array) -> tuple[Array, Array]:
    hidden = np.tanh(x @ weights[0] + weights[1])
    return hidden, hidden @ weights[2] + weights[3]


def _softmax(raw: Array) -> Array:
    powers = np.exp(raw - raw.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares
