"""A convolution whose second derivatives are ordinary convolutions.

Torch's double backward of a weight gradient convolves all images with all gradients, with the
gradients as kernels. For images of 42x42 this is five times slower than the operator that computes
the weight gradient of the first backward pass. This module uses that operator for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, ...]


def conv2d_for_double_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
) -> Tensor:
    """Convolve as `torch.nn.functional.conv2d`; differentiable to any order, but not under vmap.

    Args:
        x: (N, C, H, W).
        weight: (K, C, h, w).
        bias: (K,).
        stride, padding: Vertical and horizontal stride and padding, in pixels.
    """
    out: Tensor = _Convolution.apply(x, weight, bias, stride, padding)
    return out


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias, or None where `wanted` is false."""
    sizes, still = [weight.shape[0]], [1, 1]
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad, x, weight, sizes, stride, padding, still, False, [0, 0], 1, wanted
    )
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
    ) -> Tensor:
        return torch.nn.functional.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])
        ctx.how = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grads = _Gradients.apply(grad, *ctx.saved_tensors, *ctx.how, ctx.needs_input_grad[:3])
        return (*grads, None, None)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, wanted: Any
    ) -> Any:
        return _gradients(grad, x, weight, stride, padding, list(wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3])
        ctx.how = inputs[3:5]

    @staticmethod
    def backward(ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Any) -> Any:
        # Each gradient is linear in the tensors that it is computed from.
        grad, x, weight = ctx.saved_tensors
        stride, padding = ctx.how
        of_grad, to_x, to_weight = ctx.needs_input_grad[:3]
        back: list[Tensor] = []
        pulled: list[Tensor | None] = [None, None]
        if of_x is not None and of_grad:
            back.append(torch.nn.functional.conv2d(of_x, weight, None, stride, padding))
        if of_x is not None and to_weight:
            pulled[1] = _gradients(grad, of_x, weight, stride, padding, [False, True, False])[1]
        if of_weight is not None and of_grad:
            back.append(torch.nn.functional.conv2d(x, of_weight, None, stride, padding))
        if of_weight is not None and to_x:
            pulled[0] = _gradients(grad, x, of_weight, stride, padding, [True, False, False])[0]
        if of_bias is not None and of_grad:
            back.append(of_bias.view(1, -1, 1, 1).expand_as(grad))
        return (sum(back[1:], back[0]) if back else None), *pulled, None, None, None
