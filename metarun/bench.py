"""`metarun bench`: the speed of a meta-step on this machine, as ratios to the usual loop.

Every figure is a ratio of medians of interleaved timings in one process, so that what else the
machine does falls on both sides. The loops to beat are written here with torch's own layers;
learn2learn's clone-and-adapt is timed beside them where it can be imported.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from metarun.algorithms.base import own_parameters
from metarun.algorithms.engine import Engine
from metarun.algorithms.maml import MAML
from metarun.algorithms.outer import OuterOptimizer
from metarun.allocator import keep_large_blocks
from metarun.backbones.conv import Conv4
from metarun.backbones.mlp import MLP
from metarun.data.omniglot import OmniglotSmall
from metarun.data.synthetic import Sinusoid
from metarun.parsing import Parser
from metarun.types import EpisodeSize, Progress, Split, TaskBatch, TaskSpec

Step = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """A meta-step: the tasks, the network twice (ours and torch's), and the inner rate."""

    name: str
    spec: TaskSpec
    batch: TaskBatch
    backbone: Any
    reference: Callable[[], nn.Module]
    inner_lr: float


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    Attributes:
        workload: What was done.
        rival: Whom metarun is compared with.
        milliseconds: Median of ours.
        rival_milliseconds: Median of the rival's.
        gradient_difference: Largest relative difference of the meta-gradients in float64.
    """

    workload: str
    rival: str
    milliseconds: float
    rival_milliseconds: float
    gradient_difference: float | None = None

    @property
    def ratio(self) -> float:
        """How many times faster than the rival."""
        return self.rival_milliseconds / self.milliseconds


def run(argv: Sequence[str]) -> int:
    """Answer `metarun bench …`; returns the exit code."""
    parser = Parser(
        prog="metarun bench", description="Speed of a meta-step here, as ratios to the usual loop."
    )
    parser.add_argument("--rounds", type=int, default=15, help="timings of each (default 15)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--memory-steps", type=int, default=2000, help="0 leaves it out")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args(list(argv))
    if args.rounds < 1 or args.memory_steps < 0:
        parser.error("--rounds takes 1 or more, --memory-steps 0 or more")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no GPU is available here; use --device cpu")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: the folder {args.json.parent} does not exist")
    device = torch.device(args.device)
    keep_large_blocks()

    console = Console()
    figures: list[Figure] = []
    for workload in workloads(device):
        with console.status(f"{workload.name} …"):
            figures += time_workload(workload, args.rounds)
    with console.status("sampling …"):
        figures.append(time_sampling(device, args.rounds))
    console.print(_table(figures, device))
    growth = None
    if args.memory_steps:
        with console.status(f"memory over {args.memory_steps} steps …"):
            growth = memory_growth(device, args.memory_steps)
        console.print(f"memory: {growth:+.1f} MiB over {args.memory_steps} sinusoid steps")
    if args.json:
        lines = [{**asdict(figure), "ratio": figure.ratio} for figure in figures]
        record = {"figures": lines, "memory_growth_mib": growth, "torch": torch.__version__}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def workloads(device: torch.device) -> list[Workload]:
    """The sinusoid MLP of Finn et al. 2017, and Conv4-64 on 28x28 with few and many queries."""
    sinusoid = Sinusoid(
        sizes=_sizes(1, 10, 10), seed=0, eval_seed=0, device=device, dtype=torch.float32,
        val_way=None,
    )  # fmt: skip
    made = [
        Workload(
            "sinusoid, MLP 40-40, 25 tasks, 10+10",
            sinusoid.spec,
            sinusoid.batch("train", 0, 25),
            partial(MLP, hidden=(40, 40)),
            _mlp,
            0.01,
        )
    ]
    for query in (1, 15):
        source = _characters(device, query)
        made.append(
            Workload(
                f"Conv4-64 28x28, 32 tasks, 5+{5 * query} images",
                source.spec,
                source.batch("train", 0, 32),
                partial(Conv4, filters=64),
                _conv4,
                0.4,
            )
        )
    return made


def time_workload(workload: Workload, rounds: int) -> list[Figure]:
    """Our second-order meta-step against each rival's."""
    device = workload.batch.support_x.device
    ours = _algorithm(workload).to(device)
    engine = ours.settled_engine()
    rivals: dict[str, Callable[[nn.Module, Workload], None]] = {"functional loop": _loop_backward}
    if _learn2learn() is not None:
        rivals["learn2learn"] = _learn2learn_backward
    steps: dict[str, Step] = {"ours": lambda: ours.update(workload.batch, Progress(0, 1))}
    for name, backward in rivals.items():
        steps[name] = _rival_step(workload, backward, device)
    times = _interleave(steps, rounds, device)
    name = f"{workload.name} ({engine.kind})"
    return [
        Figure(name, rival, times["ours"], times[rival], gradient_difference(workload, backward))
        for rival, backward in rivals.items()
    ]


def gradient_difference(
    workload: Workload, backward: Callable[[nn.Module, Workload], None]
) -> float:
    """Largest difference of the meta-gradients in float64, relative to the largest gradient."""
    batch = workload.batch
    double = Workload(
        workload.name,
        workload.spec,
        TaskBatch(
            batch.support_x.double(), _double(batch.support_y),
            batch.query_x.double(), _double(batch.query_y),
        ),
        workload.backbone,
        workload.reference,
        workload.inner_lr,
    )  # fmt: skip
    # With an outer rate of 1 a step of SGD is the meta-gradient itself.
    ours = _algorithm(double, outer_lr=1.0).to(batch.support_x.device).double()
    reference = workload.reference().to(batch.support_x.device).double()
    _load(reference, ours.net)
    backward(reference, double)
    theirs = [p.grad for p in reference.parameters()]
    before = [p.detach().clone() for p in ours.net.parameters()]
    ours.update(double.batch, Progress(0, 1))
    gradients = [b - p.detach() for b, p in zip(before, ours.net.parameters(), strict=True)]
    by_shape = _in_order_of(reference, ours.net, gradients)
    largest = max(float(g.abs().max()) for g in gradients)
    differences = [
        (g - t).abs().max() for g, t in zip(by_shape, theirs, strict=True) if t is not None
    ]
    return float(torch.stack(differences).max()) / largest


def time_sampling(device: torch.device, rounds: int) -> Figure:
    """32 Omniglot episodes from the resident tensor, against PIL image by image."""
    from PIL import Image

    source = _characters(device, 15)
    archive = files("metarun.data") / "files" / "images_background_small1.zip"
    with as_file(archive) as path, TemporaryDirectory() as folder:
        with ZipFile(path) as content:
            content.extractall(folder)
        paths = sorted(Path(folder).rglob("*.png"))

        def per_image() -> None:
            for image in range(32 * 5 * 16):
                with Image.open(paths[image % len(paths)]) as picture:
                    small = picture.convert("L").resize((28, 28))
                torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float() / 255

        steps: dict[str, Step] = {
            "ours": lambda: source.batch("train", 0, 32),
            "PIL": per_image,
        }
        times = _interleave(steps, max(3, rounds // 5), device)
    return Figure(
        "sampling 32 episodes of 5+75 images", "PIL per image", times["ours"], times["PIL"]
    )


def memory_growth(device: torch.device, steps: int) -> float:
    """MiB by which the process (or the GPU's pool) grows over sinusoid steps after warm-up."""
    workload = workloads(device)[0]
    ours = _algorithm(workload).to(device)
    for step in range(100):
        ours.update(workload.batch, Progress(step, steps))
    before = _memory(device)
    for step in range(steps):
        ours.update(workload.batch, Progress(step, steps))
    return _memory(device) - before


def _algorithm(workload: Workload, outer_lr: float = 1e-3) -> MAML:
    torch.manual_seed(0)
    return MAML(
        spec=workload.spec,
        backbone=workload.backbone,
        optim=partial(OuterOptimizer, method="sgd", lr=outer_lr),
        engine=Engine(),
        inner_lr=workload.inner_lr,
    )


def _rival_step(
    workload: Workload, backward: Callable[[nn.Module, Workload], None], device: torch.device
) -> Step:
    net = workload.reference().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        backward(net, workload)
        optimizer.step()

    return step


def _loss(workload: Workload, outputs: Tensor, targets: Tensor) -> Tensor:
    if workload.spec.kind == "classification":
        return nn.functional.cross_entropy(outputs, targets)
    return nn.functional.mse_loss(outputs, targets)


def _loop_backward(net: nn.Module, workload: Workload) -> None:
    """The textbook loop: task after task by functional calls, one backward for each."""
    batch = workload.batch
    params = own_parameters(net)
    for i in range(batch.num_tasks):
        support = torch.func.functional_call(net, params, (batch.support_x[i],))
        loss = _loss(workload, support, batch.support_y[i])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        adapted = {
            name: param - workload.inner_lr * grad
            for (name, param), grad in zip(params.items(), grads, strict=True)
        }
        query = torch.func.functional_call(net, adapted, (batch.query_x[i],))
        (_loss(workload, query, batch.query_y[i]) / batch.num_tasks).backward()


def _learn2learn() -> Any:
    try:
        from learn2learn.algorithms import maml
    except ImportError:
        return None
    return maml.MAML


def _learn2learn_backward(net: nn.Module, workload: Workload) -> None:
    batch = workload.batch
    maml = _learn2learn()(net, lr=workload.inner_lr)
    for i in range(batch.num_tasks):
        learner = maml.clone()
        learner.adapt(_loss(workload, learner(batch.support_x[i]), batch.support_y[i]))
        loss = _loss(workload, learner(batch.query_x[i]), batch.query_y[i])
        (loss / batch.num_tasks).backward()


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )


def _conv4() -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [
            nn.Conv2d(1 if i == 0 else 64, 64, 3, padding=1),
            nn.BatchNorm2d(64, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5))


def _in_order_of(reference: nn.Module, ours: nn.Module, values: list[Tensor]) -> list[Tensor]:
    """Our values in the reference's order: both list layers of one type in the same order."""
    by_name = dict(zip((name for name, _ in ours.named_parameters()), values, strict=True))
    parts = ("convs", "norms", "linears", "head")
    kinds: dict[type, list[str]] = {nn.Conv2d: [], nn.BatchNorm2d: [], nn.Linear: []}
    for name in by_name:
        part = next(p for p in parts if p in name)
        kind = {"convs": nn.Conv2d, "norms": nn.BatchNorm2d}.get(part, nn.Linear)
        kinds[kind].append(name)
    ordered = []
    for module in reference.modules():
        for kind, names in kinds.items():
            if isinstance(module, kind):
                ordered += [by_name[names.pop(0)] for _ in module.parameters()]
    return ordered


def _load(reference: nn.Module, ours: nn.Module) -> None:
    values = [p.detach() for p in ours.parameters()]
    with torch.no_grad():
        for param, value in zip(
            reference.parameters(), _in_order_of(reference, ours, values), strict=True
        ):
            param.copy_(value)


def _interleave(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of a step of each, timed in turns after two rounds of warm-up.

    A turn makes a few short steps in a row, as training does: a single one would meet the
    caches as its rival has left them.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    repeats = dict.fromkeys(steps, 1)
    for turn in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            milliseconds = 1e3 * (time.perf_counter() - begin) / repeats[name]
            if turn == 1:
                repeats[name] = max(1, min(20, int(100 / milliseconds)))
            if turn >= 2:
                times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _characters(device: torch.device, query: int) -> OmniglotSmall:
    return OmniglotSmall(
        sizes=_sizes(5, 1, query), seed=0, eval_seed=0, device=device, dtype=torch.float32,
        val_way=None,
    )  # fmt: skip


def _sizes(way: int, shot: int, query: int) -> dict[Split, EpisodeSize]:
    size = EpisodeSize(way, shot, query)
    return {"train": size, "val": size, "test": size}


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def _double(targets: Tensor) -> Tensor:
    return targets.double() if targets.is_floating_point() else targets


def _table(figures: list[Figure], device: torch.device) -> Table:
    title = f"Meta-steps, second order, on {device} with torch {torch.__version__}"
    table = Table(title=title)
    for column in ("workload", "against", "ours, ms", "theirs, ms", "ratio", "gradient"):
        table.add_column(column, justify="left" if column in ("workload", "against") else "right")
    for figure in figures:
        difference = figure.gradient_difference
        table.add_row(
            figure.workload,
            figure.rival,
            f"{figure.milliseconds:.2f}",
            f"{figure.rival_milliseconds:.2f}",
            f"{figure.ratio:.2f}x",
            "" if difference is None else f"{difference:.0e}",
        )
    return table
