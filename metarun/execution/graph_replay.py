"""Functions of tensors as flat graphs: followed once, then replayed without what led to them.

A meta-step is many small operators. Between them Python, autograd and functorch take longer than
the operators do, for small networks several times as long, and they come to the same list of
operators each time. `Graphs` follows a function once for each shape of its arguments and keeps
the list, gradients of any order included; a replay calls the operators and nothing else.
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
"""Calls before `auto` follows a function: to follow it takes as long as some hundred small calls,
so that short runs and single evaluations do not."""

_log = logging.getLogger(__name__)


class Graphs:
    """The graphs of one engine, by what they were made of."""

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
        """What to call in the place of `function`; None is the function itself.

        A replay is used only where it gives what the function gives, bit for bit. One that is
        compiled agrees to rounding.

        Args:
            kind: `auto` and `replay` replay the operators, `auto` from the 200th call on;
                `compile` hands them to `torch.compile`, which fuses them.
            key: Everything that the function depends on beside its arguments.
            function: Of lists of tensors to any nest of tensors. It reads no other tensors: one
                that does is never replayed.
            args: The arguments of this call. The last list is data: what a replay makes of that
                alone it makes once.
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
    # Whatever cannot be followed can still be called, as it was before.
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
    # As above: what cannot be replayed is called.
    except Exception as error:
        _log.debug("not replayed: %s", error)
        return None
    if not _same(expected, found):
        _log.debug("not replayed: a replay differs from the function")
        return None
    return replay


def _compiled(graph: fx.GraphModule, args: Sequence[Sequence[Tensor]]) -> Function:
    # The graph itself and not a function around it, of whose code torch compiles eight at most.
    if not _on_gpu(args):
        return _without_gradients(torch.compile(graph, fullgraph=True, dynamic=False))
    # Whole-step CUDA graphs: nothing is launched one by one.
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
    """A function whose results are the caller's, where the next call writes over its own."""

    def run(*tensors: Sequence[Tensor]) -> Any:
        return pytree.tree_map(torch.clone, function(*tensors))

    return run


def _followed(function: Function, args: Sequence[Sequence[Tensor]]) -> fx.GraphModule:
    """The operators of one call, from the arguments to the results.

    Raises:
        ValueError: It reads tensors that are not among its arguments.
    """
    flat = [[tensor.detach() for tensor in tensors] for tensors in args]
    with warnings.catch_warnings():
        # Gradients of tensors that are no leaves, which autograd is asked for on purpose.
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
"""Operators that give their first argument in another shape, which may be the one it has."""

_SAME = {torch.ops.aten.alias.default, torch.ops.aten.detach.default}
"""Operators that give their argument."""

_ZEROS = {
    torch.ops.aten.zeros.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_zeros.default,
}
_STILL_ZEROS = {*_SAME, *_RESHAPES, torch.ops.aten.permute.default, torch.ops.aten.clone.default}


def _tidy(module: fx.GraphModule, data: set[fx.Node]) -> None:
    """Leave out what changes nothing, what nobody reads, and what was made of the data before."""
    graph = module.graph
    # What an operator writes into may be no zeros and not the same by then: nothing is certain.
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
    """Take the other one of two summands where one is zeros.

    So are derivatives of pooling and of ReLU by their inputs, as large as those.
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
    """Make once what is made of the data alone.

    Nothing else, since what depends on weights may be made again on purpose, to save memory.
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
    """Whether two are of one type and laid out alike, for certain.

    Of a dimension of 1 the stride means nothing, and may be another one by the time of a replay;
    but products choose their order of sums by it.
    """
    value, before = node.meta["val"], other.meta["val"]
    alike = (value.shape, value.dtype) == (before.shape, before.dtype)
    return alike and value.stride() == before.stride() and 1 not in value.shape


def _same(expected: Any, found: Any) -> bool:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    return all(
        bool(((a == b) | (a.isnan() & b.isnan())).all()) and a.dtype == b.dtype for a, b in pairs
    )
