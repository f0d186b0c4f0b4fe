"""Simplification of traced graphs of operators: fewer operators with the same results, bit for bit.

Small operators take a microsecond or two each, whether they compute anything or not. Traces of
gradients have many that do not: views of views, products with 1, equal operations.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten

_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.transpose.int,
    _aten.t.default,
    _aten.permute.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.alias.default,
    _aten.detach.default,
}
"""Operators that return all of their first argument in another shape or order."""
_AS_FAST = {_aten.transpose.int, _aten.t.default}
"""Views that take no longer than `as_strided`."""
_SAME = {_aten.alias.default, _aten.detach.default}
"""Operators that return their argument."""

_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
_STILL_ZEROS = {*_VIEWS, _aten.clone.default}
_ONES = {_aten.ones.default, _aten.ones_like.default}

_PRODUCTS = {_aten.mul.Tensor, _aten.mul.Scalar}

_SMALL = 2**16
"""Number of elements up to which a result is kept for an equal operation."""

_Layout = tuple[torch.Size, tuple[int, ...], int]


def tidy(module: fx.GraphModule, data: set[fx.Node]) -> None:
    """Remove operators without effect, unused results and equal operations.

    Large results that depend on weights stay, as they may be repeated on purpose to save memory.

    Args:
        module: Trace, which is changed.
        data: Placeholders that are data.
    """
    graph = module.graph
    if not _has_writes(graph):
        _leave_out_zeros(graph)
        _share(graph, data)
    for node in graph.nodes:
        if node.target in _SAME or (node.target in _VIEWS and _same_layout(node, node.args[0])):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    module.recompile()


def shorten(module: fx.GraphModule, args: Sequence[Any]) -> None:
    """Leave out operators that only matter while a graph is traced, for a replay in Python.

    A view of a view becomes one of the result below both, and products and powers with 1 become
    their argument. Layouts are those of one call, with all strides: a replay gets no other ones.

    Args:
        module: Trace, which is changed.
        args: Arguments of a call of the module, as they will be.
    """
    graph = module.graph
    if not _has_writes(graph):
        calls = _Layouts(module)
        calls.run(*args)
        _leave_out_ones(graph, calls.layouts)
        _negate_factors(graph, calls.layouts)
        _merge_views(graph, calls.layouts)
        graph.eliminate_dead_code()
    _use_bindings(graph)
    module.recompile()


class _Layouts(fx.Interpreter):
    """Call of a graph that keeps the layouts of all tensors in it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.layouts: dict[fx.Node, _Layout] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.layouts[n] = result.shape, result.stride(), int(result.storage_offset())
        return result


def _has_writes(graph: fx.Graph) -> bool:
    """Return whether an operator changes a tensor, such as zeros or results that others share."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in graph.nodes
    )


def _leave_out_zeros(graph: fx.Graph) -> None:
    """Replace sums with zeros by their other summand.

    The derivatives of pooling and ReLU produce such zeros, as large as their inputs.
    """
    zeros: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in _ZEROS or (node.target in _STILL_ZEROS and node.args[0] in zeros):
            zeros.add(node)
        elif node.target is _aten.add.Tensor and not node.kwargs:
            for zero, other in (node.args, node.args[::-1]):
                if zero in zeros and isinstance(other, fx.Node) and _same_layout(node, other):
                    node.replace_all_uses_with(other)


def _share(graph: fx.Graph, data: set[fx.Node]) -> None:
    """Merge equal operations with small results, and all that depend on the data alone."""
    known = set(data)
    made: dict[str, fx.Node] = {}
    for node in graph.nodes:
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if not node.all_input_nodes or drawn:
            continue
        if known.issuperset(node.all_input_nodes):
            known.add(node)
        elif not _is_small(node):
            continue
        before = made.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
        if before is not node:
            node.replace_all_uses_with(before)


def _is_small(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, Tensor) and value.numel() <= _SMALL


def _leave_out_ones(graph: fx.Graph, layouts: dict[fx.Node, _Layout]) -> None:
    """Replace products with 1 and first powers by their argument.

    An argument or a result of the graph keeps its own memory, since a caller may write into it.
    """
    ones: set[fx.Node] = set()
    for node in graph.nodes:
        target, args = node.target, node.args
        to_one = target is _aten.pow.Tensor_Scalar and args[1] == 0
        if target in _ONES or to_one or (target is _aten.mul.Tensor and ones.issuperset(args)):
            ones.add(node)
            continue
        power = target is _aten.pow.Tensor_Scalar and args[1] == 1
        product = target in _PRODUCTS and (_is_one(args[1]) or args[1] in ones)
        if not (power or product):
            continue
        own = all(use.op != "output" for use in node.users)
        alike = args[0].meta["val"].dtype == node.meta["val"].dtype
        if own and alike and layouts[args[0]] == layouts[node]:
            node.replace_all_uses_with(args[0])


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 1


def _negate_factors(graph: fx.Graph, layouts: dict[fx.Node, _Layout]) -> None:
    """Multiply by the negative of a number, in place of a negation and a product."""
    for node in graph.nodes:
        if node.target in _PRODUCTS and isinstance(node.args[1], float):
            before, factor = node.args
            negated = before.target is _aten.neg.default
            if negated and layouts[before] == layouts[before.args[0]]:
                node.args = before.args[0], operator.neg(factor)


def _merge_views(graph: fx.Graph, layouts: dict[fx.Node, _Layout]) -> None:
    """Make each view one of the tensor whose memory it shows, and equal views only once."""
    below: dict[fx.Node, fx.Node] = {}
    made: dict[tuple[fx.Node, _Layout], fx.Node] = {}
    for node in graph.nodes:
        if node.target not in _VIEWS:
            continue
        base = below[node] = below.get(node.args[0], node.args[0])
        layout = layouts[node]
        # Only a view that begins where its base does can be shown without an offset.
        if layout[2] != layouts[base][2]:
            continue
        before = base if layout == layouts[base] else made.setdefault((base, layout), node)
        if before is not node:
            node.replace_all_uses_with(before)
        elif node.target not in _AS_FAST or node.args[0] is not base:
            # Without an offset it is that of the base, which differs from call to call in data.
            node.target, node.args = _aten.as_strided.default, (base, *map(list, layout[:2]))


def _use_bindings(graph: fx.Graph) -> None:
    """Call operators by the functions and methods of torch, which are twice as fast to call."""
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            continue
        name = node.target._schema.name.removeprefix("aten::")
        if hasattr(torch._C._VariableFunctions, name):
            node.target = getattr(torch._C._VariableFunctions, name)
        elif hasattr(torch._C.TensorBase, name):
            node.op, node.target = "call_method", name


def _same_layout(node: fx.Node, other: fx.Node) -> bool:
    """Return whether two results surely have the same shape, type and memory layout.

    The stride of a dimension of size 1 is arbitrary and may differ in a replay, but matrix products
    choose their order of summation by it. Such tensors therefore do not count as equal.
    """
    value, before = node.meta["val"], other.meta["val"]
    alike = (value.shape, value.dtype) == (before.shape, before.dtype)
    return alike and value.stride() == before.stride() and 1 not in value.shape
