"""Batch norm and masks against torch's own, and under vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metarun.algorithms.outer_optimizer import update_running_statistics
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.conv_block import conv_and_norm
from metarun.backbones.layers.convolution import conv2d_for_double_backward
from metarun.backbones.layers.dropout import drop_blocks
from metarun.backbones.layers.modulation import FiLM
from metarun.backbones.layers.normalization import BatchNorm, InstanceNorm
from metarun.backbones.layers.pooling import halved, halved_ceil


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_batch_statistics_are_those_of_torch(images: Tensor) -> None:
    ours, theirs = BatchNorm(4, "norm").double(), nn.BatchNorm2d(4).double()
    torch.testing.assert_close(ours(images, ForwardContext()), theirs(images))


def test_running_statistics_move_and_normalize_as_in_torch(images: Tensor) -> None:
    ours, theirs = BatchNorm(4, "norm").double(), nn.BatchNorm2d(4).double()
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    ours(images, ForwardContext(moments=moments))
    update_running_statistics(ours, {name: (m[None], v[None]) for name, (m, v) in moments.items()})
    theirs(images)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours(images, ForwardContext(running=True)), theirs.eval()(images))


def test_statistics_of_the_first_rows_do_not_see_the_others(images: Tensor) -> None:
    norm = BatchNorm(4, "norm").double()
    changed = images.clone()
    changed[4] += 7.0
    torch.testing.assert_close(
        norm(images, ForwardContext(rows=4))[:4],
        norm(changed, ForwardContext(rows=4))[:4],
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        norm(images, ForwardContext(rows=4))[:4], norm(images[:4], ForwardContext())
    )


@pytest.mark.parametrize(
    "ctx", [ForwardContext(), ForwardContext(rows=4), ForwardContext(running=True)], ids=str
)
def test_what_is_pooled_before_it_is_normalized_is_as_if_it_were_pooled_after(
    ctx: ForwardContext, images: Tensor
) -> None:
    norm = BatchNorm(4, "norm").double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.5, 0.0, -2.0]))
        norm.bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        norm.running_mean.copy_(torch.tensor([0.2, -0.1, 0.0, 0.5]))
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    expected = nn.functional.max_pool2d(norm(images, ctx), 2)
    torch.testing.assert_close(
        norm.pooled(images * sign.view(-1, 1, 1), ctx, sign, halved), expected
    )


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "of images": {"in_channels": 2, "out_channels": 20, "kernel_size": 3, "padding": 1},
    "with strides": {"in_channels": 2, "out_channels": 20, "kernel_size": (3, 2), "stride": 2},
    "of pixels": {"in_channels": 3, "out_channels": 4, "kernel_size": 1, "bias": False},
    "of maps": {"in_channels": 5, "out_channels": 4, "kernel_size": 3, "padding": 1},
}


POOLINGS = {"none": None, "floor": halved, "ceil": halved_ceil}


def own_tensors(name: str) -> tuple[nn.Conv2d, BatchNorm, list[Tensor]]:
    torch.manual_seed(0)
    conv = nn.Conv2d(**CONVOLUTIONS[name]).double()
    norm = BatchNorm(conv.out_channels, "norm").double()
    for own in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(own)
    return conv, norm, [*conv.parameters(), *norm.parameters()]


def pulled_twice(outputs: Tensor, own: list[Tensor]) -> list[Tensor]:
    """Return first derivatives of a nonlinear function of the outputs, and their derivatives."""
    first = torch.autograd.grad(outputs.sin().sum(), own, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), own)
    return [*first, *second]


@pytest.mark.parametrize(("native", "width"), [(False, 7), (True, 7), (True, 8)])
@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@pytest.mark.parametrize("pool", POOLINGS)
@pytest.mark.parametrize(
    "ctx", [{}, {"double_backward": True}, {"rows": 7}, {"running": True}], ids=str
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_norm_are_those_of_torch_to_second_order(
    name: str, ctx: dict[str, Any], pool: str, eps: float, native: bool, width: int
) -> None:
    conv, norm, own = own_tensors(name)
    norm.native, norm.eps = native, eps
    x = torch.randn(17, conv.in_channels, 8, width).double()
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    found = conv_and_norm(
        conv, norm, x, ForwardContext(**ctx, moments=moments), pool=POOLINGS[pool]
    )

    maps = conv(x)
    seen = maps[: ctx.get("rows", 17)]
    mean, var = seen.mean((0, 2, 3)), seen.var((0, 2, 3), unbiased=False)
    if "running" in ctx:
        mean, var = norm.running_mean, norm.running_var
    else:
        torch.testing.assert_close(moments["norm"][0], mean)
        torch.testing.assert_close(moments["norm"][1], seen.var((0, 2, 3)))
    scale = norm.weight / (var + eps).sqrt()
    expected = ((maps.movedim(1, 3) - mean) * scale + norm.bias).movedim(3, 1)
    if pool != "none":
        expected = nn.functional.max_pool2d(expected, 2, ceil_mode=pool == "ceil")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(pulled_twice(found, own), pulled_twice(expected, own))


@pytest.mark.parametrize(("name", "maps"), [("of images", 0), ("with strides", 0), ("of maps", 2)])
def test_what_a_convolution_of_images_gives_is_normalized_without_a_pass_over_it(
    name: str, maps: int
) -> None:
    conv, norm, _ = own_tensors(name)
    x = torch.randn(4, conv.in_channels, 8, 8).double()
    outputs = conv(x)
    with _Sums(outputs.numel()) as sums:
        conv_and_norm(conv, norm, x, ForwardContext())
    assert sums.count == maps


class _Sums(TorchDispatchMode):
    """Mode that counts sums over tensors of a given size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sum.dim_IntList:
            self.count += args[0].numel() == self.size
        return func(*args, **(kwargs or {}))


