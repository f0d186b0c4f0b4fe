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
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metarun import processes
from metarun.algorithms.graphs import GRAPH_KINDS, GraphKind, Graphs
from metarun.backbones.layers import set_native

Kind = Literal["auto", "vmap", "loop", "threads"]
KINDS: tuple[Kind, ...] = ("auto", "vmap", "loop", "threads")
Params = dict[str, Tensor]
Tensors = tuple[Tensor, ...]
TaskFunction = Callable[..., Any]
Work = Callable[[nn.Module, bool, Sequence[Tensor], Sequence[Tensor]], Any]
"""What a chunk of tasks comes to: of the network, whether the chunk has more than one task, the
parameters, and the rows."""


# Up to here a convolution is bound by overhead, which vmap shares over tasks; beyond, by
# arithmetic, which grouped convolutions do slowly (measured at 5 and at 75 rows of 28x28).
_FEW_ROWS = 16


@dataclass(frozen=True)
class Engine:
    """Maps a function of one task over a batch of tasks.

    Args:
        kind: `vmap`, `loop` or `threads`; `auto` is settled by `resolved`.
        tasks_per_chunk: Tasks that run together by vmap. None takes the whole batch for `vmap`;
            for `threads` an equal share each where tasks have few rows, else one at a time.
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
            chunk_net: nn.Module, batched: bool, leaves: Sequence[Tensor], chunk: Sequence[Tensor]
        ) -> tuple[Tensors, Any]:
            # Prediction runs under no_grad and worker threads start with it off: say it here.
            with torch.enable_grad():
                leaves = [leaf.requires_grad_() for leaf in leaves]
                here = dict(zip(names, leaves, strict=True))
                losses, extras = _call(function, batched, chunk_net, here, chunk)
                grads = torch.autograd.grad(
                    losses.sum() * scale, leaves, allow_unused=True, materialize_grads=True
                )
            return grads, pytree.tree_map(torch.detach, extras)

        total: Tensors | None = None
        extras = []
        leaves = tuple(params.values())
        # A chunk's gradient is its part of the mean over the whole batch.
        kept = _kept(key, ("gradients", scale), function, names)
        for grads, extra in self._run(backward, net, leaves, rows, kept):
            total = grads if total is None else tuple(map(torch.add, total, grads))
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
            chunk_net: nn.Module, batched: bool, leaves: Sequence[Tensor], chunk: Sequence[Tensor]
        ) -> Any:
            with torch.no_grad():
                here = dict(zip(names, leaves, strict=True))
                return _call(function, batched, chunk_net, here, chunk)

        leaves = tuple(params.values())
        kept = _kept(key, ("map",), function, names)
        return _concatenate(list(self._run(forward, net, leaves, rows, kept)))

    def _run(
        self, work: Work, net: nn.Module, leaves: Tensors, rows: Tensors, key: Hashable
    ) -> Iterator[Any]:
        """Results of `work` on the chunks of the batch, in order."""
        num_tasks = rows[0].shape[0]
        workers = min(self.threads or 1, num_tasks) if self.kind == "threads" else 1
        size = min(self._chunk(rows, workers), num_tasks)
        batched = size > 1
        chunks = list(_chunks(rows, size))
        native = self.native and not batched
        replays = self._replays(work, net, native, batched, leaves, chunks, key)
        if workers == 1 or len(chunks) == 1:
            own = _replicate(net) if native and None in replays else net
            for chunk, replay in zip(chunks, replays, strict=True):
                yield replay(chunk) if replay else work(own, batched, leaves, chunk)
            return

        def share(worker: int) -> list[Any]:
            # functional_call swaps the parameters of the module that it runs, so that each thread
            # needs modules of its own; the tensors in them stay shared.
            own = _replicate(net, native=native) if None in replays else net
            return [
                replay(chunk) if replay else work(own, batched, leaves, chunk)
                for chunk, replay in list(zip(chunks, replays, strict=True))[worker::workers]
            ]

        yield from _over_threads(share, len(chunks), workers)

    def _replays(
        self,
        work: Work,
        net: nn.Module,
        native: bool,
        batched: bool,
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
            own = _replicate(net) if native else net
            # Buffers are arguments, too, so that a replay reads what they are by then.
            here = dict(zip((f"net.{name}" for name in named), buffers, strict=True))
            return torch.func.functional_call(
                _Holder(own), here, (lambda held: work(held, batched, leaves, chunk),)
            )

        found: dict[int, Callable[..., Any] | None] = {}
        for chunk in (chunks[0], chunks[-1]):
            size = chunk[0].shape[0]
            if size not in found:
                found[size] = self.graphs.find(
                    self.graph, (key, net, native, batched), whole, (leaves, buffers, chunk)
                )
        graphs = (found[chunk[0].shape[0]] for chunk in chunks)
        return [graph and partial(graph, leaves, buffers) for graph in graphs]

    def _chunk(self, rows: Tensors, workers: int) -> int:
        """Tasks that run together: by vmap if there is more than one."""
        if self.kind == "loop":
            return 1
        num_tasks = rows[0].shape[0]
        if self.kind == "vmap":
            return self.tasks_per_chunk or num_tasks
        most_rows = max(tensor.shape[1] for tensor in rows if tensor.dim() > 1)
        return self.tasks_per_chunk or (-(-num_tasks // workers) if most_rows <= _FEW_ROWS else 1)


class _Holder(nn.Module):
    """A network within a module, for `functional_call` to swap tensors of."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.net)


def _kept(key: Hashable, work: Hashable, function: TaskFunction, names: list[str]) -> Hashable:
    """A key with what a caller cannot forget."""
    return None if key is None else (key, work, function.__code__, tuple(names))


def _call(
    function: TaskFunction, batched: bool, net: nn.Module, params: Params, rows: Sequence[Tensor]
) -> Any:
    """Results for a chunk with a leading dimension of tasks."""
    if batched:
        return torch.vmap(lambda *task: function(net, params, *task))(*rows)
    result = function(net, params, *(tensor[0] for tensor in rows))
    return pytree.tree_map(lambda tensor: tensor.unsqueeze(0), result)


def _over_threads(
    share: Callable[[int], list[Any]], num_chunks: int, workers: int
) -> Iterator[Any]:
    """Results in the order of the chunks, of which worker w has every `workers`-th from w on."""

    def begin() -> None:
        torch.set_num_threads(max(1, _cores() // workers))

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        shares = list(pool.map(share, range(workers)))
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
    return max(1, processes.cores() // processes.local_size())
