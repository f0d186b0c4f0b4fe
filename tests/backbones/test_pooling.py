"""Max-pooling equals torch's operator, with gradients and without."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import max_pool2d

from metarun.backbones.layers.pooling import halved


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 3, 7, 5), (1, 1, 2, 2), (2, 2, 3, 9)])
def test_maxima_are_those_of_torch(shape: tuple[int, ...], ties: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.round() if ties else x
    assert torch.equal(halved(x), max_pool2d(x, 2))
    assert torch.equal(torch.vmap(halved)(x[None]), max_pool2d(x, 2)[None])
    own = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(halved(own).square().sum(), own)
    (expected,) = torch.autograd.grad(max_pool2d(own, 2).square().sum(), own)
    assert torch.equal(found, expected)
