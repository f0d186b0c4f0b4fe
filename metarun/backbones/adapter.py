"""Any `nn.Module` as a backbone.

Torch's own batch norm and dropout are wrong, or fail, where a gradient is taken inside
`torch.vmap` or `torch.func`. `adapt` turns these layers of a module into ours, in place. Ours need
the context of the forward pass, which such a module does not hand on: they find it in a `_Pass`
that all layers of one module share.

Shapes: N rows, C channels, F features.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metarun.backbones.layers.context import BATCH_STATISTICS, ForwardContext
from metarun.backbones.layers.normalization import BatchNorm, as_channels
from metarun.backbones.network import Network, output_shape
from metarun.core import seeding
from metarun.core.errors import one_line

INTERFACE = (
    "expected a torch.nn.Module with forward(x), whose constructor takes the keys of its YAML, and "
    "input_shape and output_dim (None: features) only if it names them"
)

# The slots below belong to layers that number their masks themselves.
_FIRST_SLOT = 1000

_NORMS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)

_MASKED_DIMS: dict[str, int | None] = {
    "torch.nn.modules.dropout.Dropout": None,
    "torch.nn.modules.dropout.Dropout1d": 2,
    "torch.nn.modules.dropout.Dropout2d": 2,
    "torch.nn.modules.dropout.Dropout3d": 2,
    "torchvision.ops.stochastic_depth.StochasticDepth": 1,
}
"""Number of leading dimensions over which a layer draws its mask; None draws every element."""


class AnyBackbone:
    """Factory of networks with the interface of ours, from the constructor of any module.

    Args:
        target: Dotted name of the constructor, for messages.
        make: Constructor with its options bound, such as `partial(resnet18, num_classes=64)`.
        without: Dotted name of a part of the module to leave out, such as its last layer: inputs
            pass it unchanged. None keeps all.
        key: Key that names the constructor, for messages.
    """

    def __init__(
        self,
        target: str,
        make: functools.partial[Any],
        without: str | None = None,
        key: str = "backbone._target_",
    ) -> None:
        self.func = make.func
        self._make = make
        self._without = without
        self._name = f"{key}={target}"
        self._key_without = "backbone._without_" if "_" in key else "backbone.without"
        self.__signature__ = _signature(make)
        """That of the constructor, from which algorithms read what a backbone takes."""

    def __call__(
        self, *, input_shape: tuple[int, ...], output_dim: int | None, **more: Any
    ) -> nn.Module:
        """Build a network.

        `input_shape` and `output_dim` go to a constructor that takes them. A module that is not
        told its number of outputs computes features, and the linear head is added.

        Args:
            input_shape: Shape of one input.
            output_dim: Number of outputs; None is a network without a head.
            more: Further arguments of the constructor.

        Raises:
            ValueError: The module cannot be built, or its outputs do not fit.
        """
        module, given = self._built({"input_shape": input_shape, "output_dim": output_dim}, more)
        width = self._width(module, input_shape)
        adapt(module)
        net = module
        if output_dim is not None and "output_dim" in given and width != output_dim:
            if "output_dim" in self.__signature__.parameters:
                raise ValueError(
                    f"{self._name} has {width} outputs where output_dim={output_dim}: leave "
                    "output_dim out of its constructor, and a linear head is added"
                )
            # A constructor that swallows any keyword.
            given.remove("output_dim")
        if "output_dim" not in given:
            net = Network(module, input_shape, output_dim)
        elif not hasattr(net, "feature_dim"):
            net.feature_dim = width  # type: ignore[assignment]
        net.foreign_input = tuple(input_shape)  # type: ignore[assignment]
        return net

    def features(self, input_shape: tuple[int, ...]) -> nn.Module:
        """Build the module alone, which computes features; it is not adapted yet.

        Raises:
            ValueError: It cannot be built, or does not take inputs of that shape.
        """
        module, _ = self._built({"input_shape": input_shape, "output_dim": None}, {})
        self._width(module, input_shape)
        return module

    def _width(self, module: nn.Module, input_shape: tuple[int, ...]) -> int:
        """Return the number of outputs, by a pass in which lazy layers take their form."""
        context = [BATCH_STATISTICS] if _takes_ctx(module) else []
        with self._explained(f"in a pass of inputs of shape {list(input_shape)}"):
            return math.prod(output_shape(module, input_shape, *context))

    def _built(self, shape: dict[str, Any], more: dict[str, Any]) -> tuple[nn.Module, set[str]]:
        """Return the module, and those of `input_shape` and `output_dim` that it was given."""
        parameters = self.__signature__.parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        # An option of the same name in the YAML is the user's own value.
        names = {
            name
            for name in shape
            if name not in self._make.keywords and (name in parameters or takes_any)
        }
        while True:
            given = {name: shape[name] for name in names}
            with self._explained(INTERFACE):
                try:
                    module = self._make(**given, **more)
                    break
                except TypeError as error:
                    # **kwargs may go to a function that does not take them, as in torchvision.
                    refused = {n for n in names - parameters.keys() if f"'{n}'" in str(error)}
                    if not refused:
                        raise
            names -= refused
        if not isinstance(module, nn.Module):
            raise ValueError(f"{self._name} returns a {type(module).__name__}: {INTERFACE}")
        if self._without is not None:
            parts = [name for name, _ in module.named_children()]
            if self._without not in dict(module.named_modules()) or not self._without:
                raise ValueError(
                    f"{self._key_without}={self._without}: the module has no such part; its parts "
                    f"are {', '.join(parts)}"
                )
            module.set_submodule(self._without, nn.Identity())
        return module, names

    @contextmanager
    def _explained(self, remark: str) -> Iterator[None]:
        """Turn an exception of the user's code into one line."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self._name}: {one_line(error)}") from error
        except Exception as error:
            raise ValueError(
                f"{self._name}: {type(error).__name__}: {one_line(error)}: {remark}"
            ) from error


