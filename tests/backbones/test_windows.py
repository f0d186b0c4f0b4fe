"""A convolution with its pooling from windows, against torch's own operators."""

import pytest
import torch
from torch import Tensor, nn

from metarun.backbones.layers import windows
from metarun.backbones.layers.windows import pooled_products, windows_of

TASKS, CHANNELS, OUTPUTS = 3, 2, 4


@pytest.fixture(autouse=True)
def in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Five windows at a time, of the 24 of two images of 6x8.
    monkeypatch.setattr(windows, "_NUMBERS", 5 * 4 * OUTPUTS)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(
        TASKS, 2, CHANNELS, 6, 8, generator=torch.Generator().manual_seed(0)
    ).double()


@pytest.fixture
def kernels() -> Tensor:
    shape = TASKS, OUTPUTS, CHANNELS, 3, 3
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def from_windows(x: Tensor, kernel: Tensor) -> Tensor:
    of_windows = windows_of(nn.functional.pad(x, (1, 1, 1, 1)))
    return pooled_products(of_windows, kernel).view(2, 3, 4, OUTPUTS).movedim(3, 1)


def from_maps(x: Tensor, kernel: Tensor) -> Tensor:
    return nn.functional.max_pool2d(nn.functional.conv2d(x, kernel, padding=1), 2)


def test_every_derivative_is_that_of_finite_differences(images: Tensor, kernels: Tensor) -> None:
    tensors = images[0].requires_grad_(), kernels[0].requires_grad_()
    assert torch.autograd.gradcheck(from_windows, tensors)
    assert torch.autograd.gradgradcheck(from_windows, tensors)


def third_derivatives(function, x: Tensor, kernel: Tensor) -> list[Tensor]:
    """Return the result and what derivatives of derivatives give, for both arguments."""

    def once(x: Tensor, kernel: Tensor) -> Tensor:
        return function(x, kernel).sin().sum()

    def twice(x: Tensor, kernel: Tensor) -> Tensor:
        grads = torch.func.grad(once, argnums=(0, 1))(x, kernel)
        return sum(grad.square().sum() for grad in grads)

    def thrice(x: Tensor, kernel: Tensor) -> Tensor:
        grads = torch.func.grad(twice, argnums=(0, 1))(x, kernel)
        return sum(grad.square().sum() for grad in grads)

    return [function(x, kernel), *torch.func.grad(thrice, argnums=(0, 1))(x, kernel)]


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 2)], ids=str)
def test_tasks_of_vmap_are_as_convolutions_one_by_one(
    images: Tensor, kernels: Tensor, in_dims: tuple[int | None, int | None]
) -> None:
    of_task = [
        [tensor[0] if dim is None else tensor[task] for task in range(TASKS)]
        for tensor, dim in zip((images, kernels), in_dims, strict=True)
    ]
    given = [
        tensor[0] if dim is None else tensor.movedim(0, dim)
        for tensor, dim in zip((images, kernels), in_dims, strict=True)
    ]
    found = torch.vmap(lambda *both: third_derivatives(from_windows, *both), in_dims)(*given)
    expected = [third_derivatives(from_maps, *both) for both in zip(*of_task, strict=True)]
    for name, one in zip(
        ("result", "x", "kernel"), zip(found, zip(*expected, strict=True), strict=True), strict=True
    ):
        torch.testing.assert_close(
            one[0], torch.stack(one[1]), msg=lambda text, name=name: f"{name}: {text}"
        )


def test_derivatives_outside_of_vmap_are_those_inside(images: Tensor, kernels: Tensor) -> None:
    x, kernel = images.requires_grad_(), kernels.requires_grad_()
    found = torch.vmap(from_windows)(x, kernel)
    expected = torch.stack([from_maps(*both) for both in zip(x, kernel, strict=True)])
    grads = torch.autograd.grad(found.sin().sum(), (x, kernel))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sin().sum(), (x, kernel)))


def test_of_equal_products_the_first_has_the_gradient() -> None:
    x = torch.ones(2, CHANNELS, 6, 8).double()
    x[0, :, 2:4, 3:5] = 0.0
    kernel = torch.ones(OUTPUTS, CHANNELS, 3, 3).double().requires_grad_()
    grads = [
        torch.autograd.grad(function(x, kernel).sin().sum(), kernel)[0]
        for function in (from_windows, from_maps)
    ]
    torch.testing.assert_close(*grads)
