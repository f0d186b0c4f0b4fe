"""How processor time grows with sizes: `python tests/growth.py [PART…]`.

Each line has the seconds at growing sizes, and the exponent p of the power law c n^p that fits
them best (a line through their logarithms): 1 is linear. Where the first size is 1, its seconds
are a constant cost, which is subtracted from the others; elsewhere it makes p smaller. Steps of
training by tasks, shots, inner steps and image size are measured by `metarun bench --growth`.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from metarun.cli.main import main
from metarun.config.composition import composer, to_yaml
from metarun.config.naming import job_name
from metarun.core.types import Stream
from metarun.data.episodes import ClassEpisodes, ClassTable
from metarun.data.folder import Folder
from metarun.evaluation import continual_metrics
from metarun.jobs.sweep import Journal
from metarun.runs import sweeps
from metarun.runs.folder import RESULTS, RunFolder
from metarun.runs.lines import Lines
from metarun.runs.records import METRICS, hash_of
from tests.data.sources import make_source, sizes, write_class_folders

Action = Callable[[], object]
RUN = ["algo=maml", "data=sinusoid", "train.steps=2", "eval.episodes=4", "eval.val_episodes=4"]
RUN += ["device=cpu", "threads=1"]
POOL = (1, 125, 250, 500, 1000)
VARIED = {"seeds": "seed={}", "settings": "optim.lr=0.{:06}"}
"""What the runs of a pool differ in: seeds are one row of a table, settings have one each."""


def command(*words: str) -> None:
    """Run a command line without its output."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(words)
    assert code == 0, (words, told.getvalue())


@contextlib.contextmanager
def finished() -> Iterator[RunFolder]:
    """Make one finished run, and go to an empty folder."""
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        command(*RUN, "seed=0", "optim.lr=0.001", "hydra.run.dir=first")
        first = RunFolder(Path("first").absolute())
        Path("here").mkdir()
        with contextlib.chdir("here"):
            yield first


def pool(first: RunFolder, word: str, number: int) -> None:
    """Fill `outputs/sweeps` with copies of a run, as if a sweep of this override had run them."""
    place = Path("outputs/sweeps")
    for index in range(1, number + 1):
        config = first.configuration()
        changed = word.format(index)
        key, _, value = changed.partition("=")
        if key == "seed":
            config["seed"] = int(value)
        else:
            config["optim"]["lr"] = float(value)
        others = [own for own in first.overrides() if own.partition("=")[0] not in (key, "hydra")]
        run = RunFolder(place / job_name([*others, changed], config, place))
        if not run.path.exists():
            shutil.copytree(first.path, run.path)
            run.write_bytes("config.yaml", to_yaml(config).encode())
            run.write_bytes("overrides.yaml", to_yaml([*others, changed]).encode())
            run.write_json(RESULTS, {**first.read_results(), "seed": config["seed"]})


def compositions() -> Iterator[tuple[str, int, Action]]:
    """The runs of a sweep, composed and checked."""
    with composer() as compose:
        for number in (1, 20, 40, 80):
            words = [*RUN, f"seed=range({number})"]
            yield "composition, by runs", number, lambda w=words: compose.jobs(w, sweep=True)


def lists() -> Iterator[tuple[str, int, Action]]:
    """The commands that read many runs or all sweeps."""
    commands = (["list", "runs"], ["list", "runs", "--all"], ["table", "outputs/sweeps"])
    for varied, word in VARIED.items():
        with finished() as first:
            for number in POOL:
                pool(first, word, number)
                for words in commands:
                    name = f"{' '.join(words[:3])}, by {varied}".replace(" outputs/sweeps", "")
                    yield name, number, lambda w=words: command(*w)
                runs = sorted(map(str, Path("outputs/sweeps").iterdir()))
                ends = [runs[0].rpartition("-")[2], runs[-1].rpartition("-")[2]]
                if number > 1:
                    yield f"diff, by {varied}", number, lambda e=ends: command("diff", *e)
    for number in POOL:
        for index in range(number):
            sweeps.Sweep(f"s{index}", sweeps.now(), ["-m"], [f"outputs/{index}"]).store()
        yield "list sweeps, by sweeps", number, lambda: command("list", "sweeps", "--all")


