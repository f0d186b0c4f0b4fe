"""A network, or a classifier adapted to a support set, as a file that needs no metarun.

Formats: `safetensors` has the encoder's weights alone. `torch` is a program of `torch.export`, for
which torch suffices. `onnx` needs an ONNX runtime alone. Each is read back and compared before
anything is written.

Shapes: N rows, F features, W ways, D outputs of a regression.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

import metarun
from metarun.algorithms.base import Algorithm
from metarun.algorithms.common.features import FeatureLearner
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.network import Network
from metarun.config.schema import Config
from metarun.core.errors import one_line
from metarun.core.types import Adapted
from metarun.core.weights import load_into
from metarun.evaluation.test_time_augmentation import answer
from metarun.inference.learner import Learner

Format = Literal["safetensors", "torch", "onnx"]
SUFFIXES: dict[Format, str] = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}
"""Ending of the name of a file of each format."""

TOLERANCE = 1e-5
"""Largest difference between the answers of a file and those of metarun: absolute up to 1, and
relative beyond."""

_PACKAGES: dict[str, tuple[str, ...]] = {
    "safetensors": ("safetensors",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
}
_PROBES = 4
_LONGEST = 200


@dataclass(frozen=True)
class Exported:
    """A file in memory that was read back and compared.

    Attributes:
        data: Content of the file.
        outputs: What it computes: `features`, `probabilities` or `values`.
        shape: Shape of one input.
        batch: Whether it takes any number of rows; otherwise one.
        difference: Largest difference to metarun's answers.
        versions: Versions of the packages that have written it.
    """

    data: bytes
    outputs: str
    shape: tuple[int, ...]
    batch: bool
    difference: float
    versions: Mapping[str, str]


def check_packages(kind: str) -> None:
    """Check that the packages that a format needs are installed.

    Raises:
        ValueError: They are not.
    """
    missing = [name for name in _PACKAGES.get(kind, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format {kind} needs {', '.join(missing)}: type pip install 'metarun[{kind}]'"
        )


def export_encoder(learner: Learner, kind: Format, config: Config) -> Exported:
    """Return the encoder of a learner: rows (N, …) to features (N, F).

    It normalizes by running statistics, as with `bn=running`.

    Args:
        learner: The learner, of `metarun.load(RUN, bn="running")`.
        kind: Format of the file.
        config: Configuration of the run, which a file of weights describes.

    Raises:
        ValueError: The learner has no network, it cannot be exported, or the file answers
            otherwise than metarun.
    """
    algorithm = learner._algorithm
    if isinstance(algorithm, FeatureLearner):
        program: _Program = _Features(learner)
    else:
        program = _Body(learner)
    if kind != "safetensors":
        return _exported(program, program.probes(), kind, "features")
    return _weights(program, config)


def export_classifier(learner: Learner, kind: Format, support: Tensor) -> Exported:
    """Return a fitted learner as one function: rows (N, …) to probabilities (N, W), or values.

    Args:
        learner: The learner, after `fit`.
        kind: Format of the file.
        support: Support rows, as `learner.rows` returns them; some of them are compared.

    Raises:
        ValueError: Weights alone are no function, predictions depend on other rows, it cannot be
            exported, or the file answers otherwise than `predict_proba`.
    """
    if kind == "safetensors":
        raise ValueError(
            "--format safetensors holds weights and no function: use torch or onnx with --support"
        )
    if learner.transductive:
        raise ValueError("predictions depend on all rows together: use bn=support or bn=running")
    program = _Answers(learner)
    rows = support.to(program.algorithm.dtype)
    probes = torch.cat([program.probes(), program.as_pixels(rows)[:_PROBES]])
    outputs = "probabilities" if learner._spec.kind == "classification" else "values"
    return _exported(program, probes, kind, outputs)


# What is exported.


class _Program(nn.Module):
    """A function of rows (N, *shape): images in [0, 1], which it normalizes, or other inputs."""

    mean: Tensor
    std: Tensor

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = [learner]
        self.algorithm = _for_tracing(learner._algorithm)
        moments = getattr(getattr(learner._source, "preparation", None), "moments", None)
        like = self.algorithm.dtype
        mean, std = ((0.0,), (1.0,)) if moments is None else moments
        per_channel = (-1, 1, 1) if moments is not None else (-1,)
        self.register_buffer("mean", torch.tensor(list(mean), dtype=like).view(per_channel))
        self.register_buffer("std", torch.tensor(list(std), dtype=like).view(per_channel))

    def probes(self) -> Tensor:
        """Return random rows to compare answers on."""
        draw = torch.Generator().manual_seed(0)
        shape = (_PROBES, *self.learner[0].input_shape)
        return torch.rand(shape, generator=draw, dtype=self.algorithm.dtype)

    def as_pixels(self, rows: Tensor) -> Tensor:
        """Return normalized rows as this function takes them."""
        return rows * self.std + self.mean

    def forward(self, inputs: Tensor) -> Tensor:
        with _Constants():
            return self.compute((inputs - self.mean) / self.std)

    def compute(self, rows: Tensor) -> Tensor:
        """Return what is exported, from normalized rows."""
        raise NotImplementedError

    def expected(self, inputs: Tensor) -> Tensor:
        """Return metarun's own answers."""
        raise NotImplementedError


