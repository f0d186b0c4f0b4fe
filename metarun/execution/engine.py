"""Execution of the tasks of a batch: with `torch.vmap`, in a loop, or over threads.

A task function receives the network, its parameters and the rows of *one* task. The engine maps it
over T tasks. All kinds agree up to rounding. For a fixed kind, chunk size and number of threads
the result is the same bit for bit.

Shapes: T tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metarun.backbones.layers.normalization import set_native
from metarun.core import distributed
from metarun.core.checks import at_least
from metarun.core.once import once_per_network
from metarun.execution.graph_replay import GraphKind, Graphs, Replay, layouts
from metarun.execution.watching import unwatched

Kind = Literal["auto", "vmap", "loop", "threads"]
Params = dict[str, Tensor]
Tensors = tuple[Tensor, ...]
TaskFunction = Callable[..., Any]
ChunkMode = Literal["single", "batched", "two_stage"]
"""Mode of a chunk: one task, several tasks by vmap, or the first stage by vmap and the second task
by task."""


@dataclass(frozen=True)
class TwoStageTask:
    """Task function in two stages: adapt on some of the rows, then predict on all of them.

    A support set may have few rows while its queries are many. Tasks then run together in the
    first stage, where they share overhead, and one by one in the second.

    Args:
        adapt: First stage, `adapt(net, params, *support rows) -> dict of floating tensors`, such
            as adapted weights.
        predict: Second stage, `predict(net, params, result of adapt, *all rows)`, which returns
            the result of the function.
        reads: Positions of the rows that `adapt` receives.
    """

    adapt: TaskFunction
    predict: TaskFunction
    reads: tuple[int, ...]

    def __call__(self, net: nn.Module, params: Params, *rows: Tensor) -> Any:
        made = self.adapt(net, params, *self.support_rows(rows))
        return self.predict(net, params, made, *rows)

    def support_rows(self, rows: Sequence[Tensor]) -> Tensors:
        """Return the rows that `adapt` receives."""
        return tuple(rows[i] for i in self.reads)


Work = Callable[["_Nets", ChunkMode, Sequence[Tensor], Sequence[Tensor]], Any]
"""Function that computes the results of a chunk from the networks, the mode, the parameters and the
rows."""

# Up to this number of rows a convolution is bound by overhead, which vmap shares over tasks.
# Beyond, it is bound by arithmetic, which is slow in the grouped convolutions of vmap (measured at
# 5 and at 75 rows of 28x28).
_FEW_ROWS = 16
# More tasks per two-stage chunk bring no further speed (measured with 4, 8 and 16) and need more
# memory for the backward pass of the first stage.
_TWO_STAGE_TASKS = 8


@dataclass(frozen=True)
class Engine:
    """Executor that maps a function of one task over a batch of tasks.

    Args:
        kind: `vmap`, `loop` or `threads`; `auto` is replaced by `resolved`.
        tasks_per_chunk: Number of tasks that run together by vmap. For `vmap`, None takes the
            whole batch. For `threads`, it takes an equal share per thread if tasks have few rows,
            else one task. The first stage of a `TwoStageTask` decides by its own rows.
        threads: Number of Python threads of `threads`, which share the cores equally; None takes
            one per core.
        native: Whether tasks outside vmap may use the operators of `set_native`. A function that
            calls vmap itself cannot use them.
        graph: Whether and how functions are replayed, see `Graphs.find`.
        graphs: Cache of the traced graphs.

    Raises:
        ValueError: A number is out of range.
    """

    kind: Kind = "auto"
    tasks_per_chunk: int | None = None
    threads: int | None = None
    native: bool = True
    graph: GraphKind = "auto"
    graphs: Graphs = field(default_factory=Graphs, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {"tasks_per_chunk": self.tasks_per_chunk, "threads": self.threads}
        at_least("", 1, null="or null", **sizes)

    def resolved(self, net: nn.Module, device: torch.device) -> Engine:
        """Return the engine with `auto` replaced by the best kind for a network and a device.

        Dense networks and GPUs are bound by the overhead of operators, which vmap shares over
        tasks. For convolutions on a CPU, threads over tasks make the best use of the cores.
        """
        if self.kind != "auto" and self.threads:
            return self
        threads = self.threads or _cores()
        kind = self.kind
        if kind == "auto":
            kind = "threads" if _has_convolutions(net) and device.type == "cpu" else "vmap"
        return replace(self, kind=kind, threads=threads)

    def describe(self) -> dict[str, str | int | None]:
        """Return the settings, for the record of a run."""
        return {
            "engine": self.kind,
            "graph": self.graph,
            "tasks_per_chunk": self.tasks_per_chunk,
            "threads": self.threads,
        }

    def gradients(
        self,
        function: TaskFunction,
        net: nn.Module,
        params: Params,
        rows: Tensors,
    ) -> tuple[Params, Any]:
        """Compute the gradient of the mean loss over T tasks.

        Args:
            function: Task function, `function(net, params, *rows of one task) -> (loss, extras)`,
                with a 0-dimensional loss and any nest of tensors as extras.
            net: Network passed to `function`, which calls it with `torch.func.functional_call`.
            params: Parameters by name with respect to which the loss is differentiated.
            rows: Tensors with a leading dimension T.

        Returns:
            The gradients by name, and the extras stacked over tasks (leading dimension T),
            detached.
        """
        names, scale = tuple(params), 1.0 / rows[0].shape[0]
        total: Tensors | None = None
        extras = []
        leaves = tuple(params.values())
        # The gradient of a chunk is its contribution to the mean over the whole batch.
        site = "gradients", scale, names, _codes(function)
        work = _backward(function, names, scale)
        for grads, extra in self._run(function, work, net, leaves, rows, site):
            total = _added(total, grads)
            extras.append(extra)
        assert total is not None
        return dict(zip(names, total, strict=True)), _concatenate(extras)

    def program(
        self,
        function: TaskFunction,
        net: nn.Module,
        params: Params,
        more: Tensors,
        rows: Tensors,
        then: Callable[[Sequence[Tensor], Tensors, Any, Sequence[Tensor]], Tensors],
        key: Hashable,
    ) -> Program | None:
        """Return a compiled program of `gradients` and of what follows them.

        Args:
            function, net, params, rows: See `gradients`.
            more: Further arguments of `then`.
            then: Pure function of the parameters, their gradients, the extras and `more`.
            key: All that `then` depends on besides its arguments.

        Returns:
            The program; None if there is none, because the tasks do not run together, or because
            the function reads what cannot be compared between calls.
        """
        num_tasks = rows[0].shape[0]
        if self.graph != "compile" or self.kind != "vmap":
            return None
        size, mode = self._plan(function, rows, workers=1)
        if size != num_tasks:
            return None
        work = _backward(function, tuple(params), 1.0 / num_tasks)
        named = _fixed(net)

        def whole(
            leaves: Sequence[Tensor],
            buffers: Sequence[Tensor],
            more: Sequence[Tensor],
            rows: Sequence[Tensor],
        ) -> Tensors:
            def run(nets: _Nets) -> Tensors:
                grads, extras = work(nets, mode, leaves, rows)
                return then(leaves, grads, extras, more)

            made: Tensors = self._with_buffers(net, list(named), buffers, run)
            return made

        leaves, buffers = tuple(params.values()), tuple(named.values())
        site = "program", tuple(params), _codes(function), key, self.native, mode
        args = leaves, buffers, more, rows
        found = self.graphs.find(self.graph, site, function, net, whole, args)
        return Program(found, buffers, layouts(rows)) if isinstance(found, Replay) else None

    def map(
        self,
        function: TaskFunction,
        net: nn.Module,
        params: Params,
        rows: Tensors,
    ) -> Any:
        """Return `function(net, params, *rows of one task)` stacked over tasks, without a graph.

        Args:
            function, net, params, rows: See `gradients`.
        """
        names = list(params)

        def forward(
            nets: _Nets, mode: ChunkMode, leaves: Sequence[Tensor], chunk: Sequence[Tensor]
        ) -> Any:
            with torch.no_grad():
                here = dict(zip(names, leaves, strict=True))
                return _call(function, nets, mode, here, chunk)

        leaves = tuple(params.values())
        site = "map", tuple(names), _codes(function)
        # On a CPU an evaluation has too few batches for a compilation.
        replays = self.graph == "compile" and not rows[0].is_cuda
        engine = replace(self, graph="auto") if replays else self
        found = list(engine._run(function, forward, net, leaves, rows, site))
        # A view of a parameter requires gradients, even one made under no_grad.
        return _detached(_concatenate(found))

    def _run(
        self,
        function: TaskFunction,
        work: Work,
        net: nn.Module,
        leaves: Tensors,
        rows: Tensors,
        site: Hashable,
    ) -> Iterator[Any]:
        """Yield the results of `work` on the chunks of the batch, in order."""
        num_tasks = rows[0].shape[0]
        workers = min(self.threads or 1, num_tasks) if self.kind == "threads" else 1
        size, mode = self._plan(function, rows, workers)
        chunks = list(_chunks(rows, size))
        workers = min(workers, len(chunks))
        found = self._found(function, work, net, mode, leaves, chunks, site)

        def share(worker: int) -> Iterator[Any]:
            # functional_call swaps the parameters of the module that it runs. Each thread
            # therefore needs its own modules; their tensors are shared.
            nets = _Nets(net, native=self.native, own=workers > 1)
            for chunk, run in list(zip(chunks, found, strict=True))[worker::workers]:
                yield run(chunk) if run else work(nets, mode, leaves, chunk)

        yield from share(0) if workers == 1 else _over_threads(share, len(chunks), workers)

    def _found(
        self,
        function: TaskFunction,
        work: Work,
        net: nn.Module,
        mode: ChunkMode,
        leaves: Tensors,
        chunks: list[Tensors],
        site: Hashable,
    ) -> list[Callable[[Tensors], Any] | None]:
        """Return what takes the place of `work` for each chunk, or None where nothing does."""
        if self.graph == "none":
            return [None] * len(chunks)
        named = _fixed(net)
        buffers = tuple(named.values())

        def whole(
            leaves: Sequence[Tensor], buffers: Sequence[Tensor], chunk: Sequence[Tensor]
        ) -> Any:
            return self._with_buffers(
                net, list(named), buffers, lambda nets: work(nets, mode, leaves, chunk)
            )

        site = site, self.native, mode
        by_size = {}
        # Chunks have the same size, except for the last one.
        for chunk in {chunks[i][0].shape[0]: chunks[i] for i in (-1, 0)}.values():
            args = leaves, buffers, chunk
            found = self.graphs.find(self.graph, site, function, net, whole, args)
            by_size[chunk[0].shape[0]] = chunk, found

        def of(chunk: Tensors) -> Callable[[Tensors], Any] | None:
            tried, found = by_size[chunk[0].shape[0]]
            if isinstance(found, Replay):
                return partial(found.function, leaves, buffers)
            return (lambda _: found.result) if found is not None and chunk is tried else None

        return [of(chunk) for chunk in chunks]

    def _with_buffers(
        self,
        net: nn.Module,
        names: list[str],
        buffers: Sequence[Tensor],
        run: Callable[[_Nets], Any],
    ) -> Any:
        """Return `run(nets)`. Buffers are arguments, so that a replay reads their values now."""
        nets = _Nets(net, native=self.native, own=False)
        with unwatched():
            holder = _Holder(nets)
        here = {
            f"nets.{part}.{name}": buffer
            for part in range(len(holder.nets))
            for name, buffer in zip(names, buffers, strict=True)
        }
        return torch.func.functional_call(holder, here, (lambda: run(nets),))

    def _plan(self, function: TaskFunction, rows: Tensors, workers: int) -> tuple[int, ChunkMode]:
        """Return the number of tasks of a chunk, and its mode."""
        num_tasks = rows[0].shape[0]
        share = -(-num_tasks // workers)
        size, two_stage = 1, False
        if self.kind == "vmap":
            size = self.tasks_per_chunk or num_tasks
        elif self.kind == "threads" and (self.tasks_per_chunk or _few(rows)):
            size = self.tasks_per_chunk or share
        elif self.kind == "threads" and isinstance(function, TwoStageTask):
            two_stage = _few(function.support_rows(rows))
            size = -(-share // -(-share // _TWO_STAGE_TASKS)) if two_stage else 1
        size = min(size, num_tasks)
        return size, "single" if size == 1 else "two_stage" if two_stage else "batched"


@dataclass(frozen=True)
class Program:
    """A compiled program of `Engine.program`.

    Attributes:
        replay: The program, and what its function reads besides its arguments.
        buffers: Buffers and frozen parameters of the network.
        layouts: Layouts of the rows.
    """

    replay: Replay
    buffers: Tensors
    layouts: Hashable

    def fits(self, function: TaskFunction, rows: Tensors) -> bool:
        """Return whether the program computes a function, on rows of these shapes.

        Nothing else that the function reads may have changed since the program was found.
        """
        return layouts(rows) == self.layouts and self.replay.guards.hold_for(function)

    def __call__(self, leaves: Sequence[Tensor], more: Sequence[Tensor], rows: Tensors) -> Tensors:
        made: Tensors = self.replay.function(leaves, self.buffers, more, rows)
        return made


class _Nets:
    """Two forms of a network: one for vmap, and the fastest one for a single task.

    Args:
        net: Network of the caller.
        native: See `Engine`.
        own: Whether to copy the modules, for use in a thread.
    """

    def __init__(self, net: nn.Module, *, native: bool, own: bool) -> None:
        self._net = net
        self._native = native
        self._own = own

    @cached_property
    def batched(self) -> nn.Module:
        return _replicate(self._net, native=False) if self._own else self._net

    @cached_property
    def alone(self) -> nn.Module:
        return _replicate(self._net) if self._native else self.batched


class _Holder(nn.Module):
    """Module that contains the networks, so that `functional_call` can replace their buffers."""

    def __init__(self, nets: _Nets) -> None:
        super().__init__()
        # functional_call would not restore the tensors of a module that is registered twice.
        self.nets = nn.ModuleList(dict.fromkeys((nets.batched, nets.alone)))

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


@once_per_network
def _has_convolutions(net: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in net.modules())


def _fixed(net: nn.Module) -> dict[str, Tensor]:
    """Return the buffers and the frozen parameters of a network, which are not among the leaves."""
    named = {}
    for path, module in net.named_modules():
        learned = module._parameters.items()
        frozen = ((n, p) for n, p in learned if p is not None and not p.requires_grad)
        for name, tensor in (*module._buffers.items(), *frozen):
            if tensor is not None:
                named[f"{path}.{name}" if path else name] = tensor
    return named


def _codes(function: Any) -> Any:
    """Return the code of a function, or of both of its stages."""
    if isinstance(function, TwoStageTask):
        return _codes(function.adapt), _codes(function.predict)
    function = getattr(function, "__func__", function)
    return function.__code__ if hasattr(function, "__code__") else type(function)


def _backward(function: TaskFunction, names: tuple[str, ...], scale: float) -> Work:
    """Return the gradients of `scale` times the losses of a chunk, and the extras."""

    def work(
        nets: _Nets, mode: ChunkMode, leaves: Sequence[Tensor], chunk: Sequence[Tensor]
    ) -> tuple[Tensors, Any]:
        # Callers may run under no_grad, and worker threads have their own grad mode.
        with torch.enable_grad():
            # Each chunk has its own leaves: threads that accumulate into one leaf can
            # deadlock, when one holds the interpreter lock and waits for the leaf.
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            here = dict(zip(names, leaves, strict=True))
            if mode == "two_stage":
                assert isinstance(function, TwoStageTask)
                return _two_stage_gradients(function, nets, here, chunk, scale)
            losses, extras = _call(function, nets, mode, here, chunk)
            return _pulled((losses.sum() * scale,), leaves), _detached(extras)

    return work


def _call(
    function: TaskFunction, nets: _Nets, mode: ChunkMode, params: Params, rows: Sequence[Tensor]
) -> Any:
    """Return the results of a chunk, with a leading dimension of tasks."""
    if mode == "batched":
        return torch.vmap(lambda *task: function(nets.batched, params, *task))(*rows)
    if mode == "single":
        return _unsqueezed(function(nets.alone, params, *(tensor[0] for tensor in rows)))
    assert isinstance(function, TwoStageTask)
    made = _adapt(function, nets, params, rows)
    results = [
        _unsqueezed(function.predict(nets.alone, params, own, *task))
        for own, task in zip(_by_task(made), zip(*rows, strict=True), strict=True)
    ]
    return _concatenate(results)


def _adapt(function: TwoStageTask, nets: _Nets, params: Params, rows: Sequence[Tensor]) -> Params:
    """Run the first stage of a chunk by vmap."""
    made: Params = torch.vmap(lambda *task: function.adapt(nets.batched, params, *task))(
        *function.support_rows(rows)
    )
    return made


def _by_task(made: Params) -> list[Params]:
    columns = zip(*(tensor.unbind() for tensor in made.values()), strict=True)
    return [dict(zip(made, column, strict=True)) for column in columns]


def _two_stage_gradients(
    function: TwoStageTask, nets: _Nets, params: Params, rows: Sequence[Tensor], scale: float
) -> tuple[Tensors, Any]:
    """Return the gradients of a chunk's losses, and the extras, with a two-stage function.

    The backward pass of the second stage runs task by task, down to the results of the first
    stage. From there, the backward pass runs for all tasks together.
    """
    made = _adapt(function, nets, params, rows)
    leaves = tuple(params.values())
    total: Tensors | None = None
    pulled, extras = [], []
    for theirs, task in zip(_by_task(made), zip(*rows, strict=True), strict=True):
        own = {name: tensor.detach().requires_grad_() for name, tensor in theirs.items()}
        loss, extra = function.predict(nets.alone, params, own, *task)
        grads = _pulled((loss * scale,), (*own.values(), *leaves))
        pulled.append(grads[: len(own)])
        total = _added(total, grads[len(own) :])
        extras.append(_unsqueezed(_detached(extra)))
    assert total is not None
    stacked = (torch.stack(of_tasks) for of_tasks in zip(*pulled, strict=True))
    pairs = zip(made.values(), stacked, strict=True)
    # Results that do not depend on the parameters have no backward pass.
    back = {root: grad for root, grad in pairs if root.requires_grad}
    if back:
        total = _added(total, _pulled(tuple(back), leaves, tuple(back.values())))
    return total, _concatenate(extras)


def _pulled(
    outputs: Tensors, leaves: Sequence[Tensor], back: Sequence[Tensor] | None = None
) -> Tensors:
    """Return gradients with respect to leaves, with zeros where nothing depends on one."""
    return torch.autograd.grad(outputs, leaves, back, allow_unused=True, materialize_grads=True)


def _added(total: Tensors | None, more: Tensors) -> Tensors:
    return more if total is None else tuple(map(torch.add, total, more))


def _detached(nest: Any) -> Any:
    return pytree.tree_map(torch.detach, nest)


def _unsqueezed(nest: Any) -> Any:
    return pytree.tree_map(lambda tensor: tensor.unsqueeze(0), nest)


def _few(rows: Tensors) -> bool:
    """Return whether tasks have so few rows that running them together is faster."""
    return max(tensor.shape[1] for tensor in rows if tensor.dim() > 1) <= _FEW_ROWS


def _over_threads(
    share: Callable[[int], Iterator[Any]], num_chunks: int, workers: int
) -> Iterator[Any]:
    """Yield results in the order of the chunks; worker w runs chunks w, w + workers, …."""

    def begin() -> None:
        torch.set_num_threads(max(1, _cores() // workers))

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        shares = list(pool.map(lambda worker: list(share(worker)), range(workers)))
    for position in range(num_chunks):
        yield shares[position % workers][position // workers]


def _replicate(net: nn.Module, *, native: bool = True) -> nn.Module:
    """Copy the modules of a network but share its tensors; `native` applies `set_native`."""
    shared: dict[int, Any] = {id(t): t for t in (*net.parameters(), *net.buffers())}
    replica = copy.deepcopy(net, shared)
    if native:
        set_native(replica)
    return replica


def _chunks(rows: Tensors, size: int) -> Iterator[Tensors]:
    for start in range(0, rows[0].shape[0], size):
        yield tuple(tensor[start : start + size] for tensor in rows)


def _concatenate(results: list[Any]) -> Any:
    if len(results) == 1:
        return results[0]
    return pytree.tree_map(lambda *parts: torch.cat(parts), *results)


def _cores() -> int:
    """Return the number of cores of this process."""
    return max(1, distributed.cores() // distributed.local_size())
