"""How the tasks of a batch run: batched by `torch.vmap`, one after another, or over threads.

A task function receives the network, its parameters and the rows of *one* task, and is written
as if no other task existed. The engine maps it over T tasks. All kinds agree to rounding;
for a fixed kind, chunk and number of threads the result is the same bit for bit.
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
from metarun.execution.graph_replay import GRAPH_KINDS, GraphKind, Graphs

Kind = Literal["auto", "vmap", "loop", "threads"]
KINDS: tuple[Kind, ...] = ("auto", "vmap", "loop", "threads")
Params = dict[str, Tensor]
Tensors = tuple[Tensor, ...]
TaskFunction = Callable[..., Any]
ChunkMode = Literal["single", "batched", "two_stage"]
"""How a chunk runs: one task, several by vmap, or the first stage by vmap and then one by one."""


@dataclass(frozen=True)
class TwoStageTask:
    """A task function in two stages, the first of which sees only a part of the rows.

    Where those are few and all are many, as a support and its queries may be, tasks share the
    overhead of the first stage and go one by one through the second.

    Args:
        first: `first(net, params, *those rows) -> dict of floating tensors`, such as weights.
        then: `then(net, params, what first returned, *all rows)`, whose results are the function's.
        reads: The positions of the rows that `first` sees.
    """

    adapt: TaskFunction
    predict: TaskFunction
    reads: tuple[int, ...]

    def __call__(self, net: nn.Module, params: Params, *rows: Tensor) -> Any:
        made = self.adapt(net, params, *self.support_rows(rows))
        return self.predict(net, params, made, *rows)

    def support_rows(self, rows: Sequence[Tensor]) -> Tensors:
        """Those that `first` sees."""
        return tuple(rows[i] for i in self.reads)


Work = Callable[["_Nets", ChunkMode, Sequence[Tensor], Sequence[Tensor]], Any]
"""What a chunk of tasks comes to: of the network, how the chunk runs, the parameters, the rows."""

# Up to here a convolution is bound by overhead, which vmap shares over tasks; beyond, by
# arithmetic, which grouped convolutions do slowly (measured at 5 and at 75 rows of 28x28).
_FEW_ROWS = 16
# A chunk in stages has no more tasks than gain from each other (measured with 4, 8 and 16): what
# the first stage keeps for the way back grows with them.
_TWO_STAGE_TASKS = 8


@dataclass(frozen=True)
class Engine:
    """Maps a function of one task over a batch of tasks.

    Args:
        kind: `vmap`, `loop` or `threads`; `auto` is settled by `resolved`.
        tasks_per_chunk: Tasks that run together by vmap. None takes the whole batch for `vmap`;
            for `threads` an equal share each where tasks have few rows, else one at a time, but
            for the first stage of what is `TwoStageTask`.
        threads: Python threads of `threads`, each with an equal share of the cores; None
            takes one for each core.
        native: Whether tasks outside vmap may use layers as `set_native` makes them, which a
            function that calls vmap itself cannot.
        graph: Whether functions that come with a `key` are replayed as `Graphs.find` says.

    Raises:
        ValueError: A word or a number is not allowed.
    """

    kind: Kind = "auto"
    tasks_per_chunk: int | None = None
    threads: int | None = None
    native: bool = True
    graph: GraphKind = "auto"
    graphs: Graphs = field(default_factory=Graphs, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"engine={self.kind}: expected one of {', '.join(KINDS)}")
        if self.graph not in GRAPH_KINDS:
            raise ValueError(f"graph={self.graph}: expected one of {', '.join(GRAPH_KINDS)}")
        for name in ("tasks_per_chunk", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more, or null")

    def resolved(self, net: nn.Module, device: torch.device) -> Engine:
        """Settle what is left open, for a network and a device.

        Dense networks and GPUs are bound by the overhead of operators, which vmap shares over
        tasks; for convolutions on a CPU threads over tasks use the cores best.
        """
        threads = self.threads or _cores()
        kind = self.kind
        if kind == "auto":
            convolutional = any(isinstance(module, nn.Conv2d) for module in net.modules())
            kind = "threads" if convolutional and device.type == "cpu" else "vmap"
        return replace(self, kind=kind, threads=threads)

    def describe(self) -> dict[str, str | int | None]:
        """The settings, for the record of a run."""
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
        *,
        key: Hashable = None,
    ) -> tuple[Params, Any]:
        """Gradient of the mean loss over T tasks.

        Args:
            function: `function(net, params, *rows of one task) -> (loss, extras)`, with a
                0-dimensional loss and any nest of tensors beside it.
            net: Handed to `function`, which calls it with `torch.func.functional_call`.
            params: What to differentiate by, by name.
            rows: Tensors with a leading dimension of T.
            key: Everything that `function` depends on beside its arguments and what never
                changes: with the same key the operators of one call serve the next. None has
                it called each time.

        Returns:
            The gradients by name, and the extras stacked over tasks (leading T), detached.
        """
        names = list(params)
        scale = 1.0 / rows[0].shape[0]

        def backward(
            nets: _Nets, mode: ChunkMode, leaves: Sequence[Tensor], chunk: Sequence[Tensor]
        ) -> tuple[Tensors, Any]:
            # Prediction runs under no_grad and worker threads start with it off: say it here.
            with torch.enable_grad():
                # Its own, since threads that meet in the gradient of one leaf can lock each other
                # out for ever: one holds the interpreter and waits for the leaf, the other not.
                leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                here = dict(zip(names, leaves, strict=True))
                if mode == "two_stage":
                    assert isinstance(function, TwoStageTask)
                    return _two_stage_gradients(function, nets, here, chunk, scale)
                losses, extras = _call(function, nets, mode, here, chunk)
                return _pulled((losses.sum() * scale,), leaves), _detached(extras)

        total: Tensors | None = None
        extras = []
        leaves = tuple(params.values())
        # A chunk's gradient is its part of the mean over the whole batch.
        kept = _kept(key, ("gradients", scale), function, names)
        for grads, extra in self._run(function, backward, net, leaves, rows, kept):
            total = _added(total, grads)
            extras.append(extra)
        assert total is not None
        return dict(zip(names, total, strict=True)), _concatenate(extras)

    def map(
        self,
        function: TaskFunction,
        net: nn.Module,
        params: Params,
        rows: Tensors,
        *,
        key: Hashable = None,
    ) -> Any:
        """Values of `function(net, params, *rows of one task)`, stacked over tasks, no graph.

        Args:
            function, net, params, rows, key: As in `gradients`.
        """
        names = list(params)

        def forward(
            nets: _Nets, mode: ChunkMode, leaves: Sequence[Tensor], chunk: Sequence[Tensor]
        ) -> Any:
            with torch.no_grad():
                here = dict(zip(names, leaves, strict=True))
                return _call(function, nets, mode, here, chunk)

        leaves = tuple(params.values())
        kept = _kept(key, ("map",), function, names)
        return _concatenate(list(self._run(function, forward, net, leaves, rows, kept)))

    def _run(
        self,
        function: TaskFunction,
        work: Work,
        net: nn.Module,
        leaves: Tensors,
        rows: Tensors,
        key: Hashable,
    ) -> Iterator[Any]:
        """Results of `work` on the chunks of the batch, in order."""
        num_tasks = rows[0].shape[0]
        workers = min(self.threads or 1, num_tasks) if self.kind == "threads" else 1
        size, mode = self._plan(function, rows, workers)
        chunks = list(_chunks(rows, size))
        workers = min(workers, len(chunks))
        replays = self._replays(work, net, mode, leaves, chunks, key)

        def share(worker: int) -> Iterator[Any]:
            # functional_call swaps the parameters of the module that it runs, so that each thread
            # needs modules of its own; the tensors in them stay shared.
            nets = _Nets(net, native=self.native, own=workers > 1)
            for chunk, replay in list(zip(chunks, replays, strict=True))[worker::workers]:
                yield replay(chunk) if replay else work(nets, mode, leaves, chunk)

        yield from share(0) if workers == 1 else _over_threads(share, len(chunks), workers)

    def _replays(
        self,
        work: Work,
        net: nn.Module,
        mode: ChunkMode,
        leaves: Tensors,
        chunks: list[Tensors],
        key: Hashable,
    ) -> list[Callable[[Tensors], Any] | None]:
        """What to call in place of `work` for each chunk, where there is anything."""
        if key is None or self.graph == "none":
            return [None] * len(chunks)
        named = dict(net.named_buffers())
        buffers = tuple(named.values())

        def whole(
            leaves: Sequence[Tensor], buffers: Sequence[Tensor], chunk: Sequence[Tensor]
        ) -> Any:
            nets = _Nets(net, native=self.native, own=False)
            # Buffers are arguments, too, so that a replay reads what they are by then.
            holder = _Holder(nets)
            here = {
                f"nets.{part}.{name}": buffer
                for part in range(len(holder.nets))
                for name, buffer in zip(named, buffers, strict=True)
            }
            return torch.func.functional_call(
                holder, here, (lambda: work(nets, mode, leaves, chunk),)
            )

        found: dict[int, Callable[..., Any] | None] = {}
        for chunk in (chunks[0], chunks[-1]):
            size = chunk[0].shape[0]
            if size not in found:
                found[size] = self.graphs.find(
                    self.graph, (key, net, self.native, mode), whole, (leaves, buffers, chunk)
                )
        graphs = (found[chunk[0].shape[0]] for chunk in chunks)
        return [graph and partial(graph, leaves, buffers) for graph in graphs]

    def _plan(self, function: TaskFunction, rows: Tensors, workers: int) -> tuple[int, ChunkMode]:
        """Tasks of a chunk, and how they run."""
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


class _Nets:
    """A network as vmap bears it, and as it is fastest for a task alone.

    Args:
        net: The network.
        native: As in `Engine`.
        own: Whether both are a thread's own.
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
    """Networks within a module, for `functional_call` to swap tensors of."""

    def __init__(self, nets: _Nets) -> None:
        super().__init__()
        # One that stands there twice would not get its own tensors back.
        self.nets = nn.ModuleList(dict.fromkeys((nets.batched, nets.alone)))

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def _kept(key: Hashable, work: Hashable, function: TaskFunction, names: list[str]) -> Hashable:
    """A key with what a caller cannot forget."""
    if key is None:
        return None
    stages = (
        (function.adapt, function.predict) if isinstance(function, TwoStageTask) else (function,)
    )
    return key, work, tuple(stage.__code__ for stage in stages), tuple(names)


