"""The catalogue's workloads in sizes that take no time."""

from __future__ import annotations

from dataclasses import replace

from metarun.bench.workloads import WORKLOADS, Workload


def tiny(workload: Workload) -> Workload:
    """The same work on few tasks, smaller images and narrow networks."""
    # The drawings that ship are read once, in one size.
    image = 32 if workload.image == 84 else 28
    shot = 2 if workload.method == "mann" else workload.shot
    return replace(
        workload, tasks=2, shot=shot, query=min(2, workload.query), image=image, filters=4
    )


TINY = tuple(tiny(workload) for workload in WORKLOADS)
BY_NAME = {workload.name: workload for workload in TINY}
