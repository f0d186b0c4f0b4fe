"""Memory of a step, and throughput of several concurrent processes.

Each measurement runs in its own process, free of remains of other steps. Where the system supports
`forkserver`, this process is a copy of one that has only imported torch.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from metarun.bench.baselines import baseline_step
from metarun.bench.implementations import Step, our_step
from metarun.bench.workloads import Variant, Workload
from metarun.execution import allocator
from metarun.execution.graph_replay import CALLS_BEFORE_REPLAY

Side = Variant | str
"""A variant of our implementation, or the name of a baseline."""

_MIB = 2**20
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def step_of(
    side: Side, workload: Workload, device: torch.device, *, threads: int | None = None
) -> Step:
    """Return one step of our implementation or of a baseline."""
    if isinstance(side, str):
        return baseline_step(side, workload, device)
    return our_step(workload, side, device, threads=threads)[0]


def memory_of_step(side: Side, workload: Workload, device: torch.device) -> float | None:
    """Return the peak memory of a step in MiB, in addition to what is in use before it.

    It is torch's allocated memory on a GPU, and the memory of the process on a CPU. None on
    systems other than Linux, where it is not known.
    """
    if device.type == "cuda":
        return _on_gpu(step_of(side, workload, device), device)
    if not _CLEAR.exists():
        return None
    found = _in_a_process(_tell_memory, side, workload)
    assert found is None or isinstance(found, float)
    return found


def throughput(side: Side, workload: Workload, processes: int, seconds: float) -> float:
    """Return the tasks per second of concurrent processes with one CPU thread each.

    Raises:
        RuntimeError: A process died.
    """
    context = _context()
    pairs = [context.Pipe() for _ in range(processes)]
    children = [
        context.Process(target=_tell_speed, args=(theirs, side, workload, seconds))
        for _, theirs in pairs
    ]
    try:
        for child in children:
            child.start()
        for ours, theirs in pairs:
            theirs.close()
            ours.recv()
        for ours, _ in pairs:
            ours.send("go")
        steps = [ours.recv() for ours, _ in pairs]
    except EOFError:
        raise RuntimeError(
            f"one of {processes} processes died, probably for lack of memory: try fewer processes"
        ) from None
    finally:
        for child in children:
            if child.pid is not None:
                child.kill()
                child.join()
    return workload.tasks * float(sum(steps))


def _on_gpu(step: Step, device: torch.device) -> float:
    # Measured from before the first step, which may capture a graph that keeps its memory.
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(CALLS_BEFORE_REPLAY + 1):
        step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / _MIB


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(["metarun.bench.preloaded"])
    return context


def _in_a_process(tell: Callable[..., None], *what: Any) -> Any:
    """Run a function in a new process and return what it sends; None if the process dies."""
    context = _context()
    ours, theirs = context.Pipe()
    child = context.Process(target=tell, args=(theirs, *what))
    try:
        child.start()
        theirs.close()
        return ours.recv()
    except EOFError:
        return None
    finally:
        if child.pid is not None:
            child.kill()
            child.join()


def _tell_memory(connection: Connection, side: Side, workload: Workload) -> None:
    # Only the parent handles Ctrl-C; it then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    allocator.return_blocks()
    step = step_of(side, workload, torch.device("cpu"))
    # The first steps include late imports, traces and compilation, which are not part of a step.
    for _ in range(CALLS_BEFORE_REPLAY):
        step()
    gc.collect()
    # Growth of the process is then memory in use.
    allocator.trim()
    try:
        _CLEAR.write_text("5")
    except OSError:
        connection.send(None)
        return
    before = _status("VmRSS")
    # A new thread has a heap of its own. In that of this thread, traces have left gaps all over,
    # so that small tensors would touch more pages than they fill.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(step).result()
    connection.send(max(0.0, _status("VmHWM") - before))


def _tell_speed(connection: Connection, side: Side, workload: Workload, seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    step = step_of(side, workload, torch.device("cpu"), threads=1)
    for _ in range(CALLS_BEFORE_REPLAY):
        step()
    connection.send("ready")
    connection.recv()
    begin = time.perf_counter()
    done = 0
    while not done or time.perf_counter() - begin < seconds:
        step()
        done += 1
    connection.send(done / (time.perf_counter() - begin))


def _status(name: str) -> float:
    """Return the value in MiB of a line of the process's status."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"{_STATUS} has no {name}")
