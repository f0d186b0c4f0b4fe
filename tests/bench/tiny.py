"""The workloads in sizes that run almost instantly."""

from __future__ import annotations

from dataclasses import replace

from metarun.bench.workloads import WORKLOADS, Workload


def tiny(workload: Workload) -> Workload:
    """Return a workload with fewer tasks, smaller images and narrower networks."""
    # A single image size, so that the package's images are read only once.
    image = 32 if workload.image == 84 else 28
    shot = 2 if workload.method == "mann" else workload.shot
    return replace(
        workload, tasks=2, shot=shot, query=min(2, workload.query), image=image, filters=4
    )


TINY = tuple(tiny(workload) for workload in WORKLOADS)
BY_NAME = {workload.name: workload for workload in TINY}
