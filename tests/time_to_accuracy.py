"""Time to accuracy: wall time from the start of a process to a threshold on meta-val.

    python tests/time_to_accuracy.py tasks FOLDER
    python tests/time_to_accuracy.py run CONTENDER TASK FOLDER [--seed N] [--minutes M]
    python tests/time_to_accuracy.py draw PICTURE FILE…

`tasks` writes the validation tasks and the training images once, so that no contender has to
import metarun to get them. `run` trains one contender in this process, and appends a JSON line for
each evaluation to FOLDER/CONTENDER-TASK-SEED.jsonl. Imports and loading count. Processor seconds
stand beside the wall time, for machines that others use, too. `draw` makes a picture of the curves
and prints a Markdown table.

metarun runs with its recipe, and its figures are those of its `metrics.jsonl`; `--words` takes
further overrides, as in `--words optim.lr=0.001`. The others are the loops of their own examples
with the examples' hyperparameters, whose sources stand at each. One function evaluates them, on
metarun's own validation tasks, and a test compares it with metarun. They are evaluated whenever
they have trained for five times as long as an evaluation takes.

Shapes: T tasks, S support rows, Q query rows, W ways.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402 - the clock starts before the imports, which count
import contextlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from itertools import chain  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

Lines = list[dict[str, Any]]
Figure = Callable[[], float]
Steps = Iterator[tuple[int, Figure]]
"""A training: after each update (or a few), its number and a function that evaluates."""

TRAINING_PER_EVALUATION = 5.0


@dataclass(frozen=True)
class Task:
    """What is to be reached.

    Attributes:
        title: For people.
        words: The command of metarun. Evaluations are frequent, on tasks that no contender has an
            advantage on: not all of them train with rotated characters.
        metric: Name of the figure in `metrics.jsonl`.
        threshold: Figure to reach.
        data: File of the tasks without its ending.
    """

    title: str
    words: tuple[str, ...]
    metric: str
    threshold: float
    data: str = "omniglot"

    def reached(self, value: float) -> bool:
        """Whether a figure is at the threshold or beyond."""
        if self.metric == "mse":
            return value <= self.threshold
        return value >= self.threshold

    def shown(self, value: float) -> str:
        """Return a figure with its unit."""
        return f"{value:.3f}" if self.metric == "mse" else f"{100 * value:.1f} %"


_OMNIGLOT = ("data=omniglot", "data.rotations_val=none", "eval.val_episodes=300")
TASKS = {
    "sinusoid": Task(
        "Sinusoids, 5 points: MSE",
        ("algo=maml", "data=sinusoid", "eval.val_episodes=600", "train.eval_every=250"),
        "mse",
        0.4,
        data="sinusoid",
    ),
    "maml": Task(
        "Omniglot, 5-way 1-shot, MAML: accuracy",
        ("algo=maml", *_OMNIGLOT, "train.eval_every=250"),
        "accuracy",
        0.95,
    ),
    "protonet": Task(
        "Omniglot, 5-way 1-shot, ProtoNet: accuracy",
        ("algo=protonet", *_OMNIGLOT, "train.eval_every=200"),
        "accuracy",
        0.98,
    ),
}


# Tasks and images.


def write_tasks(folder: Path) -> None:
    """Write sinusoid.npz and, where it is stored, omniglot.npz.

    Both have support_x (T, S, …), support_y, query_x (T, Q, …) and query_y of validation tasks.
    The second has the training images, (N, 1, 28, 28) in uint8, and their class numbers, too, and
    the images of the tasks without repetitions, see `nearest_mean_accuracy`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sinusoid", "maml"):
        path = folder / f"{TASKS[name].data}.npz"
        with contextlib.suppress(ValueError):
            np.savez(path, **tasks_of(TASKS[name]))
            print(path)


