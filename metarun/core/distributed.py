"""Communication between the processes of a distributed run.

`torchrun` and similar launchers set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; the
tasks of a submitit job get them from submitit. After `start`, all processes call the functions of
this module in the same order. In a run of one process, each function returns its input. Torch is
imported only when processes communicate.

Shapes: T rows of this process, N rows of all processes.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from metarun.core.types import Share

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""Timeout of the process group. It is long because the main process may evaluate a stream alone
while the others wait."""


class ProcessLost(ConnectionError):  # noqa: N818 - an event, not an error of this process
    """Another process of the run has ended or cannot be reached."""

    def __init__(self) -> None:
        super().__init__("another process of the run is gone")


@dataclass(frozen=True, slots=True)
class Place:
    """Rank of a process in the run.

    Attributes:
        rank: Rank of the process, from 0.
        size: Number of processes in the run.
        local_rank, local_size: Rank and number of processes on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


_ALONE = Place()
_place = _ALONE
_alone = 0
"""Nesting depth of `on_main`, inside which the main process must not communicate."""


def place_from_environment() -> Place:
    """Return the place given by the environment variables, or that of a single process.

    Raises:
        ValueError: A variable is missing or is not a valid number.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return _ALONE
    size, rank = _number("WORLD_SIZE"), _number("RANK")
    if size < 2:
        return _ALONE
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank}: expected 0 to WORLD_SIZE - 1 = {size - 1}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(f"WORLD_SIZE={size} but {name} is not set: start with torchrun")
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
    local_size = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else size
    return Place(rank, size, local_rank, local_size)


def place_from_submitit() -> Place:
    """Return the place of this process among the tasks of its submitit job.

    Raises:
        ValueError: A variable of the job is not valid.
    """
    from submitit.helpers import TorchDistributedEnvironment

    # The device is chosen by the local rank: every process sees all GPUs of its machine.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    return place_from_environment()


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdigit():
        raise ValueError(f"{name}={text}: expected a whole number")
    return int(text)


def start(place: Place) -> None:
    """Join the process group and divide the machine's cores among its processes.

    Raises:
        ValueError: The processes cannot connect.
    """
    global _place
    if place.size == 1:
        return
    import torch
    import torch.distributed as dist

    # Gloo carries small CPU messages in addition to NCCL, so that no step waits for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"the {place.size} processes cannot connect: {why}") from error
    _place = place
    # torchrun sets OMP_NUM_THREADS=1 if the user has not set it.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, cores() // place.local_size))


def stop() -> None:
    """Leave the process group at the end of the run."""
    global _place
    if _place.size > 1:
        import torch.distributed as dist

        _place = _ALONE
        dist.destroy_process_group()


def size() -> int:
    """Return the number of processes of the run; 1 inside `on_main`."""
    return 1 if _alone else _place.size


def rank() -> int:
    """Return the rank of this process."""
    return _place.rank


def is_main() -> bool:
    """Return whether this process writes files, logs and shows output."""
    return _place.rank == 0


def local_rank() -> int | None:
    """Return the rank on this machine, which is its GPU's index; None in a single process."""
    return None if _place.size == 1 else _place.local_rank


def local_size() -> int:
    """Return the number of processes on this machine."""
    return _place.local_size


def cores() -> int:
    """Return the number of cores that the processes of this machine may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Tensors.


def mean(values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Average values over all processes, each weighted by its number of tasks.

    Args:
        values: Means over the tasks of this process, by name.
        count: Number of tasks of this process.
    """
    if size() == 1:
        return dict(values)
    import torch

    parts = [value.detach().reshape(-1) for value in values.values()]
    flat = torch.cat([*parts, parts[0].new_ones(1)]) * count
    _sum(flat)
    means = (flat[:-1] / flat[-1]).split([part.numel() for part in parts])
    return {
        name: part.reshape(value.shape).to(value.dtype)
        for (name, value), part in zip(values.items(), means, strict=True)
    }


def gather_rows(rows: Tensor, share: Share | None) -> Tensor:
    """Return the (N, …) rows of all processes in order, from the (T, …) rows of this one."""
    if share is None or size() == 1:
        return rows
    whole = rows.new_zeros(share.total, *rows.shape[1:])
    whole[share.first : share.first + share.count] = rows.detach()
    _sum(whole)
    return whole


def maximum(number: int) -> int:
    """Return the maximum of a number over all processes."""
    if size() == 1:
        return number
    import torch
    import torch.distributed as dist

    value = torch.tensor(number)
    with _reached():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def _sum(values: Tensor) -> None:
    import torch.distributed as dist

    with _reached():
        dist.all_reduce(values)


# Objects.


def gather_objects(value: T) -> list[T]:
    """Return the value of each process, in order of rank. Tensors have to be on the CPU."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    with _reached():
        dist.all_gather_object(found, value)
    return found


def on_main(work: Callable[[], T]) -> T:
    """Run a function in the main process only; all processes get its result or its error."""
    global _alone
    if size() == 1:
        return work()
    if not is_main():
        done, result = _broadcast(None)
        if not done:
            raise mark_reported(result)
        return result  # type: ignore[no-any-return]
    _alone += 1
    try:
        outcome: tuple[bool, Any] = True, work()
    except Exception as error:
        outcome = False, error
    finally:
        _alone -= 1
    _broadcast(outcome if outcome[0] else (False, _portable(outcome[1])))
    if not outcome[0]:
        raise outcome[1]
    return outcome[1]  # type: ignore[no-any-return]


def _broadcast(value: Any) -> Any:
    import torch.distributed as dist

    box = [value]
    with _reached():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    # Unpickling calls the constructor of an arbitrary exception, which may raise anything.
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def agreed() -> Iterator[None]:
    """Continue after the context only if no process raised an error inside it.

    Raises:
        ValueError: Another process raised an error.
    """
    mine: Exception | None = None
    try:
        yield
    except ProcessLost:
        raise
    except Exception as error:
        mine = error
    texts = gather_objects(None if mine is None else " ".join(str(mine).split()) or repr(mine))
    if mine is not None:
        raise mark_reported(mine)
    for number, text in enumerate(texts):
        if text is not None:
            raise mark_reported(ValueError(f"process {number}: {text}"))


def mark_reported(error: Exception) -> Exception:
    """Mark an error that every process raises, so that only the main process reports it."""
    error.metarun_reported = True  # type: ignore[attr-defined]
    return error


def should_report(error: BaseException) -> bool:
    """Return whether this process reports an error to the user."""
    return is_main() or not (
        getattr(error, "metarun_reported", False) or isinstance(error, ProcessLost)
    )


def error_prefix() -> str:
    """Return the prefix of an error message that names this process; empty in the main one."""
    return "" if is_main() else f"process {rank()}: "


@contextmanager
def _reached() -> Iterator[None]:
    """Replace torch's multi-line connection error by `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost from error