class _Answers(_Program):
    scale: Tensor
    shift: Tensor

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner)
        assert learner._adapted is not None
        self.adapted: list[Adapted] = [
            {name: tensor.detach() for name, tensor in view.items()} for view in learner._adapted
        ]
        self.temperature = learner._temperature
        self.outputs = learner._spec.output_dim
        if hasattr(learner, "classes_"):
            self.outputs = len(learner.classes_)
        scale, shift = np.ones(self.outputs), np.zeros(self.outputs)
        if learner.encoding is not None and not hasattr(learner, "classes_"):
            # The units of the targets, which the learner sees standardized.
            shift = learner.encoding.restored(shift)
            scale = learner.encoding.restored(scale) - shift
        self.register_buffer("scale", torch.from_numpy(scale).to(self.algorithm.dtype))
        self.register_buffer("shift", torch.from_numpy(shift).to(self.algorithm.dtype))

    def compute(self, rows: Tensor) -> Tensor:
        found = answer(self.algorithm, self.adapted, rows[None]).outputs[0][:, : self.outputs]
        if self.algorithm.spec.kind != "classification":
            return found * self.scale + self.shift
        return (found / self.temperature).softmax(1)

    def expected(self, inputs: Tensor) -> Tensor:
        learner, rows = self.learner[0], (inputs - self.mean) / self.std
        classifies = self.algorithm.spec.kind == "classification"
        given = rows if hasattr(learner._source, "prepare") else rows.numpy()
        found = (learner.predict_proba if classifies else learner.predict)(given)
        return torch.from_numpy(np.asarray(found, dtype=np.float64)).view(len(rows), -1)


class _Features(_Program):
    def compute(self, rows: Tensor) -> Tensor:
        assert isinstance(self.algorithm, FeatureLearner)
        return self.algorithm.query_features({}, rows[None])[0].flatten(1)

    def expected(self, inputs: Tensor) -> Tensor:
        learner, rows = self.learner[0], (inputs - self.mean) / self.std
        given = rows if hasattr(learner._source, "prepare") else rows.numpy()
        return torch.from_numpy(learner.embed(given))


class _Body(_Program):
    """The body of the network of a learner whose predictions are no function of features."""

    def compute(self, rows: Tensor) -> Tensor:
        net = _network(self.algorithm)
        ctx = ForwardContext(running=True)
        found: Tensor = net.features(rows, ctx) if isinstance(net, Network) else net(rows, ctx)
        return found.flatten(1)

    def expected(self, inputs: Tensor) -> Tensor:
        net, ctx = _network(self.learner[0]._algorithm), ForwardContext(running=True)
        rows = (inputs - self.mean) / self.std
        with torch.no_grad():
            found: Tensor = net.features(rows, ctx) if isinstance(net, Network) else net(rows, ctx)
        return found.flatten(1)


def _network(algorithm: Algorithm) -> nn.Module:
    """Return the first network of a learner that its backbone has made."""
    for part in algorithm.modules():
        if isinstance(part, Network) or hasattr(part, "foreign_input"):
            return part
    raise ValueError(f"this {type(algorithm).__name__} has no network of a backbone to export")


# How it is traced.


def _for_tracing(algorithm: Algorithm) -> Algorithm:
    """Return a copy of a learner that runs one task at a time, without fast paths by size."""
    made = copy.deepcopy(algorithm).eval().requires_grad_(False)
    for part in made.modules():
        if isinstance(part, Algorithm):
            part.engine = _OneTask()  # type: ignore[assignment]
        if hasattr(part, "native"):
            part.native = False  # type: ignore[assignment]
    return made


