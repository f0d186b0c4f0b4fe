"""Any `nn.Module` as a backbone by its name: `backbone=module backbone.target=my_package.Net`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from metarun.backbones.adapter import AnyBackbone, adapt, freeze_in_place
from metarun.backbones.layers.image_input import ImageInput, Interpolation
from metarun.backbones.network import Network
from metarun.core.checks import positive
from metarun.core.types import BackboneSetup

Freeze = Literal["all", "body"] | int | None

_PRETRAINED: dict[str, Any] = {"weights": None, "pretrained": False}
"""Options by which torchvision's and timm's constructors load weights, and how they do not."""


class Module(Network):
    """A network that some function or class makes, with a linear head.

    Args:
        input_shape: Shape of one input.
        output_dim: Number of outputs of the head; None omits the head and returns the features.
        setup: What a run gives to its backbone.
        target: Class or function that makes the network.
        options: Keywords of the target.
        without: Part of the network to leave out, such as its last layer; None keeps all.
        freeze: What does not learn: `all` (also the head), the `body`, the first N parts of the
            body that have parameters, or None. Batch norm of these parts keeps its running
            statistics, and dropout is off.
        input_size: Side in pixels to which images are resized; None leaves their size.
        crop: Share of each side that is kept, in the center, when images are resized.
        interpolation: How images are resized.
        channels: Channels to which images of one channel are repeated; None leaves them.
        mean, std: Moments of each channel, in [0, 1] units, by which images are normalized; None
            leaves them as the data set has normalized them.

    Raises:
        ValueError: There is no target, it makes no network or one that does not fit, or an option
            is out of range.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_dim: int | None,
        setup: BackboneSetup = BackboneSetup(),  # noqa: B008
        *,
        target: Callable[..., nn.Module] | None = None,
        options: Mapping[str, Any] | None = None,
        without: str | None = None,
        freeze: Freeze = None,
        input_size: int | None = None,
        crop: float | None = None,
        interpolation: Interpolation | None = None,
        channels: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if target is None:
            raise ValueError(
                "backbone.target=null: expected the class or function that makes the network, "
                "such as backbone.target=my_package.Net"
            )
        given = dict(options or {})
        if not setup.fresh:
            # A checkpoint has the parameters, also where the weights cannot be had.
            given |= {key: value for key, value in _PRETRAINED.items() if key in given}
        name = f"{target.__module__}.{target.__qualname__}"
        front = ImageInput(
            input_shape,
            size=input_size,
            crop=1.0 if crop is None else crop,
            interpolation=interpolation or "bilinear",
            channels=channels,
            data=setup.moments,
            own=_moments(mean, std),
        )
        make = AnyBackbone(name, functools.partial(target, **given), without, key="backbone.target")
        body = make.features(front.shape)
        if freeze is not None:
            freeze_in_place(_parts(body, freeze))
        super().__init__(adapt(body), input_shape, output_dim, front if front.changes else None)
        if freeze == "all" and self.head is not None:
            self.head.requires_grad_(False)
        self.foreign_input = tuple(input_shape)


def _moments(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]] | None:
    if (mean is None) != (std is None):
        raise ValueError("backbone.mean and backbone.std go together: set both or neither")
    if mean is None or std is None:
        return None
    if len(mean) != len(std) or not mean:
        raise ValueError(
            f"backbone.mean={list(mean)}, backbone.std={list(std)}: expected one number for each "
            "channel"
        )
    for value in std:
        positive("backbone", std=value)
    return mean, std


def _parts(body: nn.Module, freeze: Freeze) -> list[nn.Module]:
    """Return the parts of a network to freeze."""
    if not isinstance(freeze, int):
        return [body]
    named = {n: part for n, part in body.named_children() if any(True for _ in part.parameters())}
    if not 1 <= freeze <= len(named):
        raise ValueError(
            f"backbone.freeze={freeze}: expected all, body, or 1 to {len(named)}: the parts are "
            f"{', '.join(named)}"
        )
    return list(named.values())[:freeze]
