"""Check results and speed on an NVIDIA GPU, in ten minutes at most.

    python tests/gpu/check.py --output DIR

Every part has a time budget, and the report says which parts were cut short. DIR/report.md and
DIR/report.json are written after every row, so that nothing is lost if the process is killed. The
exit code is 1 if a comparison failed. `--device cpu` rehearses the script with small sizes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.bench.implementations import our_step
from metarun.bench.measuring import interleave, operations, peak, set_tf32
from metarun.bench.memory import memory_of_step
from metarun.bench.workloads import TF32, Variant, select
from metarun.config.build import build_source
from metarun.core import environment
from metarun.core.errors import one_line
from metarun.core.types import SPLITS, Progress, TaskBatch
from metarun.evaluation.stream_rollouts import Rollouts
from metarun.execution import graph_replay
from metarun.execution.engine import Engine
from metarun.runs.checkpoints import read_checkpoint
from tests.algorithms.test_contract import PAIRS, answers, build, state
from tests.core.test_distributed import ROOT, SMALL_RUN
from tests.execution.test_graph_replay import DIFFERENT, SMALLER
from tests.helpers import composed

CPU = torch.device("cpu")
TOLERANCE = 1e-9
"""Largest difference in float64, relative to the largest number compared."""
SOURCES = {"sinusoid": 0.0, "linear": 0.0, "gp": 1e-6, "omniglot_small": 0.0}
"""Largest difference of the values: Cholesky factors may differ in the last bit."""
# Plain gradient descent, since Adam amplifies the rounding errors of gradients that are zero.
LEARNING = ["train.tasks_per_step=3", "optim=sgd", "optim.lr=0.01"]
FEWER = {
    "ftml_hindsight": ["algo.meta_updates=3"],
    "joint_hindsight": ["algo.updates=20"],
    "selector": ["algo.processes=1"],
}
WORKLOADS = ("sinusoid", "conv4-1", "conv4-15", "protonet", "evaluation", "mini")
REHEARSED = ("sinusoid", "protonet")
GRACE = 15.0
"""Seconds for an interrupted process to write its results."""

Tensors = dict[str, Tensor]


class TimeIsUpError(Exception):
    """The time limit is reached."""


def ring(*_: object) -> None:
    raise TimeIsUpError


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUpError` after so many seconds, or earlier if an enclosing limit is reached."""
    around, began = signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, max(min(seconds, around or seconds), 0.001))
    try:
        yield
    finally:
        left = max(around - (time.monotonic() - began), 0.001) if around else 0.0
        signal.setitimer(signal.ITIMER_REAL, left)


@dataclass
class Part:
    """The results of one part of the check.

    Attributes:
        rows: Table rows, by column.
        notes: Remarks, such as what was not run.
        failures: Failed comparisons and errors.
    """

    name: str
    about: str
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def hold(self, what: str, gap: float) -> None:
        """Record a failure unless the difference is within `TOLERANCE`; NaN is a failure."""
        if not gap <= TOLERANCE:
            self.failures.append(f"{what} differs by {gap:.1e}")


