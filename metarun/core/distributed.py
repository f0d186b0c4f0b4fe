"""Several processes that make one run: who they are, and what they tell each other.

`torchrun` and the like say in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT that a
program was started several times for one piece of work. After `start` the processes meet in the
functions here, which all of them call in the same order; in a program that was started once,
each of them returns what it was given. torch is imported with the group.

Shapes: T rows of this process, N rows of all.
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
"""The others wait for so long while the first lives through a stream by itself."""


class ProcessLost(ConnectionError):  # noqa: N818 - what happened, not an error of this process
    """Another process of the run is gone."""

    def __init__(self) -> None:
        super().__init__("another process of the run is gone")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands among all.

    Attributes:
        rank: Its number, from 0.
        size: Number of all.
        local_rank, local_size: The same on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


_ALONE = Place()
_place = _ALONE
_alone = 0
"""Depth of `on_main`, in which the first process has nobody to ask."""


def place_from_environment() -> Place:
    """What the environment says; one process if it says nothing.

    Raises:
        ValueError: It says half of it, or no numbers.
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
            raise ValueError(f"WORLD_SIZE={size}, and {name} is not set: start with torchrun")
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
    local_size = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else size
    return Place(rank, size, local_rank, local_size)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdigit():
        raise ValueError(f"{name}={text}: expected a whole number")
    return int(text)


def start(place: Place) -> None:
    """Meet the others; gives each process its share of the machine's cores.

    Raises:
        ValueError: They cannot be reached.
    """
    global _place
    if place.size == 1:
        return
    import torch
    import torch.distributed as dist

    # Small messages go over the CPU beside NCCL, so that no step waits for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"the {place.size} processes cannot meet: {why}") from error
    _place = place
    # torchrun sets 1 where nobody has chosen a number.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, cores() // place.local_size))


def stop() -> None:
    """Leave the others, at the end of the work."""
    global _place
    if _place.size > 1:
        import torch.distributed as dist

        _place = _ALONE
        dist.destroy_process_group()


def size() -> int:
    """Number of processes that make the run together; 1 inside of `on_main`."""
    return 1 if _alone else _place.size


def rank() -> int:
    """This one's number."""
    return _place.rank


def is_main() -> bool:
    """Whether this is the process that writes, logs and shows."""
    return _place.rank == 0


def local_rank() -> int | None:
    """This one's number on its machine, which is that of its GPU; None in a process alone."""
    return None if _place.size == 1 else _place.local_rank


def local_size() -> int:
    """Number of processes on this machine."""
    return _place.local_size


def cores() -> int:
    """Cores of this machine that all of its processes may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Tensors.


def mean(values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Means over all processes of means over `count` tasks in each, by name."""
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
    """(N, …) rows of all processes in order, from the (T, …) of this one's share."""
    if share is None or size() == 1:
        return rows
    whole = rows.new_zeros(share.total, *rows.shape[1:])
    whole[share.first : share.first + share.count] = rows.detach()
    _sum(whole)
    return whole


def maximum(number: int) -> int:
    """The largest of the processes' numbers."""
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
    """What each process has, in order; tensors have to be on the CPU."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    with _reached():
        dist.all_gather_object(found, value)
    return found


def on_main(work: Callable[[], T]) -> T:
    """Let the first process do a piece of work by itself; all get its result, or its error."""
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
    # Whatever another's exception does when it is made again.
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def agreed() -> Iterator[None]:
    """Go on only if nothing is wrong in any process.

    Raises:
        ValueError: Something is wrong in another one.
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
    """Mark an error that all processes have, so that the first alone speaks of it."""
    error.metarun_reported = True  # type: ignore[attr-defined]
    return error


def should_report(error: BaseException) -> bool:
    """Whether this process is the one to tell a user of an error."""
    return is_main() or not (
        getattr(error, "metarun_reported", False) or isinstance(error, ProcessLost)
    )


def error_prefix() -> str:
    """Who speaks, in front of an error; nothing of the first process."""
    return "" if is_main() else f"process {rank()}: "


@contextmanager
def _reached() -> Iterator[None]:
    """Turn torch's many lines about a connection into one error."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost from error
