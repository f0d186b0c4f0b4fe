"""An experiment: replayed steps captured as CUDA graphs, which metarun does not do yet.

    python tests/gpu/captured.py

`graph=replay` launches the operators of a step one by one, and `graph=compile` makes a CUDA graph
of them after minutes of compiling. Capturing a replay directly would avoid both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metarun.bench.implementations import algorithm_of, batch_of
from metarun.bench.measuring import interleave
from metarun.bench.workloads import Variant, Workload, select
from metarun.core.types import Progress
from metarun.execution.engine import Engine
from metarun.execution.graph_replay import Graphs

Graph = Callable[..., Any]
GPU = torch.device("cuda")


class Captured(Graphs):
    """Graphs that capture each replay as one CUDA graph."""

    def find(self, kind: Any, key: Any, function: Any, args: Any) -> Graph | None:
        known = set(self._made)
        graph = super().find(kind, key, function, args)
        for new in self._made.keys() - known:
            graph = self._made[new] = graph and captured(graph, args)
        return graph


def captured(graph: Graph, args: Sequence[Sequence[Tensor]]) -> Graph:
    """A replay as a CUDA graph, with copies of its arguments and results."""
    places = [[tensor.detach().clone() for tensor in tensors] for tensors in args]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        # Warm up: libraries choose algorithms and allocate memory at the first calls.
        for _ in range(3):
            graph(*places)
    torch.cuda.current_stream().wait_stream(aside)
    whole = torch.cuda.CUDAGraph()
    with torch.cuda.graph(whole):
        results = graph(*places)

    def run(*values: Sequence[Tensor]) -> Any:
        for place, tensor in zip(chain(*places), chain(*values), strict=True):
            place.copy_(tensor.detach())
        whole.replay()
        return pytree.tree_map(torch.clone, results)

    return run


def measure(workload: Workload) -> None:
    """Print the time of a step, and the largest difference of the parameters after one step."""
    steps: dict[str, Callable[[], Any]] = {}
    learned: dict[str, list[Tensor]] = {}
    for name, graphs in (("replayed", Graphs()), ("captured", Captured())):
        algorithm = algorithm_of(workload, Variant(), GPU, outer_lr=1e-3)
        algorithm.engine = Engine("vmap", graph="replay", graphs=graphs)
        batch = batch_of(workload, GPU, torch.float32)
        steps[name] = partial(algorithm.update, batch, Progress(0, 1))
        steps[name]()
        learned[name] = [param.detach().clone() for param in algorithm.parameters()]
        made = [graph is not None for graph in graphs._made.values()]
        # Nothing is replayed if an operator does not repeat its result bit for bit.
        print(f"{workload.name}, {name}: {sum(made)} of {len(made)} graphs")
    pairs = zip(*learned.values(), strict=True)
    gap = max(float((one - other).abs().max()) for one, other in pairs)
    for name, times in interleave(steps, 2.0, GPU).items():
        print(
            f"{workload.name}, {name}: {1e3 * times.median:.3f} ms, parameters differ by {gap:.1e}"
        )


if __name__ == "__main__":
    for workload in select(["sinusoid", "conv4-1", "protonet"]):
        measure(workload)
