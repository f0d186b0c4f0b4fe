"""How processor time grows with sizes: `python tests/growth.py [PART…]`.

Each line has the seconds at growing sizes, and the exponent p of the power law c n^p that fits
them best (a line through their logarithms): 1 is linear, and constant costs make it smaller. Steps
of training by tasks, shots, inner steps and image size are measured by `metarun bench --growth`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from metarun.cli.main import main
from metarun.config.composition import composer
from metarun.core.types import Stream
from metarun.data.episodes import ClassEpisodes, ClassTable
from metarun.evaluation import continual_metrics
from metarun.runs import sweeps
from metarun.runs.lines import Lines
from tests.data.sources import make_source, sizes

Action = Callable[[], object]
RUN = ["algo=maml", "data=sinusoid", "train.steps=2", "eval.episodes=4", "eval.val_episodes=4"]
POOL = (50, 100, 200)


def command(*words: str) -> None:
    """Run a command line without its output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(words)
    assert code == 0, words


def pool(number: int) -> None:
    """Fill `outputs/` with copies of one run, each of a seed of its own."""
    first = next(iter(sorted(Path("outputs").rglob("status.json")))).parent
    text = (first / "config.yaml").read_text(encoding="utf-8")
    for seed in range(number):
        folder = Path(f"outputs/pool/09-00-00-maml-sinusoid-{seed:06x}")
        if not folder.exists():
            shutil.copytree(first, folder, ignore=shutil.ignore_patterns("checkpoints"))
            changed = re.sub(r"^seed: .*$", f"seed: {seed}", text, flags=re.MULTILINE)
            (folder / "config.yaml").write_text(changed, encoding="utf-8")
            results = (first / "results.json").read_text(encoding="utf-8")
            results = re.sub(r'"seed": \d+', f'"seed": {seed}', results)
            (folder / "results.json").write_text(results, encoding="utf-8")


def compositions() -> Iterator[tuple[str, int, Action]]:
    """The runs of a sweep, composed and checked."""
    with composer() as compose:
        for number in (5, 10, 20):
            words = ["algo=maml", "data=sinusoid", f"seed=range({number})"]
            yield "composition, by runs", number, lambda w=words: compose.jobs(w, sweep=True)


def lists() -> Iterator[tuple[str, int, Action]]:
    """The commands that read all runs or all sweeps."""
    command(*RUN, "device=cpu")
    for number in POOL:
        pool(number)
        for words in (["list", "runs", "--all"], ["table", "outputs/pool"]):
            yield f"{' '.join(words[:2])}, by runs", number, lambda w=words: command(*w)
    for number in POOL:
        for index in range(number):
            sweeps.Sweep(f"s{index}", sweeps.now(), ["-m"], [f"outputs/{index}"]).store()
        yield "list sweeps, by sweeps", number, lambda: command("list", "sweeps", "--all")


def draws() -> Iterator[tuple[str, int, Action]]:
    """A batch of tasks with its data set, by classes, images of a class and ways."""

    def of(classes: int, images: int, way: int = 5) -> object:
        table = ClassTable(
            torch.zeros(classes * images, 1, 8, 8, dtype=torch.uint8),
            tuple(map(str, range(classes))),
            (images,) * classes,
        )
        tables = {"train": table, "val": table, "test": table}
        source = make_source(
            ClassEpisodes, name="grown", tables=tables, sizes=sizes(way), prepare=None
        )
        return source.fingerprint(), source.batch("train", 0, 32)

    for number in (1_000, 10_000, 100_000):
        yield "data set and batch, by classes", number, lambda n=number: of(n, 10)
        yield "the same, by images", 10 * number, lambda n=number: of(100, n // 10)
    for way in (50, 200, 800):
        yield "the same, by ways", way, lambda w=way: of(1_000, 10, w)


def streams() -> Iterator[tuple[str, int, Action]]:
    """Curves of streams, and logs of long runs, by steps."""
    generator = np.random.default_rng(0)
    for steps in (10_000, 100_000, 1_000_000):
        losses = generator.random((4, steps))
        stream = Stream(visits=(0,), steps=steps, rows=1, queries=1)

        def curves(given: np.ndarray = losses, layout: Stream = stream) -> object:
            made = continual_metrics.cumulative(given, layout)
            return continual_metrics.growth(made), continual_metrics.prequential(given)

        yield "curves of 4 streams, by steps", steps, curves
        data = b"".join(b'{"step": %d, "loss": 0.5}\n' % step for step in range(steps // 10))
        yield "log of a run, by lines", steps // 10, lambda d=data: Lines.of(d)


PARTS = {"compositions": compositions, "lists": lists, "draws": draws, "streams": streams}


def processor_time(action: Action) -> float:
    """Return the seconds of processor time of a call, the least of two."""
    taken = []
    for _ in range(2):
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return max(min(taken), 1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for part in sys.argv[1:] or PARTS:
            found: dict[str, list[tuple[int, float]]] = {}
            for name, size, act in PARTS[part]():
                found.setdefault(name, []).append((size, processor_time(act)))
            for name, points in found.items():
                power = np.polyfit(*np.log(points).T, 1)[0]
                shown = "  ".join(f"{size:,}: {seconds:.3g} s" for size, seconds in points)
                print(f"{name:32} {power:5.2f}   {shown}", flush=True)
