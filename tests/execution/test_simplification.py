"""Shorter graphs compute the same numbers, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx

from metarun.execution.graph_replay import _followed
from metarun.execution.simplification import shorten

X = torch.arange(24.0).reshape(2, 3, 4).sin()
Function = Callable[[Sequence[Tensor]], Tensor]


def shortened(function: Function, *args: Tensor) -> tuple[fx.GraphModule, Counter[str]]:
    """Return the shortened graph of a function, and how often it calls each operator."""
    module = _followed(function, (list(args),))
    shorten(module, (list(args),))
    names = [getattr(node.target, "__name__", str(node.target)) for node in module.graph.nodes]
    return module, Counter(names)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda v: (v[0].transpose(0, 1).transpose(0, 1) + 2).view(6, 4).view(2, 3, 4), 1),
        (lambda v: v[0].exp().view(6, 4).t() @ v[0].exp().view(6, 4), 4),
        (lambda v: (v[0].exp() * 1.0).sum(), 2),
        (lambda v: v[0].exp().pow(1.0).sum() * v[0].pow(0.0).sum(), 5),
        (lambda v: -v[0].exp() * 0.25, 2),
    ],
)
def test_what_computes_nothing_is_left_out(function: Function, left: int) -> None:
    module, called = shortened(function, X)
    operators = {name: n for name, n in called.items() if name not in ("arg0_1", "output")}
    assert sum(operators.values()) == left, operators
    found, expected = module([X]), function([X])
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_data_that_begin_elsewhere_in_memory_are_read_where_they_are() -> None:
    """The tasks of a step may be a part of those of several steps."""
    whole = torch.arange(40.0).reshape(10, 4)

    def function(values: Sequence[Tensor]) -> Tensor:
        return (values[0].view(2, 4).t().unsqueeze(0) + 1.0).sum(1)

    module, called = shortened(function, whole[0:2])
    assert called["as_strided"] == 1
    for start in range(0, 10, 2):
        rows = whole[start : start + 2]
        assert torch.equal(module([rows]), function([rows]))


def test_a_result_never_shares_the_memory_of_an_argument() -> None:
    x = X.clone()
    module, _ = shortened(lambda values: values[0] * 1.0, x)
    module([x]).add_(1.0)
    assert torch.equal(x, X)


def test_an_order_of_summation_is_not_changed_by_a_negation() -> None:
    """The strides of what is multiplied decide in which order a product is summed."""
    wide = torch.arange(400.0).sin().reshape(20, 20, 1)[:, :1].expand(20, 20, 1)

    def function(values: Sequence[Tensor]) -> Tensor:
        return (-values[0] * 0.3).transpose(1, 2) @ values[0]

    module, _ = shortened(function, wide)
    assert torch.equal(module([wide]), function([wide]))
