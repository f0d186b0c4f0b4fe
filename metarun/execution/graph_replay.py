"""Tracing of tensor functions to flat graphs of operators, which are then replayed.

A meta-step consists of many small operators. Python, autograd and functorch take longer than the
operators themselves, several times as long for small networks, and produce the same list of
operators each time. `Graphs` traces a function once for each set of argument shapes and keeps the
list, including gradients of any order. A replay calls only the operators.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

GraphKind = Literal["auto", "none", "replay", "compile"]
GRAPH_KINDS: tuple[GraphKind, ...] = ("auto", "none", "replay", "compile")
Function = Callable[..., Any]

_PATIENCE = 200
"""Number of calls after which `auto` traces a function. Tracing takes as long as some hundred small
calls, so it does not pay for short runs and single evaluations."""

_log = logging.getLogger(__name__)


class Graphs:
    """Cache of the traced graphs of one engine."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, int] = {}
        self._made: dict[Hashable, Function | None] = {}

    def __deepcopy__(self, _: dict[int, Any]) -> Graphs:
        return Graphs()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def find(
        self, kind: GraphKind, key: Hashable, function: Function, args: Sequence[Sequence[Tensor]]
    ) -> Function | None:
        """Return a replacement for `function`, or None if the function itself is to be called.

        A replay is used only if it equals the function bit for bit. A compiled replay agrees up
        to rounding.

        Args:
            kind: `auto` and `replay` replay the operators, `auto` from the 200th call on.
                `compile` passes them to `torch.compile`, which fuses them.
            key: Values on which the function depends in addition to its arguments.
            function: Function of lists of tensors that returns any nest of tensors. A function
                that reads other tensors is never replayed.
            args: Arguments of this call. The last list is data. Equal operations on data alone are
                computed once per replay.
        """
        whole = (kind, key, tuple(tuple(map(_layout, tensors)) for tensors in args))
        if whole in self._made:
            return self._made[whole]
        calls = self._calls[whole] = self._calls.get(whole, 0) + 1
        if kind == "auto" and calls < _PATIENCE:
            return None
        del self._calls[whole]
        graph = _followable(function, args)
        made: Function | None = None
        if graph is not None:
            made = _compiled(graph, args) if kind == "compile" else _faithful(graph, function, args)
        self._made[whole] = made
        return made


def _layout(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _followable(function: Function, args: Sequence[Sequence[Tensor]]) -> fx.GraphModule | None:
    try:
        return _followed(function, args)
    # A function that cannot be traced is called as it is.
    except Exception as error:
        _log.debug("not replayed: %s", error)
        return None


def _faithful(
    graph: fx.GraphModule, function: Function, args: Sequence[Sequence[Tensor]]
) -> Function | None:
    expected = function(*args)
    replay = _without_gradients(graph)
    try:
        found = replay(*args)
    # As above: a function that cannot be replayed is called as it is.
    except Exception as error:
        _log.debug("not replayed: %s", error)
        return None
    if not _same(expected, found):
        _log.debug("not replayed: a replay differs from the function")
        return None
    return replay


def _compiled(graph: fx.GraphModule, args: Sequence[Sequence[Tensor]]) -> Function:
    # Compile the graph itself: torch compiles the code of a function around it eight times at most.
    if not _on_gpu(args):
        return _without_gradients(torch.compile(graph, fullgraph=True, dynamic=False))
    # On a GPU use CUDA graphs of the whole step, which avoid separate kernel launches.
    captured = torch.compile(graph, fullgraph=True, dynamic=False, mode="reduce-overhead")
    return _copied(_without_gradients(captured))


def _on_gpu(args: Sequence[Sequence[Tensor]]) -> bool:
    return any(tensor.is_cuda for tensors in args for tensor in tensors)


def _without_gradients(function: Function) -> Function:
    def run(*tensors: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            return function(*tensors)

    return run


def _copied(function: Function) -> Function:
    """Return a function whose results are copies, where the next call overwrites its own."""

    def run(*tensors: Sequence[Tensor]) -> Any:
        return pytree.tree_map(torch.clone, function(*tensors))

    return run


def _followed(function: Function, args: Sequence[Sequence[Tensor]]) -> fx.GraphModule:
    """Trace the operators of one call, from the arguments to the results.

    Raises:
        ValueError: The function reads tensors that are not among its arguments.
    """
    flat = [[tensor.detach() for tensor in tensors] for tensors in args]
    with warnings.catch_warnings():
        # Gradients of non-leaf tensors are intended here.
        warnings.simplefilter("ignore")
        module = make_fx(function, tracing_mode="fake")(*flat)
    constants = [node.target for node in module.graph.nodes if node.op == "get_attr"]
    if constants:
        raise ValueError(f"it reads tensors that are not among its arguments: {constants}")
    data = [node for node in module.graph.nodes if node.op == "placeholder"][-len(args[-1]) :]
    _tidy(module, set(data))
    return module


_RESHAPES = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.t.default,
}
"""Operators that return their first argument in a shape that may be the same."""

_SAME = {torch.ops.aten.alias.default, torch.ops.aten.detach.default}
"""Operators that return their argument."""

_ZEROS = {
    torch.ops.aten.zeros.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_zeros.default,
}
_STILL_ZEROS = {*_SAME, *_RESHAPES, torch.ops.aten.permute.default, torch.ops.aten.clone.default}


def _tidy(module: fx.GraphModule, data: set[fx.Node]) -> None:
    """Remove operators without effect, unused results and repeated operations on the data."""
    graph = module.graph
    # In-place operators may change zeros and shared results, so these steps need their absence.
    if not any(_writes(node) for node in graph.nodes):
        _leave_out_zeros(graph)
        _share(graph, data)
    for node in graph.nodes:
        reshapes = node.target in _RESHAPES
        if node.target in _SAME or (reshapes and _same_layout(node, node.args[0])):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    module.recompile()


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _leave_out_zeros(graph: fx.Graph) -> None:
    """Replace sums with zeros by their other summand.

    The derivatives of pooling and ReLU produce such zeros, as large as their inputs.
    """
    zeros: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in _ZEROS or (node.target in _STILL_ZEROS and node.args[0] in zeros):
            zeros.add(node)
        elif node.target is torch.ops.aten.add.Tensor and not node.kwargs:
            for zero, other in (node.args, node.args[::-1]):
                if zero in zeros and isinstance(other, fx.Node) and _same_layout(node, other):
                    node.replace_all_uses_with(other)


def _share(graph: fx.Graph, data: set[fx.Node]) -> None:
    """Merge equal operations that depend on the data alone.

    Operations that depend on weights are left, as they may be repeated on purpose to save memory.
    """
    known = set(data)
    made: dict[str, fx.Node] = {}
    for node in graph.nodes:
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if not node.all_input_nodes or drawn or not known.issuperset(node.all_input_nodes):
            continue
        known.add(node)
        before = made.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
        if before is not node:
            node.replace_all_uses_with(before)


def _same_layout(node: fx.Node, other: fx.Node) -> bool:
    """Return whether two results surely have the same shape, type and memory layout.

    The stride of a dimension of size 1 is arbitrary and may differ in a replay, but matrix products
    choose their order of summation by it. Such tensors therefore do not count as equal.
    """
    value, before = node.meta["val"], other.meta["val"]
    alike = (value.shape, value.dtype) == (before.shape, before.dtype)
    return alike and value.stride() == before.stride() and 1 not in value.shape


def _same(expected: Any, found: Any) -> bool:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    return all(
        bool(((a == b) | (a.isnan() & b.isnan())).all()) and a.dtype == b.dtype for a, b in pairs
    )
