"""Random numbers as a pure function of their purpose.

A draw is a hash of (seed, split, index, slot …). It is therefore the same on every device, in any
batch and after any resume; torch's generators guarantee none of the three. A *key* is an int64.
`fold` derives new keys from it, and `uniform`, `choose` … turn keys into numbers. Everything is
integer arithmetic modulo 2^64, which is equal on CPU and CUDA and which `torch.vmap` supports.

Shapes: T tasks, *K the shape of a tensor of keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(*parts: int | str) -> int:
    """Return a key, a signed 64-bit integer, for a sequence of integers and strings.

    >>> key(0, "train") == key(0, "train"), key(0, "train") == key(0, "val")
    (True, False)
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def seed_torch(number: int) -> None:
    """Seed torch's generators as `torch.manual_seed` does, in a hundredth of its time.

    `torch.manual_seed` also queues the seed, with a stack trace, for each device type that is not
    yet initialized. That takes a tenth of the time of an update of a small network.
    """
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right logically; torch's own shift of int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def fold(keys: int | Tensor, numbers: Tensor) -> Tensor:
    """Derive one key for each pair of a key and a number; the two shapes broadcast."""
    if isinstance(keys, int):
        keys = torch.tensor(keys, dtype=torch.int64, device=numbers.device)
    return _mix(_mix(keys + _GOLDEN) ^ (numbers.to(torch.int64) * _GOLDEN))


def task_keys(seed: int, split: str, index: int, num_tasks: int, device: torch.device) -> Tensor:
    """Return the (T,) keys of tasks `index … index + num_tasks - 1` of a split."""
    return fold(key(seed, split), torch.arange(index, index + num_tasks, device=device))


def bits(keys: Tensor, slot: int, shape: Sequence[int] = ()) -> Tensor:
    """Hash `keys` (*K) into (*K, *shape) int64 numbers; `slot` separates the uses of a key."""
    count = math.prod(shape)
    numbers = torch.arange(count, device=keys.device).reshape(tuple(shape))
    per_use = fold(keys, torch.tensor(slot, device=keys.device))
    return fold(per_use.reshape(per_use.shape + (1,) * len(shape)), numbers)


def uniform(
    keys: Tensor,
    slot: int,
    shape: Sequence[int] = (),
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw (*K, *shape) numbers from U[low, high), bit for bit equal on every device."""
    # 24 bits fit a float32 exactly, 53 a float64.
    mantissa = 53 if dtype == torch.float64 else 24
    unit = _shift_right(bits(keys, slot, shape), 64 - mantissa).to(dtype) * 2.0**-mantissa
    return low + (high - low) * unit


def normal(
    keys: Tensor, slot: int, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw (*K, *shape) numbers from N(0, 1) by the Box-Muller transform."""
    unit = uniform(keys, slot, (2, *shape), dtype=torch.float64).movedim(keys.dim(), 0)
    radius = torch.sqrt(-2.0 * torch.log1p(-unit[0]))
    return (radius * torch.cos(2.0 * math.pi * unit[1])).to(dtype)


def choose(keys: Tensor, slot: int, num: int, count: int) -> Tensor:
    """Draw `count` of `num` indices without replacement, in random order: (*K, count) int64."""
    return bits(keys, slot, (num,)).argsort(dim=-1, stable=True)[..., :count]


def integers(keys: Tensor, slot: int, num: int, shape: Sequence[int] = ()) -> Tensor:
    """Draw (*K, *shape) int64 numbers uniformly from {0, …, num - 1}."""
    return _shift_right(bits(keys, slot, shape), 1) % num
