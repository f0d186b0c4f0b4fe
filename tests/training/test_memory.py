"""The memory of a long run: it does not grow with its steps.

`python -m tests.training.test_memory KEY=VALUE …` trains and prints a line every 2,000 steps: the
step, the resident memory in bytes, and the number of objects that Python holds.
"""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from metarun.cli.main import main

STATM = Path("/proc/self/statm")
EVERY, STEPS = 2000, 8000
TINY = ["device=cpu", "threads=1", "train.tasks_per_step=2", f"train.log_every={EVERY}"]
TINY += [f"train.steps={STEPS}", "train.eval_every=500", "train.checkpoint_every=500"]
TINY += ["eval.episodes=10", "eval.val_episodes=10"]
IMAGES = ["data=omniglot_small", "backbone=mlp", "backbone.hidden=[16]", "way=2", "query=1"]

LEARNERS = {
    "optimization": ["algo=maml", "data=sinusoid"],
    "metric": ["algo=protonet", *IMAGES],
    "memory": ["algo=mann", *IMAGES],
    "probabilistic": ["algo=np", "data=gp"],
    "baselines": ["algo=multitask", "data=sinusoid"],
    "continual": ["algo=oml", "data=stream_linear", "data.tasks=4"],
    "selection": ["algo=selector", "data=diabetes"],
    "generative": ["algo=metagan_relation", "data=omniglot_small", "way=2", "query=1"],
}


class Memory(logging.Handler):
    """Prints the memory of the process with each line of metrics."""

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("step %d/%d  %s  %s"):
            gc.collect()
            resident = int(STATM.read_text().split()[1]) * 4096
            sys.stderr.write(f"memory {record.args[0]} {resident} {sys.getallocatedblocks()}\n")  # type: ignore[index]


@pytest.mark.long
@pytest.mark.skipif(not STATM.exists(), reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("family", LEARNERS)
def test_the_memory_of_a_run_does_not_grow_with_its_steps(family: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_memory", *LEARNERS[family], *TINY,
         f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("memory ")]
    steps, resident, objects = zip(*(map(int, line) for line in lines), strict=True)
    assert steps == tuple(range(EVERY, STEPS + 1, EVERY))
    # Less than an object in two steps, and than 2 KB of anything in each.
    assert objects[-1] - objects[0] < (STEPS - EVERY) // 2, objects
    assert resident[-1] - resident[0] < 2048 * (STEPS - EVERY), resident


if __name__ == "__main__":
    logging.getLogger("metarun.training.trainer").addHandler(Memory())
    sys.exit(main(sys.argv[1:]))