class Check:
    """The parts run so far, and the settings that they share.

    Args:
        output: Folder of the report.
        device: The device to check.
        minutes: Time for all parts together.
        learners: Learners to compare; all if empty.
    """

    def __init__(self, output: Path, device: str, minutes: float, learners: Sequence[str]) -> None:
        self.output = output
        self.device = torch.device(device)
        self.rehearses = self.device.type == "cpu"
        self.learners = learners
        self.minutes = minutes
        self.end = time.monotonic() + 60 * minutes
        self.parts: list[Part] = []

    @property
    def failures(self) -> list[str]:
        return [f"{part.name}: {text}" for part in self.parts for text in part.failures]

    def chosen(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return [pair for pair in pairs if not self.learners or pair[0] in self.learners]

    def run(self, name: str) -> None:
        """Run a part within its time budget."""
        work, share = PARTS[name]
        part = Part(name, (work.__doc__ or "").splitlines()[0])
        self.parts.append(part)
        print(f"\n## {name}: {part.about}", flush=True)
        began = time.monotonic()
        seconds = max(min(share * self.minutes / 10, self.end - began), 0.0)
        try:
            with time_limit(seconds):
                work(self, part)
        except TimeIsUpError:
            part.notes.append(f"cut after {seconds:.0f} s: the rest was not run")
        # The other parts are useful even if one breaks.
        except Exception as error:
            part.failures.append(f"{type(error).__name__}: {one_line(error)[:300]}")
        part.seconds = time.monotonic() - began
        print(*part.notes, *(f"FAILED: {text}" for text in part.failures), sep="\n")
        self.write()

    def add(self, part: Part, **row: Any) -> None:
        """Add a row to the table of a part and write the report."""
        part.rows.append(row)
        print("  ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True)
        self.write()

    def write(self) -> None:
        """Write the report with everything measured so far."""
        content = {"failures": self.failures, "parts": [asdict(part) for part in self.parts]}
        (self.output / "report.json").write_text(json.dumps(content, indent=1) + "\n")
        lines = ["# Check on a GPU", ""]
        lines += [f"- **FAILED** {text}" for text in self.failures] or ["No comparison failed."]
        lines += [line for part in self.parts for line in markdown(part)]
        (self.output / "report.md").write_text("\n".join(lines) + "\n")


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"
    return "–" if value is None else str(value)


def markdown(part: Part) -> Iterator[str]:
    """The lines of one part of the report."""
    yield from ("", f"## {part.name} ({part.seconds:.0f} s)", "", part.about, "")
    yield from (f"- {text}" for text in part.notes)
    columns = list(dict.fromkeys(name for row in part.rows for name in row))
    cells = [[shown(row.get(name)) for name in columns] for row in part.rows]
    for line in ([], columns, ["---"] * len(columns), *cells) if columns else ():
        yield f"| {' | '.join(line)} |" if line else ""


# Results.


def machine(check: Check, part: Part) -> None:
    """GPU, driver and versions."""
    found = environment.describe(str(check.device))
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found |= {"gpus": torch.cuda.device_count(), **found.pop("versions")}
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=20)
        found["nvidia-smi"] = done.stdout.strip()
    for name, value in found.items():
        check.add(part, what=name, value=str(value))


def episodes(check: Check, part: Part) -> None:
    """Episodes drawn on the device and on the CPU are equal bit for bit, in float32."""
    for name, allowed in SOURCES.items():
        here, there = (
            build_source(composed("algo=maml", f"data={name}", f"device={device}"))
            for device in (check.device, CPU)
        )
        for split in SPLITS:
            found, expected = here.batch(split, 7, 100), there.batch(split, 7, 100)
            pairs = list(zip(tensors(moved(found, CPU)), tensors(expected), strict=True))
            differing = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
            gap = max(
                float((ours.double() - theirs.double()).abs().max()) for ours, theirs in pairs
            )
            check.add(part, source=name, split=split, differing=differing, furthest=gap)
            if not gap <= allowed:
                part.failures.append(f"{name}, {split}: {differing} numbers differ, by {gap:.1e}")


def tensors(batch: TaskBatch) -> list[Tensor]:
    parts = (getattr(batch, name) for name in batch.__slots__)
    return [part for part in parts if part is not None]


def moved(batch: TaskBatch, device: torch.device) -> TaskBatch:
    return TaskBatch(*(part.to(device) for part in tensors(batch)))


def contract(check: Check, part: Part) -> None:
    """Every learner on the device against the CPU, in float64, from the same weights and batch.

    A row has the largest difference in what one update adds to parameters and buffers, in the
    answers after it, and in the losses along a stream, each relative to the largest such number.
    """
    for algo, data in check.chosen(PAIRS):
        row: dict[str, Any] = {"learner": algo, "data": data}
        try:
            with time_limit(60):
                expected = outcome(algo, data, CPU, Engine("loop", graph="none"))
                for engine in (Engine("loop", graph="none"), Engine("vmap", graph="none")):
                    found = outcome(algo, data, check.device, engine)
                    for name, gap in differences(found, expected).items():
                        row[f"{name}, {engine.kind}"] = gap
                        part.hold(f"{algo} on {data}, {engine.kind}: {name}", gap)
        except TimeIsUpError:
            row["error"] = "cut"
        # Report the error and continue with the other learners.
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {one_line(error)[:150]}"
            part.failures.append(f"{algo} on {data}: {row['error']}")
            # After an error in a kernel CUDA refuses all further work of the process.
            if "CUDA error" in str(error):
                raise
        check.add(part, **row)


def replays(check: Check, part: Part) -> None:
    """`graph=replay` against `graph=none`, both on the device; `refused` says why none was used."""
    refused: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        refused.append(record.getMessage()[:150])
        return False

    logger = logging.getLogger(graph_replay.__name__)
    logger.setLevel(logging.DEBUG)
    logger.addFilter(note)
    for algo, data in check.chosen(DIFFERENT):
        refused.clear()
        expected, found = (
            # A function is replayed from its third call on.
            outcome(algo, data, check.device, Engine("vmap", graph=graph), *SMALLER[data], calls=4)
            for graph in ("none", "replay")
        )
        gaps = differences(found, expected)
        check.add(part, learner=algo, data=data, **gaps, refused="; ".join(refused) or None)
        for name, gap in gaps.items():
            part.hold(f"{algo} on {data}: {name}", gap)


def outcome(
    algo: str, data: str, device: torch.device, engine: Engine, *words: str, calls: int = 1
) -> dict[str, Tensors]:
    """What updates add to the weights, the answers after them, and the losses along a stream."""
    torch.manual_seed(0)
    made = build(algo, data, *LEARNING, *FEWER.get(algo, []), *words)
    algorithm, source = made.algorithm.to(device), made.source
    algorithm.engine = engine
    found: dict[str, Tensors] = {}
    if algorithm.capabilities.meta_trains:
        before = numbers(algorithm)
        for _ in range(calls):
            algorithm.update(moved(source.batch("train", 0, 3), device), Progress(0, 100))
        after = numbers(algorithm)
        found["update"] = {name: after[name] - before[name] for name in before}
    batch = moved(source.batch("test", 0, 4), device)
    found["answers"] = {"outputs": [answers(algorithm, batch) for _ in range(calls)][-1]}
    if source.spec.streams is not None:
        rollouts = Rollouts(algorithm, batch, source.spec.streams["test"])  # type: ignore[arg-type]
        while not rollouts.finished:
            rollouts.advance()
        found["stream"] = {"loss": rollouts.measured()["incoming_loss"]}
    return {kind: {n: v.cpu() for n, v in values.items()} for kind, values in found.items()}


def numbers(algorithm: Algorithm) -> Tensors:
    """Floating-point parameters and buffers."""
    return {name: value for name, value in state(algorithm).items() if value.is_floating_point()}


def differences(found: Mapping[str, Tensors], expected: Mapping[str, Tensors]) -> dict[str, float]:
    return {kind: difference(found[kind], values) for kind, values in expected.items()}


def difference(found: Tensors, expected: Tensors) -> float:
    """The largest difference, relative to the largest expected number."""
    names = [name for name, value in expected.items() if value.numel()]
    if not names:
        return 0.0
    # As tensors, since Python's max ignores NaN.
    gaps = torch.stack([(found[name] - expected[name]).abs().max() for name in names])
    sizes = torch.stack([expected[name].abs().max() for name in names])
    return float(gaps.max()) / (float(sizes.max()) or 1.0)


# Speed.


def speed(check: Check, part: Part) -> None:
    """`metarun bench` with `graph=none,replay`, against the baselines that can be imported."""
    for workload in REHEARSED if check.rehearses else WORKLOADS:
        # Recording its graph takes a minute.
        for graph in ("none", "replay") if workload == "mini" else ("none,replay",):
            bench(check, part, workload, graph, most=0.15)


def compiled(check: Check, part: Part) -> None:
    """`metarun bench` with `graph=compile`, which on a GPU makes whole-step CUDA graphs."""
    for workload in REHEARSED[:1] if check.rehearses else WORKLOADS:
        bench(check, part, workload, "compile", most=0.3)


def bench(check: Check, part: Part, workload: str, graph: str, *, most: float) -> None:
    """Run `metarun bench` on a workload in a subprocess and add its results.

    Args:
        check, part: Where the rows go.
        workload, graph: Options of the bench.
        most: Largest share of the total time.
    """
    seconds = "0.05" if check.rehearses else "1"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        words = ["--workload", workload, "--graph", graph, "--seconds", seconds, "--no-memory"]
        words += ["--device", str(check.device), "--json", str(file)]
        code, errors = finished(
            ["-m", "metarun", "bench", *words], folder, 60 * check.minutes * most
        )
        record = json.loads(file.read_text()) if file.exists() else {"results": [], "without": {}}
    for name, why in record["without"].items():
        part.notes += [text for text in [f"without {name}: {why}"] if text not in part.notes]
    for result in record["results"]:
        row = {"workload": workload, "graph": result["variant"]["graph"]}
        row |= {"engine": result["engine"], "ms": result["metarun"]["milliseconds"]}
        row |= {"first, ms": result["metarun"]["first_milliseconds"]}
        row |= {"of peak": result["metarun"]["share_of_peak"]}
        for other in result["baselines"]:
            name = other["name"]
            row |= {f"{name}, ms": other["milliseconds"], f"times {name}": other["ratio"]}
            row[f"differs from {name}"] = other["difference"]
            part.hold(f"{workload}, graph={row['graph']}, {name}", other["difference"])
        check.add(part, **row)
    if code is None:
        part.notes.append(f"{workload}, graph={graph}: cut")
    elif code:
        part.failures.append(f"{workload}, graph={graph}: {errors}")


def finished(words: list[str], folder: str, limit: float) -> tuple[int | None, str]:
    """Run Python with these arguments; returns its exit code and the last line of its errors.

    At the limit it is interrupted, so that the bench writes its results, and the code is None.
    """
    limit = min(limit, signal.getitimer(signal.ITIMER_REAL)[0] - GRACE)
    if limit <= 0.0:
        raise TimeIsUpError
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    errors, code = Path(folder) / "errors.txt", None
    with errors.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.DEVNULL, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        code = child.wait(limit)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE - 2.0)
    finally:
        # The whole group: compilers are processes of their own.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    lines = [line for line in errors.read_text().splitlines() if line.strip()]
    return code, lines[-1][:300] if lines else f"exit code {code}"


