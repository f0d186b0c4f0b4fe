"""The networks of torchvision for images by their names, with or without their weights."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from metarun.backbones.layers.image_input import Interpolation
from metarun.backbones.module import Freeze, Module
from metarun.core.errors import one_line
from metarun.core.types import BackboneSetup
from metarun.core.weights import SUFFIXES, load_into, read_weights

_SEVERAL_OUTPUTS = ("googlenet", "inception_v3")
"""Networks with further outputs in training."""
_OLD_NAMES = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
"""Names in torchvision's files of DenseNets, which its constructor changes."""


class Torchvision(Module):
    """A network of torchvision without its classifier, with its own preprocessing.

    With torchvision's own weights, images are resized, cut and normalized as these weights expect;
    without, they keep their size and the normalization of their data set. See `Module` for the
    options that are not listed.

    Args:
        input_shape: (C, H, W).
        output_dim: Number of outputs of the head; None omits the head and returns the features.
        setup: What a run gives to its backbone.
        name: Name of the network, as in `torchvision.models.list_models()`.
        weights: None (random), `DEFAULT` or another name of torchvision's weights, or a file.
        options: Further keywords of its constructor.

    Attributes:
        resolved_options: The preprocessing, for the record of the run.

    Raises:
        ValueError: There is no such network, its weights cannot be had or do not fit, or an option
            is out of range.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_dim: int | None,
        setup: BackboneSetup = BackboneSetup(),  # noqa: B008
        *,
        name: str = "resnet18",
        weights: str | None = None,
        options: Mapping[str, Any] | None = None,
        freeze: Freeze = None,
        input_size: int | None = None,
        crop: float | None = None,
        interpolation: Interpolation | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        _check_name(name)
        known = models.get_model_weights(name)
        entry = known[weights] if weights in known.__members__ else None
        file = None if weights is None or entry else Path(weights).expanduser()
        if file and setup.fresh and not file.exists() and file.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"backbone.weights={weights}: expected null, {', '.join(known.__members__)}, or a "
                f"file *{' or *'.join(SUFFIXES)}"
            )
        own = {
            "input_size": input_size,
            "crop": crop,
            "interpolation": interpolation,
            "mean": mean,
            "std": std,
        }
        if entry is not None:
            own = {**own, **{k: v for k, v in _preprocessing(entry).items() if own[k] is None}}
        super().__init__(
            input_shape,
            output_dim,
            setup,
            target=_maker(name),
            options=options,
            freeze=freeze,
            channels=3,
            **own,  # type: ignore[arg-type]
        )
        self.resolved_options = own
        if weights is not None and setup.fresh:
            key = f"backbone.weights={weights}"
            found = read_weights(key, file) if file else _fetched(key, entry)
            layer = self.body.classifier_layer
            load_into(
                self.body,
                {
                    _OLD_NAMES.sub(r"\1\2", n): value
                    for n, value in found.items()
                    if not n.endswith((f"{layer}.weight", f"{layer}.bias"))
                },
                key,
                strict=True,
            )


def _check_name(name: str) -> None:
    names = [n for n in models.list_models(module=models) if n not in _SEVERAL_OUTPUTS]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]}?" if near else f"expected one such as {', '.join(names[:5])}"
        )
        raise ValueError(
            f"backbone.name={name}: torchvision has no such network for images: {hint}"
        )


def _maker(name: str) -> Callable[..., nn.Module]:
    """Return a function that makes a network without its classifier."""

    def make(**options: Any) -> nn.Module:
        net: nn.Module = models.get_model(name, weights=None, **options)
        layer = _classifier(net)
        net.set_submodule(layer, nn.Identity())
        net.classifier_layer = layer  # type: ignore[assignment]
        return net

    make.__module__, make.__qualname__ = "torchvision.models", name
    return make


def _classifier(net: nn.Module) -> str:
    """Return the name of the layer that computes the classes: the last one that is linear."""
    linear = [name for name, part in net.named_modules() if isinstance(part, nn.Linear)]
    # SqueezeNet's is a convolution.
    return linear[-1] if linear else "classifier.1"


def _preprocessing(entry: models.WeightsEnum) -> dict[str, Any]:
    """Return what torchvision does to images for some weights, as options of `Module`."""
    preset = entry.transforms()
    return {
        "input_size": preset.crop_size[0],
        "crop": preset.crop_size[0] / preset.resize_size[0],
        "interpolation": preset.interpolation.value,
        "mean": list(preset.mean),
        "std": list(preset.std),
    }


def _fetched(key: str, entry: models.WeightsEnum) -> dict[str, Tensor]:
    """Return torchvision's weights, from the folder of torch.hub or by a download into it."""
    try:
        found: dict[str, Tensor] = entry.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
        )
    # A download may fail in any way, and a file may be anything.
    except Exception as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
        raise ValueError(
            f"{key}: {entry.url} cannot be had ({one_line(error)}): put that file at {file}, or "
            "type backbone.weights=FILE"
        ) from error
    return found
