"""ResNet-18, WRN-28-10 and ViT against torchvision's networks and a naive implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import LayerNorm
from metarun.backbones.resnet18 import ResNet18
from metarun.backbones.vit import ViT
from metarun.backbones.wrn28_10 import WRN28x10

RUNNING = ForwardContext(running=True)


def noisy(net: nn.Module) -> nn.Module:
    """A network with every parameter and statistic at a value of its own."""
    draw = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            drawn = torch.rand(value.shape, generator=draw)
            scale = 0.5 if name.endswith("running_var") else 0.05
            value.add_(drawn if name.endswith("running_var") else drawn - 0.5, alpha=scale)
    return net.double()


def images(channels: int = 3, side: int = 64) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(4, channels, side, side, generator=draw, dtype=torch.float64)


def test_resnet18_is_torchvisions_with_its_own_parameters() -> None:
    theirs = torchvision.models.resnet18(weights=None)
    theirs.fc = nn.Identity()
    noisy(theirs)
    ours = ResNet18((3, 64, 64), None, stem="imagenet").double()
    state = {n: v for n, v in theirs.state_dict().items() if not n.endswith("batches_tracked")}
    ours.body.load_state_dict(state, strict=True)
    x = images()
    torch.testing.assert_close(ours(x, RUNNING), theirs.eval()(x))
    torch.testing.assert_close(ours(x), theirs.train()(x))


def test_the_small_stem_keeps_the_size_of_an_image_and_the_number_of_features() -> None:
    net = ResNet18((1, 28, 28), 5, stem="small")
    body = 11_176_512 - 3 * 49 * 64 + 9 * 64
    assert sum(p.numel() for p in net.parameters()) == body + 512 * 5 + 5
    assert net.feature_dim == 512


def naive_wrn(x: Tensor, p: dict[str, Tensor], blocks: int) -> Tensor:
    """The paper's network of pre-activation blocks in evaluation, line by line."""

    def bn_relu(name: str, x: Tensor) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return nn.functional.batch_norm(x, *(p[f"{name}.{k}"] for k in keys)).relu()

    x = nn.functional.conv2d(x, p["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for i in range(blocks):
            at = f"block{group}.layer.{i}"
            stride = 2 if group > 1 and i == 0 else 1
            active = bn_relu(f"{at}.bn1", x)
            out = nn.functional.conv2d(active, p[f"{at}.conv1.weight"], stride=stride, padding=1)
            out = bn_relu(f"{at}.bn2", out)
            out = nn.functional.conv2d(out, p[f"{at}.conv2.weight"], padding=1)
            if f"{at}.convShortcut.weight" in p:
                x = nn.functional.conv2d(active, p[f"{at}.convShortcut.weight"], stride=stride)
            x = x + out
    return bn_relu("bn1", x).mean((2, 3))


def test_a_wide_residual_network_is_the_naive_one() -> None:
    net = noisy(WRN28x10((3, 16, 16), None, width=2, blocks=2))
    x = images(side=16)
    torch.testing.assert_close(net(x, RUNNING), naive_wrn(x, net.body.state_dict(), 2))


def test_wrn_28_10_has_the_papers_36_5_million_parameters() -> None:
    groups = 0
    for ins, outs in ((16, 160), (160, 320), (320, 640)):
        first = 9 * (ins * outs + outs * outs) + ins * outs + 2 * (ins + outs)
        groups += first + 3 * (2 * 9 * outs * outs + 4 * outs)
    net = WRN28x10((3, 32, 32), 10)
    expected = 3 * 9 * 16 + groups + 2 * 640 + 640 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == expected
    assert round(expected / 1e6, 1) == 36.5


def test_the_vision_transformer_is_torchvisions_with_its_own_parameters() -> None:
    theirs = torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=20
    )
    theirs.heads = nn.Identity()
    noisy(theirs)
    ours = ViT((3, 16, 16), None, patch=4, width=12, depth=2, heads=3, hidden=20).double()
    ours.body.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(images(side=16)), theirs.eval()(images(side=16)))


def test_layer_norm_is_torchs() -> None:
    ours, theirs = LayerNorm(8).double(), nn.LayerNorm(8, eps=1e-6).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    noisy(theirs)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_dropout_of_a_transformer_keeps_the_mean_and_needs_a_key() -> None:
    net = ViT((1, 8, 8), None, width=8, depth=1, heads=2, hidden=8, drop_rate=0.5)
    x = images(1, 8).float()
    assert torch.equal(net(x), net(x))
    drawn = [net(x, ForwardContext(noise=torch.tensor(key))) for key in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ResNet18, {"widths": [4, 8]}, r"backbone\.widths=\[4, 8\]: expected four positive widths"),
        (WRN28x10, {"drop_rate": 1.0}, r"backbone\.drop_rate=1\.0: expected a number in \[0, 1\)"),
        (ViT, {"patch": 5}, "backbone.patch=5 does not divide images of 8x8 pixels"),
        (ViT, {"width": 10, "heads": 4}, "backbone.width=10: expected a multiple of"),
    ],
)
def test_settings_out_of_range_are_refused(
    make: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make((1, 8, 8), None, **options)


def test_functional_calls_change_no_state() -> None:
    net = ViT((1, 8, 8), 2, width=8, depth=1, heads=2, hidden=8)
    zero = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    x = images(1, 8).float()
    before = net(x)
    assert functional_call(net, zero, (x,)).abs().sum() == 0.0
    assert torch.equal(net(x), before)