def _signature(make: functools.partial[Any]) -> inspect.Signature:
    """Return what a constructor takes; calling it then says what is wrong with its options."""
    for found in (make, make.func):
        try:
            return inspect.signature(found)
        except ValueError:  # Options that it does not take, or one that is built into Python.
            continue
    return inspect.Signature()


def adapt(module: nn.Module) -> nn.Module:
    """Turn torch's batch norm and dropout layers into ours, in place, and return the module.

    Weights, statistics and settings are kept, and the layers stay the same objects under the same
    names. The module then takes a `ForwardContext` as a second argument, which the layers read.
    Its outputs are flattened to (N, F), unless its own `forward` takes the context.
    """
    running, takes_ctx, found = _Pass(), _takes_ctx(module), False
    for name, layer in module.named_modules():
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        if type(layer).forward in _NORMS:
            _AdaptedBatchNorm.take(layer, name, running)
        elif kind in _MASKED_DIMS:
            _AdaptedDropout.take(layer, _MASKED_DIMS[kind], running)
        else:
            continue
        found = True
    if found or not takes_ctx:
        module._running = running  # type: ignore[assignment]
        module.__class__ = _with_context(type(module), takes_ctx)  # type: ignore[arg-type]
    return module


def freeze_in_place(parts: Iterable[nn.Module]) -> None:
    """Freeze parts of a module that is not adapted yet.

    Their parameters do not learn, batch norm normalizes by its running statistics and does not
    move them, and dropout is off.
    """
    for part in parts:
        part.requires_grad_(False)
        for layer in part.modules():
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            if type(layer).forward in _NORMS and getattr(layer, "running_mean", None) is not None:
                layer.__class__ = _FrozenBatchNorm
            elif kind in _MASKED_DIMS:
                layer.p = 0.0  # type: ignore[assignment]


