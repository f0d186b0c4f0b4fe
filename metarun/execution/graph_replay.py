"""Tracing of tensor functions to flat graphs of operators, which are then replayed.

A meta-step consists of many small operators. Python, autograd and functorch take longer than the
operators themselves, several times as long for small networks, and produce the same list of
operators each time. `Graphs` traces a function once for each set of argument shapes and keeps the
list, including gradients of any order. A replay calls only the operators, and only while all that
the function reads besides its arguments is as it was (`guards`).
"""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metarun.execution.guards import Guards, UnguardedError
from metarun.execution.simplification import shorten, tidy
from metarun.execution.watching import Executed, watched

GraphKind = Literal["auto", "none", "replay", "compile"]
Function = Callable[..., Any]

_PATIENCE = 200
"""Number of calls after which `auto` traces a function. Tracing takes as long as some hundred small
calls, so it does not pay for short runs and single evaluations."""
_SETTLED = 20
"""Number of these calls for which all that the function reads has to be the same."""
CALLS_BEFORE_REPLAY = 2
"""Calls of a function with `replay`: one is watched and one is traced."""
_MOST_SIZES = 16
"""Number of sizes of the data for which the calls of a kind are replayed. Where sizes vary, those
beyond them call the function: a graph of each would take more time and memory than it saves."""
_MOST_TRACES = 16
"""Number of replays of one function that differ in what it reads."""

_MOST_COMPILED = 2_000
"""Number of operators up to which a graph is compiled: more take minutes. Others are replayed."""

_ROUNDING = 1e-2
"""Difference up to which a compiled graph agrees with its function, relative to the largest."""
_NOTHING = 1e-4
"""Size of a result, relative to the largest of all, below which it may be nothing but rounding."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replay:
    """Operators of a function, which take its place while its guards hold.

    Attributes:
        function: The operators, as a function of the same arguments.
        guards: What the function reads besides its arguments.
    """

    function: Function
    guards: Guards


@dataclass(frozen=True)
class Computed:
    """Result of a call that was made to learn about the function."""

    result: Any


class Graphs:
    """Cache of the traced graphs of one engine."""

    def __init__(self) -> None:
        # A network that is no longer used takes its counts along.
        self._sites: WeakKeyDictionary[nn.Module, dict[Hashable, _Site]] = WeakKeyDictionary()
        self._sizes: WeakKeyDictionary[nn.Module, Counter[Hashable]] = WeakKeyDictionary()
        self._busy = False

    def __deepcopy__(self, _: dict[int, Any]) -> Graphs:
        return Graphs()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    @property
    def replays(self) -> list[Function]:
        """All replays that were found."""
        sites = (site for sites in self._sites.values() for site in sites.values())
        return [trace.replay for site in sites for trace in site.traces if trace.replay]

    def find(
        self,
        kind: GraphKind,
        key: Hashable,
        task: Any,
        net: nn.Module,
        function: Function,
        args: Sequence[Sequence[Tensor]],
    ) -> Replay | Computed | None:
        """Return a replay of `function`, the result of this call, or None.

        Whether `function` can be replayed is found out in calls of it. Its result is then returned.
        None means that `function` itself is to be called. A replay is used only if it equals the
        function bit for bit. A compiled replay agrees up to rounding.

        Args:
            kind: `auto` and `replay` replay the operators, `auto` from the 201st call on and
                `replay` from the third. `compile` passes them to `torch.compile`, which fuses them,
                from the first call on: a run that resumes then computes as one that did not stop.
            key: Kind of the call. Calls with different keys are counted separately.
            task: Function inside `function` that may depend on more than its arguments.
            net: Network that the task reads. Its tensors are among the arguments.
            function: Function of lists of tensors that returns any nest of tensors. A function
                that reads other tensors is never replayed.
            args: Arguments of this call. The last list is data. Equal operations on data alone are
                computed once per replay.
        """
        # Tensors inside another transformation or trace are not those of a replay.
        if self._busy or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        sizes_of = tuple(map(layouts, args))
        whole = (kind, key, sizes_of, torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
        sites = self._sites.setdefault(net, {})
        if whole not in sites:
            same = (*whole[:2], sizes_of[:-1], *whole[3:])
            sizes = self._sizes.setdefault(net, Counter())
            if sizes[same] == _MOST_SIZES:
                return None
            sizes[same] += 1
            sites[whole] = _Site(kind)
        self._busy = True
        try:
            found = sites[whole].call(task, net, function, args)
            while kind == "compile" and isinstance(found, Computed):
                found = sites[whole].call(task, net, function, args)
            return found
        finally:
            self._busy = False


class _Trace:
    """Trace of a function for the values that its guards hold."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards
        self.calls = 0
        self.replay: Function | None = None


