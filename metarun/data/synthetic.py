"""Regression tasks on families of functions of one variable, generated in batches on the device.

Shapes: T tasks, R = S + Q rows of a task; inputs and values have one dimension.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from metarun.core import seeding
from metarun.core.checks import at_least, pair
from metarun.core.types import EpisodeSize, SourceSetup, Split, TaskBatch, TaskSpec

_SLOT_FIRST, _SLOT_SECOND, _SLOT_X, _SLOT_NOISE, _SLOT_THIRD, _SLOT_FAMILY = range(6)
_JITTER = 1e-10


class FunctionEpisodes(ABC):
    """Regression tasks y = f(x) + noise, with one function per task.

    Args:
        setup: Sizes, seeds, device and precision. A regression has one way.
        x: Range of the inputs.
        noise: Standard deviation of the noise on y.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        x: Sequence[float],
        noise: float,
    ) -> None:
        self._x = pair("data.x", x)
        if self._x[0] == self._x[1]:
            raise ValueError(f"data.x=[{x[0]:g},{x[1]:g}]: all inputs would be the same number")
        at_least("data", 0, noise=noise)
        self._noise = float(noise)
        if setup.val_way not in (None, 1):
            raise ValueError(
                f"eval.val_way={setup.val_way} has no meaning in a regression: leave it out"
            )
        for split, size in setup.sizes.items():
            _check_size(split, size)
        self.sizes = dict(setup.sizes)
        self._seeds = setup.seeds
        self.device = setup.device
        self._dtype = setup.dtype
        self.spec = TaskSpec(kind="regression", input_shape=(1,), output_dim=1, train_way=1)

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return tasks `index … index + num_tasks - 1` of a split."""
        size = self.sizes[split]
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        rows = (size.shot + size.query, 1)
        low, high = self._x
        x = seeding.uniform(keys, _SLOT_X, rows, low=low, high=high, dtype=self._dtype)
        y = self._noisy(self._at(keys, x.double()), keys)
        cut = size.shot
        return TaskBatch(x[:, :cut], y[:, :cut], x[:, cut:], y[:, cut:])

    def parameters(self, split: Split, index: int, num_tasks: int) -> tuple[Tensor, ...]:
        """Return the true (T,) parameters of each task's function, in float64."""
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        return self._parameters(keys)

    def _noisy(self, y: Tensor, keys: Tensor) -> Tensor:
        """Add the noise of each key to its values and convert them to the data's precision."""
        # float64 until here, so that a task has the same rounded values on every device.
        if self._noise:
            shape = y.shape[keys.dim() :]
            y = y + self._noise * seeding.normal(keys, _SLOT_NOISE, shape, dtype=torch.float64)
        return y.to(self._dtype)

    def fingerprint(self) -> str:
        """Return a hash of the family, its ranges and the seed of its test tasks."""
        parts = (*self._facts(), *self._x, self._noise, self._seeds["test"])
        return f"{seeding.key(type(self).__name__, *map(repr, parts)) & (2**64 - 1):016x}"

    @property
    def inputs(self) -> tuple[float, float]:
        """Range of the inputs."""
        return self._x

    @abstractmethod
    def _facts(self) -> tuple[float, ...]:
        """Return the numbers that define the family, for the fingerprint."""

    @abstractmethod
    def _parameters(self, keys: Tensor) -> tuple[Tensor, ...]:
        """Draw the parameters of each key's function; they have the shape of `keys`."""

    @abstractmethod
    def _at(self, keys: Tensor, x: Tensor) -> Tensor:
        """Return f(x) of each key's (T,) function at inputs (T, R, 1), in float64."""