class _FrozenBatchNorm(nn.Module):
    """Batch norm of torch as in evaluation: a fixed scale and shift of each channel."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(self.running_var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.running_mean * scale
        shift = shift if self.bias is None else shift + self.bias
        return x * as_channels(scale, x) + as_channels(shift, x)


class _Pass:
    """The forward pass that is running in one module.

    A copy of the module has its own, so that threads do not share it.

    Attributes:
        ctx: Context of the pass.
        draws: Number of masks drawn so far.
    """

    def __init__(self) -> None:
        self.ctx = BATCH_STATISTICS
        self.draws = 0

    @contextmanager
    def of(self, ctx: ForwardContext) -> Iterator[None]:
        """Hold a context, and nothing of it afterwards."""
        self.ctx, self.draws = ctx, 0
        try:
            yield
        finally:
            self.ctx = BATCH_STATISTICS


@functools.cache
def _with_context(kind: type[nn.Module], takes_ctx: bool) -> type[nn.Module]:
    """Return the subclass of a module's class whose `forward` holds the context."""

    class Adapted(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, ctx: ForwardContext = BATCH_STATISTICS) -> Tensor:
            with self._running.of(ctx):
                outputs: Tensor = super().forward(x, ctx) if takes_ctx else super().forward(x)
            return outputs if takes_ctx else outputs.flatten(1)

    Adapted.__name__, Adapted.__qualname__ = kind.__name__, kind.__qualname__
    Adapted.__module__ = kind.__module__
    return Adapted


class _AdaptedBatchNorm(BatchNorm):
    """Batch norm of torch with our arithmetic: (N, C, …) inputs of any number of dimensions."""

    _running: _Pass
    momentum: float | None
    track_running_stats: bool
    num_batches_tracked: Tensor

    @classmethod
    def take(cls, layer: Any, name: str, running: _Pass) -> None:
        """Turn a layer of torch into this one."""
        layer.__class__ = cls
        layer.name, layer.native, layer._running = name, False, running
        # What torch leaves out has no effect here, and is neither learned nor stored.
        for key in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer, key) is None:
                delattr(layer, key)
                fill = torch.ones if key in ("weight", "running_var") else torch.zeros
                layer.register_buffer(key, fill(layer.num_features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx = self._running.ctx
        if not self.track_running_stats:
            ctx = replace(ctx, running=False, moments=None)
        return super().forward(x, ctx)

    def next_momentum(self) -> float:
        self.num_batches_tracked += 1
        # None is the mean over all updates.
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


class _AdaptedDropout(nn.Module):
    """Dropout of torch, by elements or by channels, and stochastic depth, with explicit masks."""

    _running: _Pass
    _drawn: int | None
    p: float

    @classmethod
    def take(cls, layer: Any, drawn: int | None, running: _Pass) -> None:
        """Turn a layer into this one."""
        layer.__class__ = cls
        layer._drawn = 0 if getattr(layer, "mode", "") == "batch" else drawn
        layer._running = running

    @property
    def drop_rate(self) -> float:
        """Share of the values to drop, under the name that `makes_noise` reads."""
        return self.p

    def forward(self, x: Tensor) -> Tensor:
        noise = self._running.ctx.noise
        if noise is None or self.p == 0.0:
            return x
        # Counted, as one layer may be applied several times in a pass.
        slot = _FIRST_SLOT + self._running.draws
        self._running.draws += 1
        drawn = x.dim() if self._drawn is None else self._drawn
        shape = (*x.shape[:drawn], *(1 for _ in x.shape[drawn:]))
        kept = seeding.uniform(noise, slot, shape) >= self.p
        return x * (kept.to(x.dtype) / max(1.0 - self.p, torch.finfo(x.dtype).tiny))


def _takes_ctx(module: nn.Module) -> bool:
    """Return whether a module's own `forward` takes the context, under any name if required."""
    others = list(inspect.signature(module.forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.name == "ctx" or (p.default is p.empty and p.kind in positional) for p in others)
