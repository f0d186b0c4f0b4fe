"""How the tasks of a batch run: batched by `torch.vmap`, one after another, or over threads.

A task function receives the network, its parameters and the rows of *one* task, and is written
as if no other task existed. The engine maps it over T tasks. All kinds agree to rounding;
for a fixed kind, chunk and number of threads the result is the same bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metarun import processes
from metarun.backbones.layers import set_native

Kind = Literal["auto", "vmap", "loop", "threads"]
KINDS: tuple[Kind, ...] = ("auto", "vmap", "loop", "threads")
Params = dict[str, Tensor]
Tensors = tuple[Tensor, ...]
TaskFunction = Callable[..., Any]


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

    Raises:
        ValueError: A word or a number is not allowed.
    """

    kind: Kind = "auto"
    tasks_per_chunk: int | None = None
    threads: int | None = None
    native: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"engine={self.kind}: expected one of {', '.join(KINDS)}")
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
        """The three settings, for the record of a run."""
        return {
            "engine": self.kind,
            "tasks_per_chunk": self.tasks_per_chunk,
            "threads": self.threads,
        }

    def gradients(
        self, function: TaskFunction, net: nn.Module, params: Params, rows: Tensors
    ) -> tuple[Params, Any]:
        """Gradient of the mean loss over T tasks.

        Args:
            function: `function(net, params, *rows of one task) -> (loss, extras)`, with a
                0-dimensional loss and any nest of tensors beside it.
            net: Handed to `function`, which calls it with `torch.func.functional_call`.
            params: What to differentiate by, by name.
            rows: Tensors with a leading dimension of T.

        Returns:
            The gradients by name, and the extras stacked over tasks (leading T), detached.
        """
        names = list(params)
        leaves = [params[name] for name in names]
        scale = 1.0 / rows[0].shape[0]

        def backward(chunk_net: nn.Module, chunk: Tensors, batched: bool) -> tuple[Tensors, Any]:
            # Prediction runs under no_grad and worker threads start with it off: say it here.
            with torch.enable_grad():
                losses, extras = _call(function, batched, chunk_net, params, chunk)
                grads = torch.autograd.grad(
                    losses.sum() * scale, leaves, allow_unused=True, materialize_grads=True
                )
            return grads, pytree.tree_map(torch.detach, extras)

        total: Tensors | None = None
        extras = []
        for grads, extra in self._run(backward, net, rows):
            total = grads if total is None else tuple(map(torch.add, total, grads))
            extras.append(extra)
        assert total is not None
        return dict(zip(names, total, strict=True)), _concatenate(extras)

    def map(self, function: TaskFunction, net: nn.Module, params: Params, rows: Tensors) -> Any:
        """Values of `function(net, params, *rows of one task)`, stacked over tasks, no graph."""

        def forward(chunk_net: nn.Module, chunk: Tensors, batched: bool) -> Any:
            with torch.no_grad():
                return _call(function, batched, chunk_net, params, chunk)

        return _concatenate(list(self._run(forward, net, rows)))

    def _run(
        self, work: Callable[[nn.Module, Tensors, bool], Any], net: nn.Module, rows: Tensors
    ) -> Iterator[Any]:
        """Results of `work` on the chunks of the batch, in order."""
        num_tasks = rows[0].shape[0]
        workers = min(self.threads or 1, num_tasks) if self.kind == "threads" else 1
        size = min(self._chunk(rows, workers), num_tasks)
        batched = size > 1
        chunks = list(_chunks(rows, size))
        if workers == 1 or len(chunks) == 1:
            own = net if batched else _replicate(net, native=self.native)
            for chunk in chunks:
                yield work(own, chunk, batched)
            return
        yield from _over_threads(work, net, chunks, batched, workers, self.native)

    def _chunk(self, rows: Tensors, workers: int) -> int:
        """Tasks that run together: by vmap if there is more than one."""
        if self.kind == "loop":
            return 1
        num_tasks = rows[0].shape[0]
        if self.kind == "vmap":
            return self.tasks_per_chunk or num_tasks
        most_rows = max(tensor.shape[1] for tensor in rows if tensor.dim() > 1)
        return self.tasks_per_chunk or (-(-num_tasks // workers) if most_rows <= _FEW_ROWS else 1)


def _call(
    function: TaskFunction, batched: bool, net: nn.Module, params: Params, rows: Tensors
) -> Any:
    """Results for a chunk with a leading dimension of tasks."""
    if batched:
        return torch.vmap(lambda *task: function(net, params, *task))(*rows)
    result = function(net, params, *(tensor[0] for tensor in rows))
    return pytree.tree_map(lambda tensor: tensor.unsqueeze(0), result)


def _over_threads(
    work: Callable[[nn.Module, Tensors, bool], Any],
    net: nn.Module,
    chunks: list[Tensors],
    batched: bool,
    workers: int,
    native: bool,
) -> Iterator[Any]:
    def begin() -> None:
        torch.set_num_threads(max(1, _cores() // workers))

    def share(worker: int) -> list[Any]:
        # functional_call swaps the parameters of the module that it runs, so that each thread
        # needs modules of its own; the tensors in them stay shared.
        replica = _replicate(net, native=native and not batched)
        return [work(replica, chunk, batched) for chunk in chunks[worker::workers]]

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        shares = list(pool.map(share, range(workers)))
    for position in range(len(chunks)):
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