class Formulas(FunctionEpisodes):
    """Functions given by a formula with a few parameters, such as amplitude and phase.

    Attributes:
        parameter_names: Names of the tensors that `parameters` returns.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ()

    def truth(self, split: Split, index: int, x: Tensor) -> Tensor:
        """Return the noise-free values of one task's function at inputs (R, 1), in float64."""
        keys = seeding.task_keys(self._seeds[split], split, index, 1, self.device)
        return self._at(keys, x[None].double())[0]

    def _at(self, keys: Tensor, x: Tensor) -> Tensor:
        return self._values([parameter[:, None, None] for parameter in self._parameters(keys)], x)

    @abstractmethod
    def _values(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return f(x); the parameters broadcast against x."""


class Sinusoid(Formulas):
    """Sinusoids y = A sin(omega x - phi), as in Finn et al. (2017), section 5.1.

    Args:
        amplitude: Range of A.
        frequency: Range of omega; [0.8, 1.2] in Li et al. (2017), 1 elsewhere.
        phase: Range of phi.
        x: Range of the inputs.
        noise: Standard deviation of the noise on y.
    """

    parameter_names = ("amplitude", "phase", "frequency")

    def __init__(
        self,
        setup: SourceSetup,
        *,
        amplitude: Sequence[float] = (0.1, 5.0),
        frequency: Sequence[float] = (1.0, 1.0),
        phase: Sequence[float] = (0.0, math.pi),
        x: Sequence[float] = (-5.0, 5.0),
        noise: float = 0.0,
    ) -> None:
        super().__init__(setup, x=x, noise=noise)
        self._amplitude = pair("data.amplitude", amplitude)
        self._frequency = pair("data.frequency", frequency)
        self._phase = pair("data.phase", phase)

    def _facts(self) -> tuple[float, ...]:
        # A frequency of 1 is omitted, so that the fingerprints of older runs stay valid.
        frequency = () if self._frequency == (1.0, 1.0) else self._frequency
        return (*self._amplitude, *self._phase, *frequency)

    def _parameters(self, keys: Tensor) -> tuple[Tensor, ...]:
        return (
            draw_in(keys, _SLOT_FIRST, self._amplitude),
            draw_in(keys, _SLOT_SECOND, self._phase),
            draw_in(keys, _SLOT_THIRD, self._frequency),
        )

    def _values(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        amplitude, phase, frequency = parameters
        return amplitude * torch.sin(frequency * x - phase)


class Linear(Formulas):
    """Lines y = a x + b.

    Args:
        a: Range of the slope.
        b: Range of the offset.
        x: Range of the inputs.
        noise: Standard deviation of the noise on y.
    """

    parameter_names = ("slope", "offset")

    def __init__(
        self,
        setup: SourceSetup,
        *,
        a: Sequence[float] = (0.0, 1.0),
        b: Sequence[float] = (0.0, 1.0),
        x: Sequence[float] = (0.0, 1.0),
        noise: float = 0.0,
    ) -> None:
        super().__init__(setup, x=x, noise=noise)
        self._a = pair("data.a", a)
        self._b = pair("data.b", b)

    def _facts(self) -> tuple[float, ...]:
        return (*self._a, *self._b)

    def _parameters(self, keys: Tensor) -> tuple[Tensor, ...]:
        return draw_in(keys, _SLOT_FIRST, self._a), draw_in(keys, _SLOT_SECOND, self._b)

    def _values(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        slope, offset = parameters
        return slope * x + offset


class GaussianProcess(FunctionEpisodes):
    """Samples of a Gaussian process with mean 0 and covariance s^2 exp(-(x - x')^2 / (2 l^2)).

    The regression of Garnelo et al. (2018), section 4.1, with the parameters of its official
    code. The last bit of a value may differ between devices, because Cholesky factors do.

    Args:
        lengthscale: Range of l, which is drawn for each task.
        scale: Range of s, which is drawn for each task.
        x: Range of the inputs.
        noise: Standard deviation of the noise on y.

    Raises:
        ValueError: A range is not valid or not positive.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        lengthscale: Sequence[float] = (0.4, 0.4),
        scale: Sequence[float] = (1.0, 1.0),
        x: Sequence[float] = (-2.0, 2.0),
        noise: float = 0.02,
    ) -> None:
        super().__init__(setup, x=x, noise=noise)
        self._lengthscale = pair("data.lengthscale", lengthscale)
        self._scale = pair("data.scale", scale)
        for name, (low, high) in (("lengthscale", self._lengthscale), ("scale", self._scale)):
            if low <= 0.0:
                raise ValueError(f"data.{name}=[{low:g},{high:g}]: expected two positive numbers")

    def _facts(self) -> tuple[float, ...]:
        return (*self._lengthscale, *self._scale)

    def _parameters(self, keys: Tensor) -> tuple[Tensor, ...]:
        return (
            draw_in(keys, _SLOT_FIRST, self._lengthscale),
            draw_in(keys, _SLOT_SECOND, self._scale),
        )

    def _at(self, keys: Tensor, x: Tensor) -> Tensor:
        lengthscale, scale = (parameter[:, None, None] for parameter in self._parameters(keys))
        covariance = (-0.5 * ((x - x.mT) / lengthscale).square()).exp()
        # Without jitter, nearly equal inputs make the matrix numerically singular.
        covariance += _JITTER * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        white = seeding.normal(keys, _SLOT_THIRD, x.shape[1:], dtype=torch.float64)
        root: Tensor = torch.linalg.cholesky(covariance)
        return scale * (root @ white)


_Numbers = tuple[Tensor, Tensor, Tensor]


def _wave(keys: Tensor) -> _Numbers:
    amplitude = draw_in(keys, _SLOT_FIRST, (0.1, 5.0))
    frequency = draw_in(keys, _SLOT_SECOND, (0.5, 2.0))
    return amplitude, frequency, draw_in(keys, _SLOT_THIRD, (0.0, 2.0 * math.pi))


def _three(keys: Tensor) -> _Numbers:
    one, other, third = (
        draw_in(keys, slot, (-3.0, 3.0)) for slot in (_SLOT_FIRST, _SLOT_SECOND, _SLOT_THIRD)
    )
    return one, other, third


def _parabola(keys: Tensor) -> _Numbers:
    curvature, offset, center = _three(keys)
    steepness = 0.02 + 0.13 * curvature.abs() / 3.0
    return steepness.copysign(curvature), offset, center


@dataclass(frozen=True, slots=True)
class _Family:
    """Family of functions with three parameters.

    Attributes:
        draw: Function that draws the three parameters of each key.
        values: Function of the three parameters and x.
    """

    draw: Callable[[Tensor], _Numbers]
    values: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


_FAMILIES = {
    "sinusoid": _Family(_wave, lambda a, omega, phi, x: a * torch.sin(omega * x + phi)),
    "line": _Family(_three, lambda a, b, _, x: a * x + b),
    "quadratic": _Family(_parabola, lambda a, b, c, x: a * (x - c).square() + b),
    "sawtooth": _Family(
        _wave,
        lambda a, omega, phi, x: a * (2.0 * ((omega * x + phi) / (2.0 * math.pi) % 1.0) - 1.0),
    ),
    "tanh": _Family(_three, lambda a, b, c, x: a * torch.tanh(x - c) + b),
}


class Multimodal(Formulas):
    """Functions of several families, one of which is drawn for each task.

    This is the regression benchmark for mixtures of initializations (Vuorio et al. 2019, section
    5.1; Jerfel et al. 2019, section 5.1), with Vuorio's ranges: `sinusoid` A sin(omega x + phi),
    `line` a x + b, `quadratic` a (x - c)^2 + b with |a| in [0.02, 0.15], and `tanh`
    a tanh(x - c) + b. `sawtooth` is A (2 t - 1) with t the fractional part of
    (omega x + phi) / (2 pi); it has the sinusoid's ranges.

    `TaskBatch.class_ids` (T, 1) holds the index of a task's family in `families`. It is the ground
    truth for a mixture's clusters, and no learner reads it.

    Args:
        families: Names of the families, which are equally likely.
        x: Range of the inputs.
        noise: Standard deviation of the noise on y.

    Raises:
        ValueError: A family is unknown, or is named twice.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        families: Sequence[str] = ("sinusoid", "line", "quadratic", "sawtooth", "tanh"),
        x: Sequence[float] = (-5.0, 5.0),
        noise: float = 0.3,
    ) -> None:
        super().__init__(setup, x=x, noise=noise)
        for family in families:
            if family not in _FAMILIES:
                raise ValueError(
                    f"data.families: {family} is unknown, expected some of {', '.join(_FAMILIES)}"
                )
        if not families or len(set(families)) < len(families):
            raise ValueError("data.families: expected one or more names, each once")
        self.families = tuple(families)

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return tasks `index … index + num_tasks - 1` of a split, with their families."""
        tasks = super().batch(split, index, num_tasks)
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        family = self._family(keys)
        return replace(tasks, class_ids=family[:, None])

    def _family(self, keys: Tensor) -> Tensor:
        """Draw the index of each key's family."""
        return seeding.integers(keys, _SLOT_FAMILY, len(self.families))

    def _facts(self) -> tuple[float, ...]:
        return tuple(list(_FAMILIES).index(family) for family in self.families)

    def _parameters(self, keys: Tensor) -> tuple[Tensor, ...]:
        """Return the index of each key's family and the three parameters of its function."""
        family = self._family(keys)
        numbers = [torch.zeros_like(family, dtype=torch.float64)] * 3
        for number, name in enumerate(self.families):
            drawn = _FAMILIES[name].draw(keys)
            numbers = [
                torch.where(family == number, own, others)
                for own, others in zip(drawn, numbers, strict=True)
            ]
        return family.double(), *numbers

    def _values(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        family, *numbers = parameters
        values = torch.zeros_like(x)
        for number, name in enumerate(self.families):
            own = _FAMILIES[name].values(numbers[0], numbers[1], numbers[2], x)
            values = torch.where(family == number, own, values)
        return values


def draw_in(keys: Tensor, slot: int, bounds: tuple[float, float]) -> Tensor:
    """Draw one number per key, uniformly from a range, in float64."""
    return seeding.uniform(keys, slot, low=bounds[0], high=bounds[1], dtype=torch.float64)


def _check_size(split: Split, size: EpisodeSize) -> None:
    if size.way != 1:
        key = "train.way" if split == "train" else "way"
        raise ValueError(f"{key}={size.way} has no meaning in a regression: leave it at 1")
    group = "train" if split == "train" else ""
    at_least(group, 1, shot=size.shot)
    at_least(group, 0 if split == "train" else 1, query=size.query)