def resnet12(check: Check, part: Part) -> None:
    """ProtoNet with ResNet-12 at 84x84: share of the matrix-multiply peak, and memory."""
    (workload,) = select(["protonet-resnet12"])
    workload = replace(workload, filters=4, image=28) if check.rehearses else workload
    try:
        for tf32, precision in (("none", "float32"), ("all", "float32"), ("all", "mixed")):
            set_tf32(tf32)
            dtype = torch.bfloat16 if precision == "mixed" else torch.float32
            top = peak(check.device, dtype, most=256 if check.rehearses else None)
            for tasks in (1,) if check.rehearses else (1, 8):
                here = replace(workload, tasks=tasks)
                how = Variant(graph="none", precision=precision)
                steps = {"ours": our_step(here, how, check.device)[0]}
                times = interleave(steps, 0.1 if check.rehearses else 2.0, check.device)["ours"]
                rate = (operations(here) or 0) / times.median
                row = {"precision": precision, "tf32": tf32, "tasks": tasks}
                row |= {"ms": 1e3 * times.median, "TFLOP/s": rate / 1e12, "of peak": rate / top}
                memory = memory_of_step(how, here, check.device)
                check.add(part, **row, **{"peak, TFLOP/s": top / 1e12, "MiB": memory})
    finally:
        set_tf32(TF32[0])