def tasks_of(task: Task) -> dict[str, np.ndarray]:
    """Return what is stored for a task."""
    from metarun.config.build import build_source
    from metarun.config.composition import composer

    with composer() as compose:
        config = compose.job(list(task.words)).config
    source = build_source(config)
    batch = source.batch("val", 0, config["eval"]["val_episodes"])
    names = ("support_x", "support_y", "query_x", "query_y")
    found = {name: getattr(batch, name).numpy() for name in names}
    if task.data == "omniglot":
        images = list(_training_images(config))
        # Tasks share images: ProtoNet's features of them are computed once.
        rows = np.concatenate([found["support_x"], found["query_x"]], axis=1)
        unique, index = np.unique(rows.reshape(-1, *rows.shape[2:]), axis=0, return_inverse=True)
        found |= {"unique": unique, "index": index.reshape(rows.shape[:2])}
        found["images"] = np.concatenate(images)
        found["classes"] = np.repeat(np.arange(len(images)), [len(rows) for rows in images])
    return found


def _training_images(config: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yield the training images of each character."""
    from metarun.data.omniglot import full_tables

    data = config["data"]
    table = full_tables(data["root"], data["split"], data["resize"], data["image_size"])["train"]
    yield from np.split(table.images.numpy(), np.cumsum(table.counts)[:-1])


def load(folder: Path, task: Task) -> dict[str, np.ndarray]:
    """Return what `write_tasks` has written."""
    with np.load(folder / f"{task.data}.npz") as file:
        return dict(file)


# Evaluation, the same for all but metarun.


def adapted_figure(
    net: Any, tasks: Mapping[str, np.ndarray], *, lr: float, steps: int, at_once: int = 300
) -> float:
    """Return the mean squared error, or the accuracy, after gradient descent on each task.

    Args:
        net: A torch module whose batch norm has the statistics of the batch.
        tasks: Rows of T tasks; labels are whole numbers.
        lr: Inner learning rate.
        steps: Number of inner steps.
        at_once: Number of tasks that are evaluated together.
    """
    import torch
    from torch.func import functional_call, grad, vmap
    from torch.nn import functional

    start = {name: value.detach() for name, value in net.named_parameters()}
    regression = np.issubdtype(tasks["query_y"].dtype, np.floating)

    def loss(params: Any, x: Any, y: Any) -> Any:
        outputs = functional_call(net, params, (x,))
        return (
            functional.mse_loss(outputs, y) if regression else functional.cross_entropy(outputs, y)
        )

    def of_task(support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        params = start
        for _ in range(steps):
            found = grad(loss)(params, support_x, support_y)
            params = {name: value - lr * found[name] for name, value in params.items()}
        outputs = functional_call(net, params, (query_x,))
        if regression:
            return functional.mse_loss(outputs, query_y)
        return (outputs.argmax(-1) == query_y).float().mean()

    names = ("support_x", "support_y", "query_x", "query_y")
    rows = [torch.from_numpy(tasks[name]).split(at_once) for name in names]
    with torch.no_grad():
        values = [vmap(of_task)(*parts) for parts in zip(*rows, strict=True)]
        return float(torch.cat(values).mean())


def nearest_mean_accuracy(net: Any, tasks: Mapping[str, np.ndarray], channels: int = 1) -> float:
    """Return the accuracy of the nearest class mean in the features of `net`, in eval mode.

    Args:
        net: A torch module.
        tasks: Besides the labels, all images of the tasks without repetitions, `unique`
            (U, 1, 28, 28), and the number of each row's image there, `index` (T, S + Q).
        channels: Number of copies of an image's one channel.
    """
    import torch

    images = torch.from_numpy(tasks["unique"]).expand(-1, channels, -1, -1)
    net.eval()
    with torch.no_grad():
        features = torch.cat([net(part) for part in images.split(128)])
        right = []
        names = ("index", "support_y", "query_y")
        for rows in zip(*(torch.from_numpy(tasks[name]) for name in names), strict=True):
            index, support_y, query_y = rows
            support, query = features[index].split([len(support_y), len(query_y)])
            means = torch.stack([support[support_y == c].mean(0) for c in support_y.unique()])
            right.append((torch.cdist(query, means).argmin(-1) == query_y).float().mean())
    net.train()
    return float(torch.stack(right).mean())


# The contenders.


def learn2learn_sinusoid(tasks: Mapping[str, np.ndarray], seed: int) -> Steps:
    """MAML with learn2learn 0.2.0, as its examples/maml_sine.py.

    From there: 10 + 10 rows, 16 tasks per step, 160,000 tasks, inner rate 0.01 and 5 steps, Adam
    at 0.001, two layers of 32 units. Tasks are drawn here, as in torchmeta, which it needs.
    """
    import learn2learn
    import torch
    from torch import nn

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    maml = learn2learn.algorithms.MAML(net, lr=0.01, first_order=False, allow_unused=True)
    optimizer = torch.optim.Adam(maml.parameters(), 0.001)
    mse = nn.MSELoss()
    for step in range(1, 160_000 // 16 + 1):
        amplitude = torch.empty(16, 1, 1).uniform_(0.1, 5.0)
        phase = torch.empty(16, 1, 1).uniform_(0.0, math.pi)
        x = torch.empty(16, 20, 1).uniform_(-5.0, 5.0)
        y = amplitude * torch.sin(x - phase)
        total = torch.zeros(())
        for task_x, task_y in zip(x, y, strict=True):
            learner = maml.clone()
            for _ in range(5):
                learner.adapt(mse(learner(task_x[::2]), task_y[::2]))
            total = total + mse(learner(task_x[1::2]), task_y[1::2])
        optimizer.zero_grad()
        (total / 16).backward()
        optimizer.step()
        yield step, lambda: adapted_figure(net, tasks, lr=0.01, steps=5)


def _images(tasks: Mapping[str, np.ndarray], kind: type, channels: int = 1) -> Any:
    """Return the training images and their labels as a data set of a kind, with some channels."""
    import torch

    class Images(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.images = torch.from_numpy(tasks["images"]).float() / 255.0
            self.labels = [int(label) for label in tasks["classes"]]

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> Any:
            return self.images[index].expand(channels, -1, -1), self.labels[index]

        def get_labels(self) -> list[int]:
            return self.labels

    return Images()


def _learn2learn_tasks(tasks: Mapping[str, np.ndarray], way: int, samples: int, number: int) -> Any:
    """Return learn2learn's sampler, as its learn2learn/vision/benchmarks/omniglot_benchmark.py.

    From there: the transforms of tasks, with a random quarter turn for each class.
    """
    import learn2learn as l2l
    import torch

    data = l2l.data.MetaDataset(_images(tasks, torch.utils.data.Dataset))
    changes = l2l.data.transforms
    transforms = [
        changes.FusedNWaysKShots(data, n=way, k=samples),
        changes.LoadData(data),
        changes.RemapLabels(data),
        changes.ConsecutiveLabels(data),
        l2l.vision.transforms.RandomClassRotation(data, [0.0, 90.0, 180.0, 270.0]),
    ]
    return l2l.data.TaskDataset(data, task_transforms=transforms, num_tasks=number)


def learn2learn_maml(tasks: Mapping[str, np.ndarray], seed: int) -> Steps:
    """MAML with learn2learn 0.2.0, as its examples/vision/maml_omniglot.py.

    From there: 1 + 1 images of 5 classes, 32 tasks per step, 60,000 steps, inner rate 0.5 and 1
    step, Adam at 0.003, the dense network OmniglotFC, 20,000 tasks. Its own validation in each
    step is left out.
    """
    import learn2learn as l2l
    import torch

    _seed(seed)
    sampler = _learn2learn_tasks(tasks, 5, 2, 20_000)
    net = l2l.vision.models.OmniglotFC(28**2, 5)
    maml = l2l.algorithms.MAML(net, lr=0.5, first_order=False)
    optimizer = torch.optim.Adam(maml.parameters(), 0.003)
    loss = torch.nn.CrossEntropyLoss()
    for step in range(1, 60_001):
        optimizer.zero_grad()
        for _ in range(32):
            images, labels = sampler.sample()
            learner = maml.clone()
            learner.adapt(loss(learner(images[::2]), labels[::2]))
            loss(learner(images[1::2]), labels[1::2]).backward()
        for parameter in maml.parameters():
            parameter.grad.mul_(1.0 / 32)
        optimizer.step()
        yield step, lambda: adapted_figure(net, tasks, lr=0.5, steps=1, at_once=25)


def learn2learn_protonet(tasks: Mapping[str, np.ndarray], seed: int) -> Steps:
    """ProtoNet with learn2learn 0.2.0, as its examples/vision/protonet_miniimagenet.py.

    From there: 1 + 15 images of 30 classes, Adam at 0.001, halved every 20 epochs of 100 tasks,
    250 epochs, Conv4-64 with max pooling. It has no such example for Omniglot: images and turns
    are those of its MAML example.
    """
    import learn2learn as l2l
    import torch

    _seed(seed)
    sampler = _learn2learn_tasks(tasks, 30, 16, -1)
    net = l2l.vision.models.CNN4Backbone(hidden_size=64, channels=1, max_pool=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.5)
    for step in range(1, 250 * 100 + 1):
        images, labels = sampler.sample()
        order = labels.argsort(stable=True)
        features = net(images[order]).reshape(30, 16, -1)
        query = features[:, 1:].reshape(30 * 15, -1)
        logits = -(query[:, None] - features[:, 0][None]).square().sum(-1)
        loss = torch.nn.functional.cross_entropy(
            logits, labels[order].reshape(30, 16)[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            schedule.step()
        yield step, lambda: nearest_mean_accuracy(net, tasks)


def _easyfsl_images(tasks: Mapping[str, np.ndarray]) -> Any:
    """Return the training images as easyfsl wants them, with three channels."""
    from easyfsl.datasets import FewShotDataset

    return _images(tasks, FewShotDataset, channels=3)


def easyfsl_episodic(tasks: Mapping[str, np.ndarray], seed: int) -> Steps:
    """ProtoNet with easyfsl 1.5.0, as its notebooks/episodic_training.ipynb.

    From there: 5 + 10 images of 5 classes, 500 tasks per epoch, 200 epochs, SGD at 0.01 with
    momentum 0.9 and weight decay 5e-4, divided by 10 after 120 and 160 epochs, ResNet-18. Images
    are loaded in this process, since they are in memory.
    """
    import torch
    from easyfsl.methods import PrototypicalNetworks
    from easyfsl.modules import resnet18
    from easyfsl.samplers import TaskSampler

    def begin(self: object, data_source: object = None) -> None:
        del self, data_source

    # TaskSampler passes `data_source`, which torch's class does not take any more.
    torch.utils.data.Sampler.__init__ = begin
    _seed(seed)
    data = _easyfsl_images(tasks)
    sampler = TaskSampler(data, n_way=5, n_shot=5, n_query=10, n_tasks=500)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn
    )
    net = resnet18()
    classifier = PrototypicalNetworks(net)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[120, 160], gamma=0.1)
    step = 0
    for _ in range(200):
        for support, support_labels, query, query_labels, _ in loader:
            optimizer.zero_grad()
            classifier.process_support_set(support, support_labels)
            torch.nn.functional.cross_entropy(classifier(query), query_labels).backward()
            optimizer.step()
            step += 1
            yield step, lambda: nearest_mean_accuracy(net, tasks, channels=3)
        schedule.step()


def easyfsl_classical(tasks: Mapping[str, np.ndarray], seed: int) -> Steps:
    """A classifier of all training characters with easyfsl 1.5.0; its features are ProtoNet's.

    From its notebooks/classical_training.ipynb: batches of 128, SGD at 0.1 with momentum 0.9 and
    weight decay 5e-4, 200 epochs, divided by 10 after 150 and 180, ResNet-12.
    """
    import torch
    from easyfsl.modules import resnet12

    _seed(seed)
    data = _easyfsl_images(tasks)
    loader = torch.utils.data.DataLoader(data, batch_size=128, shuffle=True)
    net = resnet12(use_fc=True, num_classes=len(set(data.labels)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[150, 180], gamma=0.1)

    def figure() -> float:
        net.set_use_fc(False)
        value = nearest_mean_accuracy(net, tasks, channels=3)
        net.set_use_fc(True)
        return value

    step = 0
    for _ in range(200):
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            step += 1
            yield step, figure
        schedule.step()


def jax_sinusoid(tasks: Mapping[str, np.ndarray], seed: int) -> Steps:
    """MAML in JAX, 100 steps as one program.

    Settings are those of Finn et al. (2017), section 5.1, and its code: 10 + 10 rows, 25 tasks per
    step, inner rate 0.01 and 1 step, Adam at 0.001, two layers of 40 units. Evaluation has 10
    inner steps.
    """
    import jax
    import optax
    from jax import numpy as jnp

    at_once, tasks_per_step, rows = 100, 25, 10
    adam = optax.adam(1e-3)

    def outputs(weights: Any, x: Any) -> Any:
        *hidden, (last, bias) = weights
        for weight, shift in hidden:
            x = jax.nn.relu(x @ weight + shift)
        return x @ last + bias

    def loss(weights: Any, x: Any, y: Any) -> Any:
        return jnp.square(outputs(weights, x) - y).mean()

    def of_task(weights: Any, x: Any, y: Any) -> Any:
        found = jax.grad(loss)(weights, x[:rows], y[:rows])
        adapted = jax.tree.map(lambda value, change: value - 0.01 * change, weights, found)
        return loss(adapted, x[rows:], y[rows:])

    def outer(weights: Any, x: Any, y: Any) -> Any:
        return jax.vmap(of_task, (None, 0, 0))(weights, x, y).mean()

    def step(carried: Any, key: Any) -> Any:
        weights, moments = carried
        of_amplitude, of_phase, of_x = jax.random.split(key, 3)
        one = (tasks_per_step, 1, 1)
        amplitude = jax.random.uniform(of_amplitude, one, minval=0.1, maxval=5.0)
        phase = jax.random.uniform(of_phase, one, maxval=math.pi)
        x = jax.random.uniform(of_x, (tasks_per_step, 2 * rows, 1), minval=-5.0, maxval=5.0)
        found = jax.grad(outer)(weights, x, amplitude * jnp.sin(x - phase))
        changes, moments = adam.update(found, moments)
        return (optax.apply_updates(weights, changes), moments), None

    @jax.jit
    def many(carried: Any, key: Any) -> Any:
        return jax.lax.scan(step, carried, jax.random.split(key, at_once))[0]

    def dense(key: Any, size: tuple[int, int]) -> Any:
        # As torch's layers, and so metarun's.
        draw = partial(jax.random.uniform, minval=-(size[0] ** -0.5), maxval=size[0] ** -0.5)
        of_weight, of_bias = jax.random.split(key)
        return draw(of_weight, size), draw(of_bias, size[1:])

    key, *keys = jax.random.split(jax.random.key(seed), 4)
    sizes = [(1, 40), (40, 40), (40, 1)]
    weights = [dense(*pair) for pair in zip(keys, sizes, strict=True)]
    carried = (weights, adam.init(weights))

    def figure() -> float:
        import torch
        from torch import nn

        layers = [nn.Linear(*size) for size in sizes]
        net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        with torch.no_grad():
            for layer, (weight, bias) in zip(layers, carried[0], strict=True):
                layer.weight.copy_(torch.from_numpy(np.array(weight).T))
                layer.bias.copy_(torch.from_numpy(np.array(bias)))
        return adapted_figure(net, tasks, lr=0.01, steps=10)

    for number in range(15_000 // at_once):
        key, own = jax.random.split(key)
        carried = many(carried, own)
        carried[0][0][0].block_until_ready()
        yield (number + 1) * at_once, figure


def _seed(seed: int) -> None:
    """Seed all that an example draws from."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


Contender = Callable[[Mapping[str, np.ndarray], int], Steps]
RIVALS: dict[str, dict[str, Contender]] = {
    "sinusoid": {"learn2learn": learn2learn_sinusoid, "jax": jax_sinusoid},
    "maml": {"learn2learn": learn2learn_maml},
    "protonet": {
        "learn2learn": learn2learn_protonet,
        "easyfsl": easyfsl_episodic,
        "easyfsl-classical": easyfsl_classical,
    },
}


# Measuring.


class Log:
    """The JSON lines of one contender, task and seed."""

    def __init__(self, path: Path, **facts: object) -> None:
        self.path = path
        self.facts = facts
        self.evaluating = 0.0

    def evaluate(self, step: int, figure: Figure) -> float:
        """Append a figure, and return the seconds that it took."""
        began = time.perf_counter()
        value = figure()
        took = time.perf_counter() - began
        self.evaluating += took
        self.add(step, value)
        return took

    def add(self, step: int, figure: float) -> None:
        """Append a figure that is known now."""
        times = {
            "seconds": round(time.perf_counter() - BEGAN, 2),
            "processor_seconds": round(time.process_time(), 2),
        }
        if self.evaluating:
            times["evaluating"] = round(self.evaluating, 2)
        line = {**self.facts, "step": step, **times, "figure": figure}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def run_rival(steps: Steps, log: Log, minutes: float) -> None:
    """Train and evaluate until the end, or until the time is over."""
    training, shortest = 0.0, 0.0
    step, figure, known = 0, None, 0
    began = time.perf_counter()
    for step, figure in steps:
        now = time.perf_counter()
        training += now - began
        over = now - BEGAN > 60.0 * minutes
        if over or training >= TRAINING_PER_EVALUATION * shortest:
            took = log.evaluate(step, figure)
            # The first one of all imports and compiles.
            shortest = min(shortest or took, took) if known else 0.0
            training, known = 0.0, step
        if over:
            return
        began = time.perf_counter()
    if figure is not None and known < step:
        log.evaluate(step, figure)


def run_metarun(task: Task, seed: int, folder: Path, log: Log, minutes: float, *words: str) -> int:
    """Run the command in this process, and read its figures as they are written."""
    done = threading.Event()
    metrics = folder / "metrics.jsonl"

    def read() -> None:
        known, ended = 0, False
        while not ended:
            ended = done.wait(0.05)
            # The last line may be incomplete.
            lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
            for line in map(json.loads, lines[known:]):
                if f"val/{task.metric}" in line:
                    found = line[f"val/{task.metric}"]
                    # A task has diverged.
                    log.add(line["step"], math.nan if found is None else found)
            known = len(lines)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        from metarun.cli.main import main as command

        limit = (f"train.max_minutes={minutes:g}", "eval.episodes=2")
        return command([*task.words, f"seed={seed}", *limit, f"hydra.run.dir={folder}", *words])
    finally:
        done.set()
        reader.join()


# What was measured.


def read(paths: Iterable[Path]) -> dict[tuple[str, str], dict[int, Lines]]:
    """Return the lines of each task and contender, by seed; tasks are in the order of `TASKS`."""
    found: dict[tuple[str, str], dict[int, Lines]] = {}
    for path in paths:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            seeds = found.setdefault((line["task"], line["contender"]), {})
            seeds.setdefault(line["seed"], []).append(line)
    order = list(TASKS)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))