class _Site:
    """Calls of the same code with arguments of the same layouts.

    One call finds the code that is executed, and later ones the values that it reads. After some
    calls with the same values the function is traced.
    """

    def __init__(self, kind: GraphKind) -> None:
        self._kind = kind
        self._settled = _SETTLED if kind == "auto" else 1
        self._watched_at = _PATIENCE - _SETTLED if kind == "auto" else 1
        self._calls = 0
        self._executed: Executed | None = None
        self._refused = False
        self.traces: list[_Trace] = []

    def call(
        self, task: Any, net: nn.Module, function: Function, args: Sequence[Sequence[Tensor]]
    ) -> Replay | Computed | None:
        """See `Graphs.find`."""
        self._calls += 1
        if self._calls < self._watched_at:
            return None
        if self._executed is None:
            if self._kind != "auto":
                # torch imports it in its first gradient, as if that were part of the function.
                importlib.import_module("torch._dynamo")
            result, self._executed = watched(function, args)
            self._refuse(self._executed.refused)
            return Computed(result)
        if self._refused:
            return None
        try:
            trace = self._trace_of(task, net, self._executed)
            if trace is None:
                return None
            trace.calls += 1
            if trace.calls != self._settled:
                return trace.replay and Replay(trace.replay, trace.guards)
            trace.guards = Guards(task, net, self._executed)
        except UnguardedError as error:
            self._refuse(str(error))
            return None
        result, now = watched(function, args)
        if not self._executed.covers(now):
            # Other code may read other values, which are to be found first.
            self._executed.join(now)
            self.traces.remove(trace)
            self._refuse(now.refused)
            return Computed(result)
        try:
            after = Guards(task, net, self._executed)
            if not trace.guards.hold(task) or after.versions != trace.guards.versions:
                raise ValueError("it changes what it reads")
            trace.replay = _replay(self._kind, function, args, result)
        # A function that cannot be traced or replayed is called as it is.
        except Exception as error:
            self._refuse(str(error))
        return Computed(result)

    def _trace_of(self, task: Any, net: nn.Module, executed: Executed) -> _Trace | None:
        for position, trace in enumerate(self.traces):
            if trace.guards.hold(task):
                self.traces.insert(0, self.traces.pop(position))
                return trace
        if len(self.traces) == _MOST_TRACES:
            return None
        self.traces.insert(0, _Trace(Guards(task, net, executed)))
        if len(self.traces) == _MOST_TRACES:
            _log.debug("replayed for %d sets of values and no others", _MOST_TRACES)
        return self.traces[0]

    def _refuse(self, reason: str | None) -> None:
        """Call the function from now on, if there is a reason."""
        if reason is not None:
            what = "compiled" if self._kind == "compile" else "replayed"
            level = logging.DEBUG if self._kind == "auto" else logging.INFO
            _log.log(level, "steps are not %s: %s", what, reason)
            self._refused = True
            self.traces.clear()


def _replay(
    kind: GraphKind, function: Function, args: Sequence[Sequence[Tensor]], expected: Any
) -> Function:
    graph = _followed(function, args)
    spec = _flattened(graph)
    if kind == "compile" and len(graph.graph.nodes) <= _MOST_COMPILED:
        _log.info("compiling the training step: up to a minute, or seconds if a run has before")
        compiled = _nested(_compiled(graph, args), spec)
        if _close(expected, compiled(*args)):
            return compiled
        _log.warning("the compiled step differs from the function: its operators are replayed")
    shorten(graph, list(chain(*args)))
    # The method itself: calling the module looks for hooks, which it does not have.
    replay = _nested(graph.forward, spec)
    if not _same(expected, replay(*args)):
        raise ValueError("a replay differs from the function")
    return replay


