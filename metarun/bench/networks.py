"""Networks of the baselines, built from torch's layers, with the parameters of ours.

Shapes: N rows, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metarun.backbones.layers.normalization import BatchNorm
from metarun.bench.workloads import Workload

_SLOPE = 0.1
_RESNET_WIDTHS = (1.0, 2.5, 5.0, 10.0)


def textbook(workload: Workload) -> nn.Module:
    """Return the network of a workload in plain torch; ProtoNet's has no head."""
    outputs = None if workload.method == "protonet" else workload.way
    if workload.backbone == "mlp":
        return nn.Sequential(
            nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
        )
    if workload.backbone == "resnet12":
        return _resnet12(workload)
    return _conv4(workload, outputs)


def resnet_widths(filters: int) -> list[int]:
    """Return the channels of the four blocks; 64 filters give 64, 160, 320, 640."""
    return [int(factor * filters) for factor in _RESNET_WIDTHS]


def paired(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name of each parameter of `ours` with the corresponding parameter of `theirs`."""
    for mine, usual in ((nn.Conv2d, nn.Conv2d), (nn.Linear, nn.Linear), (BatchNorm, _Norm)):
        ours_here = [(n, m) for n, m in ours.named_modules() if isinstance(m, mine)]
        theirs_here = [m for m in theirs.modules() if isinstance(m, usual)]
        for (name, _), module in zip(ours_here, theirs_here, strict=True):
            for own, param in module.named_parameters():
                yield f"{name}.{own}", param


def load(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy the parameters of `ours` into `theirs`."""
    values = dict(ours.named_parameters())
    with torch.no_grad():
        for name, param in paired(ours, theirs):
            param.copy_(values[name])


class _Norm(nn.BatchNorm2d):
    """Batch norm with the statistics of the batch, as in MAML's code."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)


def _conv4(workload: Workload, outputs: int | None) -> nn.Module:
    layers: list[nn.Module] = []
    channels = workload.channels
    for _ in range(4):
        layers += [
            nn.Conv2d(channels, workload.filters, 3, padding=1),
            _Norm(workload.filters),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = workload.filters
    layers.append(nn.Flatten())
    if outputs is not None:
        layers.append(nn.Linear(channels * (workload.image // 16) ** 2, outputs))
    return nn.Sequential(*layers)


def _resnet12(workload: Workload) -> nn.Module:
    widths = resnet_widths(workload.filters)
    before = [workload.channels, *widths]
    blocks = [_Block(before[i], width) for i, width in enumerate(widths)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _Block(nn.Module):
    """Residual block of three convolutions and a shortcut, followed by 2×2 max pooling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, inputs in enumerate((channels, width, width)):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), _Norm(width)]
            layers += [nn.LeakyReLU(_SLOPE)] if i < 2 else []
        self.straight = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), _Norm(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, width, H / 2, W / 2)."""
        out = nn.functional.leaky_relu(self.straight(x) + self.shortcut(x), _SLOPE)
        return nn.functional.max_pool2d(out, 2)