def first_at(task: Task, lines: Lines) -> dict[str, Any] | None:
    """Return the first line whose figure reaches the threshold, or None."""
    return next((line for line in lines if task.reached(line["figure"])), None)


def best(task: Task, lines: Lines) -> float:
    """Return the best figure that is a number."""
    values = [line["figure"] for line in lines if math.isfinite(line["figure"])]
    return (min if task.metric == "mse" else max)(values, default=math.nan)


def table(found: Mapping[tuple[str, str], Mapping[int, Lines]]) -> str:
    """Return a Markdown table: seconds until the threshold, for each seed."""
    head = ["task", "contender", "seconds, by seed", "median"]
    head += ["processor seconds", "seconds of evaluation"]
    rows = [head, ["---"] * len(head)]
    for (name, contender), seeds in found.items():
        task = TASKS[name]
        ends = {seed: first_at(task, lines) for seed, lines in sorted(seeds.items())}
        shown = [_shown(task, seed, seeds[seed], end) for seed, end in ends.items()]
        medians = [
            # A run that has not reached the threshold would have taken longer than any other.
            statistics.median_high(
                [end.get(key, 0.0) if end else math.inf for end in ends.values()]
            )
            for key in ("seconds", "processor_seconds", "evaluating")
        ]
        texts = ["–" if value in (0.0, math.inf) else f"{value:.1f}" for value in medians]
        goal = f"{task.title} {task.shown(task.threshold)}"
        rows.append([goal, contender, ", ".join(shown), *texts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(task: Task, seed: int, lines: Lines, end: dict[str, Any] | None) -> str:
    """Return the seconds of one seed, or how far it has come."""
    if end is not None:
        return f"{seed}: {end['seconds']:.1f}"
    return f"{seed}: not in {lines[-1]['seconds']:.0f} ({task.shown(best(task, lines))})"


def draw(
    found: Mapping[tuple[str, str], Mapping[int, Lines]], path: Path, clock: str = "seconds"
) -> None:
    """Draw a panel for each task, with a curve for each seed and the threshold."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    names = list(dict.fromkeys(name for name, _ in found))
    contenders = sorted({c for _, c in found}, key=lambda c: (c != "metarun", c))
    with pyplot.rc_context({"font.size": 16, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(
            1, len(names), figsize=(8 * len(names), 6.5), squeeze=False, layout="constrained"
        )
        for name, panel in zip(names, axes[0], strict=True):
            task, factor = TASKS[name], 1.0 if TASKS[name].metric == "mse" else 100.0
            here = {c: list(seeds.values()) for (of, c), seeds in found.items() if of == name}
            for contender, curves in here.items():
                color = f"C{contenders.index(contender)}"
                for number, lines in enumerate(curves):
                    x = [line[clock] for line in lines]
                    y = [factor * line["figure"] for line in lines]
                    panel.plot(x, y, color=color, lw=2, label=None if number else contender)
                    end = first_at(task, lines)
                    if end is not None:
                        panel.plot(end[clock], factor * end["figure"], "o", color=color, ms=10)
            panel.axhline(factor * task.threshold, color="0.3", ls="--", lw=1.5)
            panel.set(xscale="log", title=task.title, xlabel=clock.replace("_", " "))
            if task.metric == "mse":
                # A later figure can be any number: adaptation sometimes diverges on a task.
                every = list(chain.from_iterable(here.values()))
                top = 1.2 * max(lines[0]["figure"] for lines in every)
                bottom = 0.8 * min(best(task, lines) for lines in every)
                panel.set(yscale="log", ylabel="MSE after adaptation", ylim=(bottom, top))
                panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
                panel.yaxis.set_minor_formatter(ticker.NullFormatter())
                panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            else:
                panel.set(ylabel="accuracy, %", ylim=(max(20.0, panel.get_ylim()[0]), 100.0))
            panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            panel.xaxis.set_minor_formatter(ticker.NullFormatter())
            panel.legend(frameon=False)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    """Run one of the three commands and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("tasks", help="write the validation tasks")
    writer.add_argument("folder", type=Path)
    runner = commands.add_parser("run", help="train one contender")
    contenders = sorted({name for of in RIVALS.values() for name in of} | {"metarun"})
    runner.add_argument("contender", choices=contenders)
    runner.add_argument("task", choices=list(TASKS))
    runner.add_argument("folder", type=Path, help="of the tasks and of the lines")
    runner.add_argument("--seed", type=int, default=0)
    runner.add_argument("--minutes", type=float, default=60.0)
    runner.add_argument("--label", help="name in the table; default: the contender")
    runner.add_argument("--words", nargs="+", default=[], help="further overrides of metarun")
    drawer = commands.add_parser("draw", help="draw what was measured and print a table")
    drawer.add_argument("picture", type=Path)
    drawer.add_argument("files", type=Path, nargs="+")
    drawer.add_argument("--processor", action="store_true", help="processor time on the axis")
    args = parser.parse_args(argv)
    if args.command == "tasks":
        write_tasks(args.folder)
        return 0
    if args.command == "draw":
        found = read(args.files)
        draw(found, args.picture, "processor_seconds" if args.processor else "seconds")
        print(table(found))
        return 0
    task, label = TASKS[args.task], args.label or args.contender
    name = f"{label}-{args.task}-{args.seed}"
    path = args.folder / f"{name}.jsonl"
    if path.exists():
        parser.error(f"{path} exists already: delete it, or give the run another --label")
    log = Log(path, contender=label, task=args.task, seed=args.seed)
    if args.contender == "metarun":
        return run_metarun(task, args.seed, args.folder / name, log, args.minutes, *args.words)
    if args.contender not in RIVALS[args.task]:
        parser.error(f"{args.contender} has no example of {args.task}")
    # Old packages warn about newer Pythons.
    warnings.simplefilter("ignore")
    steps = RIVALS[args.task][args.contender](load(args.folder, task), args.seed)
    run_rival(steps, log, args.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