def processes(check: Check, part: Part) -> None:
    """Runs of four steps in float64 against one on the CPU: their parameters at the end."""
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs: dict[str, tuple[list[str], str]] = {"cpu": ([], "cpu")}
    runs["one process"] = [], check.device.type
    if check.rehearses or torch.cuda.device_count() > 1:
        runs["two processes"] = two, check.device.type
    else:
        part.notes.append("two processes over NCCL: not run: one GPU")
    learned: dict[str, Tensors] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (launch, device) in runs.items():
            made = Path(folder) / "outputs/x" / name.replace(" ", "-")
            words = [word for word in SMALL_RUN if not word.startswith("device=")]
            words += [f"device={device}", "train.steps=4", "optim=sgd", "optim.lr=0.1"]
            command = [*launch, "-m", "metarun", *words, f"hydra.run.dir={made}"]
            code, errors = finished(command, folder, 120)
            if code != 0:
                part.failures.append(f"{name}: {errors}")
                continue
            saved = read_checkpoint(made / "checkpoints/last.pt")["state"]
            learned[name] = {n: v for n, v in saved.items() if isinstance(v, Tensor)}
            number = json.loads((made / "environment.json").read_text())["processes"]
            gap = difference(learned[name], learned["cpu"])
            check.add(part, run=name, processes=number, parameters=gap)
            part.hold(name, gap if number == 1 + (launch == two) else float("nan"))


PARTS: dict[str, tuple[Callable[[Check, Part], None], float]] = {
    "machine": (machine, 30),
    "episodes": (episodes, 30),
    "contract": (contract, 170),
    "replays": (replays, 60),
    "speed": (speed, 200),
    "resnet12": (resnet12, 60),
    "processes": (processes, 90),
    # Last, with the time that is left: it mostly compiles.
    "compile": (compiled, 600),
}
"""The parts in the order of running, each with its time budget in seconds for ten minutes."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks on a GPU; tests/gpu/README.md says more.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default cuda)")
    parser.add_argument("--minutes", type=float, default=9.0, help="total time (default 9)")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--learners", default="", help="comma-separated learners to compare")
    args = parser.parse_args()
    names, learners = ([w for w in text.split(",") if w] for text in (args.only, args.learners))
    for name in names:
        if name not in PARTS:
            parser.error(f"--only {name}: expected some of {', '.join(PARTS)}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(
            f"--device {args.device}: no GPU is available here: use --device cpu to rehearse"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, ring)
    check = Check(args.output, args.device, args.minutes, learners)
    for name in PARTS:
        if name in names:
            check.run(name)
    print(f"\n{len(check.failures)} failures", *check.failures, sep="\n")
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
