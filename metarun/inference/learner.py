"""The learner of a trained run, with scikit-learn's interface: fit, predict, predict_proba.

Shapes: N rows, W ways, D outputs.

>>> learner = metarun.load("outputs/2026-11-21/…")                              # doctest: +SKIP
>>> learner.fit(five_images, ["cat", "dog", "cow", "hen", "pig"])               # doctest: +SKIP
>>> learner.predict(more_images)                                                # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.config.build import Experiment, build_experiment
from metarun.config.schema import Config
from metarun.config.trust import stored, trusting
from metarun.core import seeding
from metarun.core.types import Adapted, EpisodeSource
from metarun.evaluation.test_time_augmentation import adapt, answer
from metarun.runs.folder import RESULTS, RunFolder
from metarun.training.state import load_parameters

Array = npt.NDArray[Any]

_ROWS_AT_ONCE = 250


class NotFittedError(ValueError, AttributeError):
    """`predict` was called before `fit`."""


def load(
    run: str | Path,
    *,
    bn: str | None = None,
    device: str = "auto",
    trust: str | Sequence[str] = (),
) -> Learner:
    """Load the learner of a run, with its best parameters on meta-val, else its latest ones.

    Args:
        run: Folder of the run.
        bn: Source of batch-norm statistics: `support`, `running` or `transductive` (all rows of
            one `predict` together). None takes the run's own setting, except that
            `transductive` becomes `support`, so that predictions do not depend on other rows.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust: Packages outside metarun that the run may import, such as that of your algorithm.

    Raises:
        ValueError: The folder is not a run, it has no checkpoint yet, its data are missing, or it
            names code of a package that is not trusted.
    """
    folder = RunFolder.open(run)
    config = folder.configuration()
    config["bn"] = bn or ("support" if config["bn"] == "transductive" else config["bn"])
    with trusting(trust.split(",") if isinstance(trust, str) else trust):
        experiment = restored(folder, config, device)
    temperature = folder.read_results()["temperature"] if folder.has(RESULTS) else 1.0
    return Learner(experiment.algorithm, experiment.source, experiment.eval.views, temperature)


def restored(
    folder: RunFolder, config: Config, device: str = "auto", config_dir: str | None = None
) -> Experiment:
    """Build the components of a run and load its parameters, on any device.

    Args:
        folder: Folder of the run.
        config: Configuration of the run.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        config_dir: Folder of the user's YAML files, which name code of the user's own.

    Raises:
        ValueError: The run has no checkpoint yet, or its data are missing.
    """
    # The run's settings for batches of tasks do not apply to a single task.
    how = {
        "device": device,
        "engine": "auto",
        "tasks_per_chunk": None,
        "threads": None,
        "graph": "auto",
        # A user's measures are not needed, and their module may be missing.
        "eval": {**config["eval"], "measures": []},
    }
    learned = folder.load_learned()
    if learned is None:
        raise ValueError(
            f"{folder.path} has no checkpoint yet: continue it with `metarun resume=RUN` first"
        )
    with stored(config_dir=config_dir):
        experiment = build_experiment({**config, **how})
    load_parameters(experiment.algorithm, learned[1], experiment.run_info, folder.path)
    return experiment


class Learner:
    """Adapts to one task from a few examples and predicts for new inputs.

    Args:
        algorithm: The meta-trained algorithm.
        source: The data set of the run, which determines how inputs are prepared.
        views: Number of views of each image over which predictions are averaged.
        temperature: Divisor of the logits in `predict_proba`; see `eval.temperature`.

    Attributes:
        classes_: (W,) sorted labels of the task, in the order of the columns of
            `predict_proba`; set by `fit`, missing in regression.
    """

    classes_: Array

    def __init__(
        self,
        algorithm: Algorithm,
        source: EpisodeSource,
        views: int = 1,
        temperature: float = 1.0,
    ) -> None:
        self._temperature = temperature
        self._algorithm = algorithm.eval()
        self._views = views
        self._source = source
        self._spec = source.spec
        self._adapted: list[Adapted] | None = None
        self._examples = 0
        self._flat_targets = False

    def __repr__(self) -> str:
        name = type(self._algorithm).__name__
        state = "not fitted" if self._adapted is None else f"{self._examples} examples"
        return f"Learner({name}, {self._spec.kind}, {state})"

    @property
    def labels_images(self) -> bool:
        """Whether inputs are images and predictions are labels."""
        return self._spec.kind == "classification" and hasattr(self._source, "prepare")

    @property
    def bn(self) -> str:
        """Source of batch-norm statistics; `none` without batch norm."""
        return self._algorithm.bn_statistics

    @property
    def transductive(self) -> bool:
        """Whether a prediction depends on the other rows of one `predict`."""
        return self._algorithm.transductive

    def fit(self, inputs: Any, targets: Any) -> Learner:
        """Adapt to the examples of one task, in place of those of an earlier `fit`.

        What was adapted is kept, so that `predict` passes only new rows through the network.
        Examples are shuffled if the learner depends on their order.

        Args:
            inputs: N rows. Images (a list of arrays, PIL images or paths, or one array) are
                prepared as the run's data were; other inputs are arrays of numbers.
            targets: N labels of one type, or (N,) or (N, D) values.

        Returns:
            The learner itself.

        Raises:
            ValueError: The numbers of rows differ, an input cannot be read, or the algorithm
                does not accept the number of classes.
        """
        rows = self._prepared(inputs)
        values = np.asarray(targets)
        if values.ndim == 0 or len(values) != len(rows):
            count = "one target" if values.ndim == 0 else f"{len(values)} targets"
            raise ValueError(f"fit got {len(rows)} inputs and {count}: expected one for each input")
        if self._spec.kind == "classification":
            classes, labels = self._labels(values)
            self.classes_ = classes
            wanted = torch.from_numpy(labels).to(self._source.device)
        else:
            wanted = self._values(values)
            self._flat_targets = values.ndim == 1
        if not self._algorithm.capabilities.order_free and self._spec.streams is None:
            # Training used rows in random order, but users' examples are often sorted by class.
            draw = torch.Generator().manual_seed(0)
            order = torch.randperm(len(rows), generator=draw).to(self._source.device)
            rows, wanted = rows[order], wanted[order]
        with self._seeded():
            self._adapted = adapt(self._algorithm, rows[None], wanted[None], self._views)
        self._examples = len(rows)
        return self

    def predict(self, inputs: Any) -> Array:
        """Predict N rows: (N,) labels, or values (N,) or (N, D) in the shape given to `fit`.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: An input cannot be read.
        """
        outputs = self._outputs(inputs)
        if self._spec.kind == "classification":
            labels: Array = self.classes_[outputs.argmax(1).cpu().numpy()]
            return labels
        values: Array = outputs.cpu().numpy()
        return values[:, 0] if self._flat_targets else values

    def predict_proba(self, inputs: Any) -> Array:
        """Return the probabilities (N, W) of the classes, in the order of `classes_`.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The task is a regression, or an input cannot be read.
        """
        if self._spec.kind != "classification":
            raise ValueError("a regression has no class probabilities: use predict")
        logits = self._outputs(inputs).double() / self._temperature
        probabilities: Array = logits.softmax(1).cpu().numpy()
        return probabilities

    def _outputs(self, inputs: Any) -> Tensor:
        """Return logits (N, W) or values (N, D)."""
        if self._adapted is None:
            raise NotFittedError("no examples yet: call fit(inputs, targets) first")
        rows = self._prepared(inputs)
        # Transductive predictions need all rows at once; others are split to bound memory.
        size = len(rows) if self._algorithm.transductive else _ROWS_AT_ONCE
        parts: list[Tensor] = []
        for part in rows.split(max(1, size)):
            with self._seeded():
                parts.append(answer(self._algorithm, self._adapted, part[None]).outputs[0])
        outputs = torch.cat(parts)
        # A learner of streams has outputs for more classes than `fit` has received.
        wider = self._spec.kind == "classification" and self._spec.streams is not None
        return outputs[:, : len(self.classes_)] if wider else outputs

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Compute without gradients and with torch's generators seeded, and restore these."""
        device = self._source.device
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            seeding.seed_torch(0)
            yield

    def _prepared(self, inputs: Any) -> Tensor:
        """Return the inputs (N, *input_shape) on the device."""
        prepare = getattr(self._source, "prepare", None)
        if prepare is not None:
            return cast("Tensor", prepare(inputs))
        shape = self._spec.input_shape
        values = _numbers("inputs", inputs)
        if shape == (1,) and values.ndim == 1:
            values = values[:, None]
        if values.ndim != 1 + len(shape) or values.shape[1:] != shape:
            expected = ", ".join(map(str, ("N", *shape)))
            raise ValueError(f"inputs have shape {values.shape}: expected ({expected})")
        return self._tensor(values)

    def _labels(self, values: Array) -> tuple[Array, Array]:
        """Return the sorted classes and the index of each label among them."""
        if values.ndim != 1:
            raise ValueError(f"labels have shape {values.shape}: expected (N,), one for each input")
        try:
            classes, labels = np.unique(values, return_inverse=True)
        except TypeError:
            raise ValueError("labels cannot be sorted: expected one type, such as str") from None
        ways = self._spec.output_dim
        if len(classes) < 2:
            raise ValueError(f"fit got examples of {len(classes)} class: expected 2 or more")
        if len(classes) != ways and not self._algorithm.capabilities.accepts_any_way:
            name = type(self._algorithm).__name__
            raise ValueError(
                f"fit got {len(classes)} classes, but this {name} was trained on {ways} ways: "
                f"give {ways} classes, train with way={len(classes)}, or use algo=protonet"
            )
        if self._spec.streams is not None and len(classes) > ways:
            raise ValueError(
                f"fit got {len(classes)} classes: expected at most {ways}, its outputs"
            )
        return classes, labels.astype(np.int64)

    def _values(self, values: Array) -> Tensor:
        numbers = _numbers("targets", values)
        if numbers.ndim == 1:
            numbers = numbers[:, None]
        if numbers.ndim != 2 or numbers.shape[1] != self._spec.output_dim:
            raise ValueError(
                f"targets have shape {values.shape}: expected (N, {self._spec.output_dim})"
            )
        return self._tensor(numbers)

    def _tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self._source.device, self._algorithm.dtype)


def _numbers(name: str, values: Sequence[Any] | Array) -> Array:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} are not numbers: expected an array of numbers") from None
    if numbers.ndim == 0 or len(numbers) == 0:
        raise ValueError(f"{name} are empty: expected one row or more")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} contain values that are not finite: remove NaN and infinity")
    return numbers