def test_statistics_of_patches_bear_pixels_far_from_zero() -> None:
    conv, norm, _ = own_tensors("of images")
    x = 200.0 + 0.5 * torch.randn(20, 2, 8, 8).double()
    # Unpadded: zeros next to such pixels would dominate the variance.
    conv.padding = (0, 0)
    exact = conv_and_norm(conv, norm, x, ForwardContext())
    rounded = conv_and_norm(conv.float(), norm.float(), x.float(), ForwardContext())
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=0.01)


def test_batch_norm_is_exact_to_second_order(images: Tensor) -> None:
    norm = BatchNorm(4, "norm").double()
    x = images[:3, :, :2, :2].clone().requires_grad_()
    weight = norm.weight.detach().clone().requires_grad_()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x, ForwardContext()))

    assert torch.autograd.gradcheck(run, (x, weight))
    assert torch.autograd.gradgradcheck(run, (x, weight))


def test_film_scales_and_shifts_each_channel_by_a_linear_layer_of_the_context() -> None:
    film = FiLM(context_dim=2, num_features=2)
    with torch.no_grad():
        film.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]))
        film.linear.bias.copy_(torch.tensor([0.5, 0.0, 0.0, 1.0]))
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    # gamma = (1 + 0.5, -1), beta = (2, -3 + 1)
    moved = film(x, ForwardContext(context=torch.tensor([1.0, -1.0])))
    assert moved.tolist() == [[[[3.5, 5.0]], [[-5.0, -6.0]]]]
    # With a zero context only the bias is left: gamma = (0.5, 0), beta = (0, 1).
    assert film(x, ForwardContext()).tolist() == [[[[0.5, 1.0]], [[1.0, 1.0]]]]


