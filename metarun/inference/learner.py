"""The learner of a trained run, with scikit-learn's interface: fit, predict, predict_proba, score.

Shapes: N rows, W ways, D outputs.

>>> learner = metarun.load("outputs/2026-11-21/…")                              # doctest: +SKIP
>>> learner.fit(five_images, ["cat", "dog", "cow", "hen", "pig"])               # doctest: +SKIP
>>> learner.predict(more_images)                                                # doctest: +SKIP
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.common.adapting import AdaptingLearner
from metarun.algorithms.common.features import FeatureLearner
from metarun.backbones.layers.context import ForwardContext
from metarun.config.build import Experiment, build_experiment, recorded_source
from metarun.config.schema import Config
from metarun.config.trust import stored, trusting
from metarun.core import seeding
from metarun.core.types import Adapted, EpisodeSource, Prediction, Record
from metarun.data.recorded import FILE
from metarun.evaluation.test_time_augmentation import adapt, answer
from metarun.runs.folder import RESULTS, RunFolder
from metarun.training.state import load_parameters

Array = npt.NDArray[Any]

_ROWS_AT_ONCE = 250
_NOT_FITTED = "no examples yet: call fit(inputs, targets) first"


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
        ValueError: The folder is not a run, it has no checkpoint yet, it names code of a package
            that is not trusted, or it has no record of its data and these are missing.
    """
    folder = RunFolder.open(run)
    config = _for_one_task(folder.configuration(), device)
    config["bn"] = bn or ("support" if config["bn"] == "transductive" else config["bn"])
    learned = learned_state(folder)
    with trusting(trust.split(",") if isinstance(trust, str) else trust), stored():
        experiment = build_experiment(config, _recorded(folder, config), fresh=False)
    load_parameters(experiment.algorithm, learned, experiment.run_info, folder.path)
    temperature = folder.read_results()["temperature"] if folder.has(RESULTS) else 1.0
    return Learner(experiment.algorithm, experiment.source, experiment.eval.views, temperature)


def restored(folder: RunFolder, config: Config, config_dir: str | None = None) -> Experiment:
    """Build the components of a run, its data included, and load its parameters.

    Args:
        folder: Folder of the run.
        config: Configuration of the run.
        config_dir: Folder of the user's YAML files, which name code of the user's own.

    Raises:
        ValueError: The run has no checkpoint yet, or its data are missing.
    """
    learned = learned_state(folder)
    with stored(config_dir=config_dir):
        experiment = build_experiment(_for_one_task(config, "auto"), fresh=False)
    load_parameters(experiment.algorithm, learned, experiment.run_info, folder.path)
    return experiment


def _for_one_task(config: Config, device: str) -> Config:
    """Return a run's configuration without its settings for batches of tasks."""
    return {
        **config,
        "device": device,
        "engine": "auto",
        "tasks_per_chunk": None,
        "threads": None,
        "graph": "auto",
        # A user's measures are not needed, and their module may be missing.
        "eval": {**config["eval"], "measures": []},
    }


def _recorded(folder: RunFolder, config: Config) -> EpisodeSource | None:
    """Return the data set as the run has recorded it; None if its data are needed."""
    if not folder.has(FILE):
        return None
    return recorded_source(config, folder.read_json(FILE), folder.path / FILE)


def learned_state(folder: RunFolder) -> Record:
    """Return the checkpoint with the parameters of a run.

    Raises:
        ValueError: There is none yet.
    """
    learned = folder.load_learned()
    if learned is None:
        raise ValueError(
            f"{folder.path} has no checkpoint yet: continue it with `metarun resume=RUN` first"
        )
    return learned[1]