class _OneTask:
    """In place of an `Engine`: calls the function of a task on a batch of one task."""

    kind = "loop"
    graph = "none"

    def resolved(self, *_: Any) -> _OneTask:
        """Return itself."""
        return self

    def map(
        self,
        function: Callable[..., Any],
        net: nn.Module,
        params: dict[str, Tensor],
        rows: tuple[Tensor, ...],
    ) -> Any:
        """See `Engine.map`."""
        found = function(net, params, *(tensor[0] for tensor in rows))
        return pytree.tree_map(lambda tensor: tensor[None], found)


class _Constants(TorchFunctionMode):
    """Computes at once what does not depend on the inputs, such as the number of classes.

    Tensors that depend on them are fakes while a program is traced; all others are plain.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, given)) if isinstance(x, Tensor)]
        if tensors and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
            with _disable_current_modes():
                return func(*args, **given)
        return func(*args, **given)


def _exported(program: _Program, probes: Tensor, kind: Format, outputs: str) -> Exported:
    """Trace a program, write it in a format, read that back and compare."""
    name = type(program.algorithm).__name__
    program = program.cpu().eval()
    with _quiet(), torch.no_grad():
        try:
            traced, batch = _traced(program, probes)
            data = _as_torch(traced) if kind == "torch" else _as_onnx(traced, outputs)
            run = _run_torch(data) if kind == "torch" else _run_onnx(data)
            parts = [probes] if batch else probes.split(1)
            found = torch.cat([run(part) for part in parts])
        # Exporters raise exceptions of any kind.
        except Exception as error:
            text = one_line(error)[:_LONGEST]
            raise ValueError(f"this {name} cannot be exported as {kind}: {text}") from error
    difference = _difference(found, program.expected(probes))
    packages = ("torch", *_PACKAGES.get(kind, ()))
    return Exported(data, outputs, tuple(probes.shape[1:]), batch, difference, _versions(packages))


def _traced(program: nn.Module, probes: Tensor) -> tuple[Any, bool]:
    """Return the program, and whether it takes any number of rows; some learners take one."""
    size = torch.export.Dim("N", min=1)
    try:
        options: Any = {"dynamic_shapes": ({0: size},), "strict": False}
        return torch.export.export(program, (probes,), **options), True
    except Exception:  # A learner may depend on the number of rows; it is traced for one then.
        return torch.export.export(program, (probes[:1],), strict=False), False


def _as_torch(traced: Any) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(traced, buffer)
    return buffer.getvalue()


def _run_torch(data: bytes) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = torch.export.load(io.BytesIO(data)).module()
    return module


def _as_onnx(traced: Any, outputs: str) -> bytes:
    names: Any = {"input_names": ["inputs"], "output_names": [outputs]}
    program: Any = torch.onnx.export(traced, dynamo=True, verbose=False, **names)
    found: bytes = program.model_proto.SerializeToString()
    return found


def _run_onnx(data: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda rows: torch.from_numpy(session.run(None, {given.name: rows.numpy()})[0])


def _weights(program: _Program, config: Config) -> Exported:
    """Return the weights of the encoder alone, after loading them into an empty network."""
    from safetensors.torch import load, save

    net = _network(program.algorithm)
    encoder = net.body if isinstance(net, Network) else net
    # Copies, since a file holds no two tensors that share their memory.
    state = {
        name: t.detach().cpu().clone().contiguous() for name, t in encoder.state_dict().items()
    }
    if not state:
        raise ValueError("the backbone of this run has no weights to export")
    described = {
        "metarun": metarun.__version__,
        "backbone": json.dumps(config["backbone"]),
        "names": json.dumps(config["names"]),
        "input_shape": json.dumps(program.learner[0].input_shape),
    }
    data = save(state, metadata=described)
    probes = program.probes()
    with torch.no_grad():
        for tensor in encoder.state_dict().values():
            tensor.zero_()
        load_into(encoder, load(data), "the exported file", strict=True)
        found = program(probes)
    difference = _difference(found, program.expected(probes))
    versions = _versions(("torch", "safetensors"))
    return Exported(data, "features", tuple(probes.shape[1:]), True, difference, versions)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of answers.

    Raises:
        ValueError: It is more than the tolerance.
    """
    size = max(1.0, float(expected.abs().max()))
    difference = float((found.double().cpu() - expected.double().cpu()).abs().max()) / size
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the exported answers differ from metarun's by {difference:.1g}, more than "
            f"{TOLERANCE:g}: nothing was written; try another --format"
        )
    return difference


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    from importlib.metadata import version

    return {"metarun": metarun.__version__, **{name: version(name) for name in packages}}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what exporters print and log; their errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    hidden = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(hidden),
            contextlib.redirect_stderr(hidden),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