def _call(
    function: TaskFunction, nets: _Nets, mode: ChunkMode, params: Params, rows: Sequence[Tensor]
) -> Any:
    """Results for a chunk with a leading dimension of tasks."""
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
    """What the first stage makes of a chunk, by vmap."""
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
    """Gradients of a chunk's losses, and the extras: forth by stages, and back.

    The second stage goes back to what the first made, one task after another; from there all
    tasks go back together.
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
    # Constants lead nowhere.
    back = {root: grad for root, grad in pairs if root.requires_grad}
    if back:
        total = _added(total, _pulled(tuple(back), leaves, tuple(back.values())))
    return total, _concatenate(extras)


def _pulled(
    outputs: Tensors, leaves: Sequence[Tensor], back: Sequence[Tensor] | None = None
) -> Tensors:
    """Gradients by leaves, zero where nothing depends on one."""
    return torch.autograd.grad(outputs, leaves, back, allow_unused=True, materialize_grads=True)


def _added(total: Tensors | None, more: Tensors) -> Tensors:
    return more if total is None else tuple(map(torch.add, total, more))


def _detached(nest: Any) -> Any:
    return pytree.tree_map(torch.detach, nest)


def _unsqueezed(nest: Any) -> Any:
    return pytree.tree_map(lambda tensor: tensor.unsqueeze(0), nest)


def _few(rows: Tensors) -> bool:
    """Whether tasks have so few rows that they gain from running together."""
    return max(tensor.shape[1] for tensor in rows if tensor.dim() > 1) <= _FEW_ROWS


def _over_threads(
    share: Callable[[int], Iterator[Any]], num_chunks: int, workers: int
) -> Iterator[Any]:
    """Results in the order of the chunks, of which worker w has every `workers`-th from w on."""

    def begin() -> None:
        torch.set_num_threads(max(1, _cores() // workers))

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        shares = list(pool.map(lambda worker: list(share(worker)), range(workers)))
    for position in range(num_chunks):
        yield shares[position % workers][position // workers]


def _replicate(net: nn.Module, *, native: bool = True) -> nn.Module:
    """A copy of a network's structure around the same tensors; `native` as in `set_native`."""
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
    """Cores that are this process's own."""
    return max(1, distributed.cores() // distributed.local_size())