def reports() -> Iterator[tuple[str, int, Action]]:
    """The page of many runs."""
    for varied, word in VARIED.items():
        with finished() as first:
            for number in POOL:
                pool(first, word, number)
                yield f"report, by {varied}", number, lambda: command("report", "outputs/sweeps")


def again() -> Iterator[tuple[str, int, Action]]:
    """A sweep whose runs are all finished."""
    with finished() as first:
        pool(first, "seed={}", 200)
        for number in (1, 25, 50, 100, 200):
            words = ["-m", *RUN, "optim.lr=0.001", f"seed=range(1,{number + 1})"]
            yield "the same sweep again, by runs", number, lambda w=words: command(*w)


def journals() -> Iterator[tuple[str, int, Action]]:
    """The journal of a sweep, as its runs write and read it."""

    def of(number: int) -> None:
        journal = Journal(Path("journal"))
        journal.path.unlink(missing_ok=True)
        journal.path.touch()
        for index in range(number):
            journal.add("start", folder=str(index), host="h", process=1)
            journal.add("end", folder=str(index), state="finished", why="", signum=0)
            assert (len(journal.ends()), journal.stopped()) == (index + 1, False)

    for number in (100, 1_000, 10_000):
        yield "journal of a sweep, by runs", number, lambda n=number: of(n)


def logs() -> Iterator[tuple[str, int, Action]]:
    """The commands that read one run, by the lines of its log."""
    with finished() as first:
        run = RunFolder(Path("outputs/run"))
        shutil.copytree(first.path, run.path)
        results = first.read_results()
        for number in (1, 50_000, 100_000, 200_000):
            line = '{{"step": {}, "train/mse": 0.5, "val/mse": 0.5, "val/mse_ci95": 0.1}}\n'
            data = "".join(map(line.format, range(3, number + 3))).encode()
            run.write_bytes(METRICS, data)
            files = {**results["files"], METRICS: hash_of(data)}
            run.write_json(RESULTS, {**results, "files": files})
            for word in ("table", "report"):
                yield f"{word} of a run, by lines", number, lambda w=word: command(w, "outputs/run")


def folders() -> Iterator[tuple[str, int, Action]]:
    """A folder of pictures, read for the first time."""
    for number in (1_000, 2_000, 4_000, 8_000):
        root = Path(f"pictures{number}")
        write_class_folders(root, {f"class{name}": 20 for name in range(number // 20)})

        def read(place: Path = root) -> object:
            shutil.rmtree("data", ignore_errors=True)  # the images that were read before
            return make_source(Folder, root=str(place), image_size=8, sizes=sizes(5))

        yield "folder of images, by images", number, read


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


PARTS = {
    part.__name__: part
    for part in (
        compositions, lists, reports, again, journals, logs, folders, draws, streams,
    )
}  # fmt: skip


def processor_time(action: Action) -> float:
    """Return the seconds of processor time of a call, the least of two if it is short."""
    taken: list[float] = []
    while len(taken) < 2 and sum(taken) < 3.0:
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return max(min(taken), 1e-6)


def power(points: list[tuple[int, float]]) -> float:
    """Return the exponent of the best power law; a first size of 1 is the constant cost."""
    (first, constant), *rest = points
    if first == 1:
        points = [(size, max(seconds - constant, 1e-3)) for size, seconds in rest]
    return float(np.polyfit(*np.log(points).T, 1)[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        os.environ["METARUN_DATA"] = "data"
        for part in sys.argv[1:] or PARTS:
            found: dict[str, list[tuple[int, float]]] = {}
            for name, size, act in PARTS[part]():
                found.setdefault(name, []).append((size, processor_time(act)))
            for name, points in found.items():
                shown = "  ".join(f"{size:,}: {seconds:.3g} s" for size, seconds in points)
                print(f"{name:32} {power(points):5.2f}   {shown}", flush=True)