def layouts(tensors: Sequence[Tensor]) -> Hashable:
    """Return the shapes, strides, types and devices of tensors."""
    return tuple([(t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def _compiled(graph: fx.GraphModule, args: Sequence[Sequence[Tensor]]) -> Function:
    """Return a compiled function of a flat sequence of the arguments."""
    if not _on_gpu(args):
        # Inductor alone: `torch.compile` would compare the arguments again in each call. Without
        # the C++ wrapper each of the fused operators is called from Python.
        with torch.no_grad():
            made: Function = torch._inductor.compile(
                copy.deepcopy(graph), list(chain(*args)), {"cpp_wrapper": True}
            )
        return made
    # On a GPU use CUDA graphs of the whole step, which avoid separate kernel launches.
    captured = torch.compile(graph, fullgraph=True, dynamic=False, mode="reduce-overhead")
    return _copied(captured)


def _flattened(graph: fx.GraphModule) -> pytree.TreeSpec:
    """Make the arguments and the result of a trace flat, and return the structure of the result."""
    spec = graph._out_spec
    assert spec is not None
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    return spec


def _nested(function: Function, spec: pytree.TreeSpec) -> Function:
    """Return a function of lists of tensors from a flat one; its result is detached."""

    # To build a flat result from its description takes longer than all else here.
    is_flat = spec.num_leaves == spec.num_children and spec.type is tuple

    def run(*args: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            made = function(*chain(*args))
        return made if is_flat else pytree.tree_unflatten(made, spec)

    return run


def _on_gpu(args: Sequence[Sequence[Tensor]]) -> bool:
    return any(tensor.is_cuda for tensors in args for tensor in tensors)


def _copied(function: Function) -> Function:
    """Return a function whose results are copies, where the next call overwrites its own."""

    def run(*tensors: Sequence[Tensor]) -> Any:
        return pytree.tree_map(torch.clone, function(*tensors))

    return run


def _followed(function: Function, args: Sequence[Sequence[Tensor]]) -> fx.GraphModule:
    """Trace the operators of one call, from the arguments to the results.

    Raises:
        ValueError: The function reads tensors that are not among its arguments, or the numbers in
            a tensor.
    """
    flat = [[tensor.detach() for tensor in tensors] for tensors in args]
    with warnings.catch_warnings():
        # Gradients of non-leaf tensors are intended here.
        warnings.simplefilter("ignore")
        module = make_fx(_without_values(function), tracing_mode="fake")(*flat)
    constants = [node.target for node in module.graph.nodes if node.op == "get_attr"]
    if constants:
        raise ValueError(f"it reads tensors that are not among its arguments: {constants}")
    data = [node for node in module.graph.nodes if node.op == "placeholder"][-len(args[-1]) :]
    tidy(module, set(data))
    return module


def _without_values(function: Function) -> Function:
    """Return the function, which then fails where Python code reads the numbers in a tensor.

    A trace has these numbers as constants.
    """

    def run(*tensors: Sequence[Tensor]) -> Any:
        with _NoNumbers(), _NoArrays():  # type: ignore[no-untyped-call]
            return function(*tensors)

    return run


class _NoNumbers(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise ValueError("it reads the numbers in a tensor")
        return op(*args, **(kwargs or {}))


class _NoArrays(TorchFunctionMode):
    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        # These read memory without an operator.
        if function in (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr):
            raise ValueError("it reads the numbers in a tensor")
        return function(*args, **(kwargs or {}))


def _same(expected: Any, found: Any) -> bool:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    return all(
        bool(((a == b) | (a.isnan() & b.isnan())).all()) and a.dtype == b.dtype for a, b in pairs
    )


def _close(expected: Any, found: Any) -> bool:
    """Return whether all results agree up to rounding, relative to the largest of each.

    What is nothing but rounding may differ, such as the gradient of a bias before batch norm.
    """
    leaves = pytree.tree_leaves(expected)
    least = _NOTHING * max(float(a.double().abs().amax()) for a in leaves if a.numel())
    for a, b in zip(leaves, pytree.tree_leaves(found), strict=True):
        size = a.double().abs()
        apart = (a.double() - b.double()).abs()
        if a.numel() and not bool(apart.amax() <= _ROUNDING * size.amax().clamp(min=least)):
            return False
    return True
