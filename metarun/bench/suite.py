"""Measurement of workloads, and of their growth with one size."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from metarun.bench.baselines import baseline_step, baselines_of
from metarun.bench.exact import differences
from metarun.bench.implementations import Step, our_step
from metarun.bench.measuring import interleave, operations, peak
from metarun.bench.memory import Side, memory_of_step, throughput
from metarun.bench.results import Curve, Entry, Point, Result, Times
from metarun.bench.workloads import GROWTH, Variant, Workload, grown

_DTYPES = {"float32": torch.float32, "mixed": torch.bfloat16}

Tell = Callable[[str], None]


class Suite:
    """Measures workloads.

    Args:
        variants: Variants of our implementation.
        against: Names of the baselines; None uses all that can be imported.
        seconds: Time for each implementation of a workload.
        device: Device of the steps.
        with_memory: Whether memory is measured.
        tell: Function that receives progress messages.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        against: Sequence[str] | None,
        seconds: float,
        device: torch.device,
        *,
        with_memory: bool,
        tell: Tell,
    ) -> None:
        self._variants = variants
        self._against = against
        self._seconds = seconds
        self._device = device
        self._with_memory = with_memory
        self._tell = tell

    @cached_property
    def peaks(self) -> dict[str, float]:
        """Operations per second of matrix products, by the precision of variants."""
        self._tell("peak of matrix products …")
        used = dict.fromkeys(variant.precision for variant in self._variants)
        return {name: peak(self._device, _DTYPES[name]) for name in used}

    def measure(self, workload: Workload) -> list[Result]:
        """Return a result for each variant, all timed in the same rounds."""
        baselines = self._baselines(workload)
        variants = self._variants_of(workload)
        counted = operations(workload)
        self._tell(f"{workload.name}: times …")
        times, engines = self._times(workload, [*variants, *baselines], self._seconds)
        memory = self._memory(workload, [*variants, *baselines])
        results = []
        for variant in variants:
            self._tell(f"{workload.name}: differences …")
            apart = differences(workload, variant, baselines, self._device)
            entries = [Entry(r, times[r], memory[r], apart.get(r)) for r in baselines]
            results.append(
                Result(
                    workload,
                    variant,
                    engines[variant],
                    counted,
                    self.peaks.get(variant.precision),
                    Entry("metarun", times[variant], memory[variant]),
                    tuple(entries),
                )
            )
        return results

    def grow(self, workload: Workload, size: str, sizes: Iterable[int] = ()) -> Iterator[Curve]:
        """Yield a growth curve for each variant, and for the first baseline.

        Args:
            workload: Workload whose other sizes are kept.
            size: Name of the size, a key of `GROWTH`.
            sizes: Values of the size; by default those of `GROWTH`.
        """
        sides: list[Side] = [*self._variants_of(workload), *self._baselines(workload)[:1]]
        points: dict[Side, list[Point]] = {side: [] for side in sides}
        for value in sizes or GROWTH[size]:
            self._tell(f"{workload.name}: {value} {size} …")
            here = grown(workload, size, value)
            if size == "processes":
                for side in sides:
                    speed = throughput(side, here, value, self._seconds / 5)
                    points[side].append(Point(value, None, None, speed))
                continue
            times, _ = self._times(here, sides, self._seconds / 5)
            memory = self._memory(here, sides)
            for side in sides:
                seconds = times[side].median
                points[side].append(Point(value, 1e3 * seconds, memory[side], here.tasks / seconds))
        for side in sides:
            name = side if isinstance(side, str) else f"metarun, {side.name}".removesuffix(", ")
            yield Curve(workload.name, size, name, tuple(points[side]))

    def _variants_of(self, workload: Workload) -> Sequence[Variant]:
        """Return the variants that apply to a workload; sampling uses no engine."""
        return [Variant()] if workload.method == "sampling" else self._variants

    def _baselines(self, workload: Workload) -> list[str]:
        found = baselines_of(workload)
        return [name for name in found if self._against is None or name in self._against]

    def _times(
        self, workload: Workload, sides: Sequence[Side], seconds: float
    ) -> tuple[dict[Side, Times], dict[Side, str]]:
        """Return the times of each implementation, and the resolved engine of each variant."""
        steps: dict[Side, Step] = {}
        engines: dict[Side, str] = {}
        for side in sides:
            if isinstance(side, str):
                steps[side] = baseline_step(side, workload, self._device)
            else:
                steps[side], engines[side] = our_step(workload, side, self._device)
        times = interleave(steps, seconds, self._device, workload.updates)
        del steps
        gc.collect()
        return times, engines

    def _memory(self, workload: Workload, sides: Sequence[Side]) -> dict[Side, float | None]:
        found: dict[Side, float | None] = dict.fromkeys(sides)
        for side in sides if self._with_memory else ():
            self._tell(f"{workload.name}: memory …")
            found[side] = memory_of_step(side, workload, self._device)
        return found

    def leak(self, workload: Workload, steps: int) -> float:
        """Return the growth in MiB of the process, or of torch's GPU memory, over `steps`."""
        self._tell(f"memory over {steps} steps …")
        step, _ = our_step(workload, self._variants[0], self._device)
        for _ in range(100):
            step()
        before = _held(self._device)
        for _ in range(steps):
            step()
        return _held(self._device) - before


def _held(device: torch.device) -> float:
    """Return the MiB in use by the process, or by torch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