def _second_order(normalize: Callable[..., Tensor], batched: bool) -> Tensor:
    """Return the gradient of a layer before the norm, through an inner step on the norm."""
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 5, 6, 4, dtype=torch.float64, generator=draw)
    mixing = torch.randn(4, 4, dtype=torch.float64, generator=draw).requires_grad_()
    start = torch.rand(2, 4, dtype=torch.float64, generator=draw).requires_grad_()

    def task(rows: Tensor, targets: Tensor) -> Tensor:
        def loss(affine: Tensor, part: slice) -> Tensor:
            out = normalize(rows[part] @ mixing, affine[0], affine[1])
            return (torch.tanh(out) - targets[part]).square().mean()

        adapted = start - 0.5 * torch.func.grad(loss)(start, slice(0, 3))
        return loss(adapted, slice(3, 6))

    if batched:
        losses = torch.vmap(task)(x, y)
    else:
        losses = torch.stack([task(*rows) for rows in zip(x, y, strict=True)])
    return torch.autograd.grad(losses.mean(), mixing)[0]


def test_vmap_over_an_adapted_batch_norm_keeps_second_order_gradients() -> None:
    """Torch's own batch norm is silently wrong here, so the package has its own."""
    norm = BatchNorm(4, "norm").double()

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        params = {"weight": weight, "bias": bias}
        out: Tensor = torch.func.functional_call(norm, params, (x, ForwardContext()))
        return out

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, weight, bias, training=True)

    right = _second_order(theirs, False)
    torch.testing.assert_close(_second_order(ours, False), right, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(_second_order(ours, True), right, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(_second_order(theirs, True), right, rtol=1e-2)


def test_dropblock_drops_about_the_asked_share_in_whole_squares() -> None:
    x = torch.ones(40, 8, 10, 10)
    out = drop_blocks(x, torch.tensor(3), 0, rate=0.2, block_size=3)
    dropped = out == 0
    assert 0.15 < dropped.double().mean() < 0.22
    assert out.mean() == pytest.approx(1.0, abs=1e-5)
    # Every dropped point lies in some fully dropped 3x3 square.
    full = nn.functional.avg_pool2d(dropped.float(), 3, stride=1) > 0.999
    covered = nn.functional.max_pool2d(nn.functional.pad(full.float(), (2, 2, 2, 2)), 3, stride=1)
    assert torch.equal(covered > 0, dropped)


def test_dropblock_repeats_for_a_key_and_differs_for_another() -> None:
    x = torch.ones(4, 3, 8, 8)
    first = drop_blocks(x, torch.tensor(3), 0, 0.3, 2)
    assert torch.equal(first, drop_blocks(x, torch.tensor(3), 0, 0.3, 2))
    assert not torch.equal(first, drop_blocks(x, torch.tensor(4), 0, 0.3, 2))
    assert not torch.equal(first, drop_blocks(x, torch.tensor(3), 1, 0.3, 2))


def test_instance_norm_is_torchs_and_each_row_is_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 6, generator=draw, dtype=torch.float64)
    norm = InstanceNorm(3).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.uniform_(-1.0, 1.0)
    expected = nn.functional.instance_norm(x, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(norm(x, ForwardContext()), expected)
    torch.testing.assert_close(norm(x[1:2], ForwardContext()), expected[1:2])
    # Instance norm equals batch norm of a batch of one.
    batch = BatchNorm(3, "norm").double()
    batch.load_state_dict(norm.state_dict(), strict=False)
    torch.testing.assert_close(batch(x[1:2], ForwardContext()), expected[1:2])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("stride", "padding"), [((1, 1), (1, 1)), ((2, 1), (0, 2))])
def test_a_convolution_that_is_differentiated_twice_is_torchs_to_third_order(
    stride: tuple[int, int], padding: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    own = [torch.randn(2, 3, 5, 6), torch.randn(4, 3, 3, 2), torch.randn(4)][: 2 + bias]
    own = [tensor.double().requires_grad_() for tensor in own]

    def pulled(convolve: Any) -> list[Tensor]:
        given = own if bias else [*own, None]
        found = [convolve(*given, stride, padding)]
        for _ in range(3):
            curved = torch.stack([tensor.sin().sum() for tensor in found[-len(own) :]]).sum()
            found += torch.autograd.grad(curved, own, create_graph=True)
        return found

    expected = pulled(nn.functional.conv2d)
    torch.testing.assert_close(pulled(conv2d_for_double_backward), expected)