class _Adapted(nn.Module):
    """A network whose forward pass has the options of an evaluation."""

    def __init__(self, net: nn.Module, ctx: ForwardContext) -> None:
        super().__init__()
        self.net = net
        self._ctx = ctx

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x, self._ctx)
        return outputs


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
        encoding: How the columns of a table become inputs and targets (`data/encoding.py`), for a
            run on a table; else None.
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
        # How the columns of a table become inputs and targets, where the run's data are a table.
        self.encoding: Any = getattr(source, "encoding", None)
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
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input as the network receives it; (C, H, W) of an image."""
        return self._spec.input_shape

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
                prepared as the run's data were, and so are the columns of a table (a mapping of
                names to sequences, or a data frame); other inputs are arrays of numbers.
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
        return self._in_units(outputs, "restored")

    def predict_spread(self, inputs: Any) -> Array | None:
        """Return the predictive standard deviations of N rows, in the shape of `predict`.

        None if the algorithm has none, and in a classification.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: An input cannot be read.
        """
        if self._spec.kind == "classification":
            return None
        parts = [part.spread for part in self._predictions(inputs)]
        found = [part[0] for part in parts if part is not None]
        return self._in_units(torch.cat(found), "spread") if found else None

    def _in_units(self, outputs: Tensor, how: Literal["restored", "spread"]) -> Array:
        """Return values (N, D) in the units and the shape of the targets of `fit`."""
        values: Array = outputs.cpu().numpy()
        if self.encoding is not None:
            convert = self.encoding.restored if how == "restored" else self.encoding.spread
            values = convert(values.astype(np.float64))
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

    def score(self, inputs: Any, targets: Any) -> float:
        """Return the accuracy of labels (N,) as a fraction, or R² of values (N,) or (N, D).

        As in scikit-learn, R² is 1 for perfect predictions and 0 for the mean of the targets, and
        that of several outputs is their mean.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The numbers of rows differ, or an input cannot be read.
        """
        found, wanted = self.predict(inputs), np.asarray(targets)
        if found.shape != wanted.shape:
            raise ValueError(f"targets have shape {wanted.shape}: expected {found.shape}")
        if self._spec.kind == "classification":
            return float((found == wanted).mean())
        wanted = _numbers("targets", wanted)
        errors = np.square(wanted - found).sum(0)
        spread = np.square(wanted - wanted.mean(0)).sum(0)
        # Constant targets are predicted perfectly, or count as 0.
        shares = np.where(spread > 0.0, errors / np.where(spread > 0.0, spread, 1.0), errors > 0.0)
        return float(1.0 - shares.mean())

    def embed(self, inputs: Any) -> Array:
        """Return the features (N, D) on which a learner such as ProtoNet bases its predictions.

        A map of features is flattened. With statistics of the support (`bn=support`) features
        depend on the examples of `fit`; else no `fit` is needed.

        Raises:
            NotFittedError: `fit` has not been called and is needed.
            ValueError: The algorithm has no features apart from its predictions, or they depend on
                all rows (`bn=transductive`), or an input cannot be read.
        """
        algorithm = self._algorithm
        if not isinstance(algorithm, FeatureLearner) or algorithm.keeps_support:
            name = type(algorithm).__name__
            why = "with bn=transductive" if isinstance(algorithm, FeatureLearner) else ""
            raise ValueError(
                f"this {name} has no features of single rows {why}".rstrip()
                + ": use a learner such as algo=protonet, with bn=support or bn=running"
            )
        if self._adapted is None and self.bn == "support":
            raise NotFittedError(_NOT_FITTED)
        adapted = self._adapted[0] if self._adapted else {}
        found = [
            algorithm.query_features(adapted, part[None])[0].flatten(1)
            for part in self._prepared(inputs).split(_ROWS_AT_ONCE)
        ]
        features: Array = torch.cat(found).detach().cpu().numpy()
        return features

    def rows(self, inputs: Any) -> Array:
        """Return inputs as the network receives them, (N, *input_shape).

        Raises:
            ValueError: An input cannot be read.
        """
        rows: Array = self._prepared(inputs).cpu().numpy()
        return rows

    @property
    def adapted(self) -> Adapted:
        """What the algorithm has learned from the examples: the named tensors of its `adapt`.

        Prototypes, adapted weights or the state of a memory, without the dimension of tasks. With
        several views of each image they are those of the first view, the images themselves.

        Raises:
            NotFittedError: `fit` has not been called.
        """
        if self._adapted is None:
            raise NotFittedError(_NOT_FITTED)
        return {name: tensor[0] for name, tensor in self._adapted[0].items()}

    @property
    def network(self) -> nn.Module:
        """A copy of the network with the weights that `fit` has adapted, as a module of its own.

        It maps rows (N, *input_shape), as `rows` returns them, to logits (N, W) in the order of
        `classes_`, or to values (N, D).

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: The algorithm adapts no weights of a network.
        """
        algorithm, weights = self._algorithm, self.adapted
        net = copy.deepcopy(algorithm.net)
        own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        if not isinstance(algorithm, AdaptingLearner) or not weights.keys() <= own.keys():
            raise ValueError(
                f"{type(algorithm).__name__} adapts no weights of a network: `adapted` has what it "
                "has learned"
            )
        for name, tensor in weights.items():
            # A head that is made for the task may be wider than the one of training.
            own[name].data = tensor.clone()
        return _Adapted(net, algorithm.query_context()).eval()

    def _outputs(self, inputs: Any) -> Tensor:
        """Return logits (N, W) or values (N, D)."""
        outputs = torch.cat([part.outputs[0] for part in self._predictions(inputs)])
        # A learner of streams has outputs for more classes than `fit` has received.
        wider = self._spec.kind == "classification" and self._spec.streams is not None
        return outputs[:, : len(self.classes_)] if wider else outputs

    def _predictions(self, inputs: Any) -> list[Prediction]:
        """Return the predictions of all rows, in parts."""
        if self._adapted is None:
            raise NotFittedError(_NOT_FITTED)
        rows = self._prepared(inputs)
        # Transductive predictions need all rows at once; others are split to bound memory.
        size = len(rows) if self._algorithm.transductive else _ROWS_AT_ONCE
        parts: list[Prediction] = []
        for part in rows.split(max(1, size)):
            with self._seeded():
                parts.append(answer(self._algorithm, self._adapted, part[None]))
        return parts

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
        if self.encoding is not None and (
            isinstance(inputs, Mapping) or hasattr(inputs, "columns")
        ):
            return self._tensor(self.encoding.encode(inputs))
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
        return self._tensor(numbers if self.encoding is None else self.encoding.scaled(numbers))

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
