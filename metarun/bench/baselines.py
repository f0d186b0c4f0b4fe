"""Baselines: loops that run a workload one task at a time, with networks of torch's layers.

Shapes: T tasks, S support rows, Q query rows, W ways, D outputs, F features.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.base import own_parameters
from metarun.backbones.layers.context import ForwardContext
from metarun.bench import jax_loop
from metarun.bench.implementations import EPISODES_AT_ONCE, Step, algorithm_of, batch_of, source_of
from metarun.bench.networks import load, textbook
from metarun.bench.workloads import BASELINES, Variant, Workload
from metarun.core.types import TaskBatch

Backward = Callable[[nn.Module, Workload, TaskBatch], None]
"""A function that adds the gradient of the mean loss over tasks to each parameter's `grad`."""

Answers = Callable[[nn.Module, Workload, TaskBatch], Tensor]
"""A function that returns predictions (T, Q, W) after adaptation to each task."""

_MODULES = {"learn2learn": "learn2learn.algorithms.maml", "higher": "higher", "jax": "optax"}


def baselines_of(workload: Workload) -> list[str]:
    """Return the names of a workload's baselines that can be imported."""
    named = [name for name, methods in BASELINES.items() if workload.method in methods]
    return [name for name in named if why_missing(name) is None]


def why_missing(name: str) -> str | None:
    """Return why a baseline cannot be imported; None if it can."""
    if name not in _MODULES:
        return None
    found = _imported(name)
    return str(found) if isinstance(found, Exception) else None


@cache
def _imported(name: str) -> Any:
    """Return a baseline's module, or the exception of its import."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(_MODULES[name])
        # An old package may fail in any way in a new Python; it is left out with the reason.
        except Exception as error:
            return error


def baseline_step(name: str, workload: Workload, device: torch.device) -> Step:
    """Return one step of a baseline; a training step ends with plain SGD."""
    if workload.method == "sampling":
        return _per_image(workload)
    net = network(workload, device)
    if workload.method == "evaluation":
        return _evaluating(ANSWERS[name], net, workload, device)
    backward = BACKWARD[workload.method][name]
    if workload.method == "training":
        if name == "jax":
            return jax_loop.training(workload, net)
        return _training(backward, net, workload, device)
    batch = batch_of(workload, device, torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-7)

    def step() -> None:
        optimizer.zero_grad()
        backward(net, workload, batch)
        optimizer.step()

    return step


def network(
    workload: Workload, device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return a baseline's network, with the initial weights of ours."""
    ours = algorithm_of(workload, Variant(), torch.device("cpu"), dtype).net
    if workload.method == "mann":
        return ours.to(device)
    theirs = textbook(workload).to(dtype)
    load(ours, theirs)
    return theirs.to(device)


def loss_of(workload: Workload, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of (N, W) logits or (N, D) values."""
    if workload.backbone == "mlp":
        return nn.functional.mse_loss(outputs, targets)
    return nn.functional.cross_entropy(outputs, targets)


# MAML.


def functional_backward(net: nn.Module, workload: Workload, batch: TaskBatch) -> None:
    """Run the standard MAML loop: functional calls, one backward pass for each task."""
    for i in range(batch.num_tasks):
        adapted = _adapt(
            net, workload, batch.support_x[i], batch.support_y[i], graph=not workload.first_order
        )
        query = torch.func.functional_call(net, adapted, (batch.query_x[i],))
        (loss_of(workload, query, batch.query_y[i]) / batch.num_tasks).backward()


def functional_answers(net: nn.Module, workload: Workload, batch: TaskBatch) -> Tensor:
    """Return the predictions of the functional loop, without a graph."""
    answers = []
    for i in range(batch.num_tasks):
        adapted = _adapt(net, workload, batch.support_x[i], batch.support_y[i], graph=False)
        with torch.no_grad():
            answers.append(torch.func.functional_call(net, adapted, (batch.query_x[i],)))
    return torch.stack(answers)


def _adapt(
    net: nn.Module, workload: Workload, x: Tensor, y: Tensor, *, graph: bool
) -> dict[str, Tensor]:
    params = own_parameters(net)
    for _ in range(workload.steps):
        loss = loss_of(workload, torch.func.functional_call(net, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=graph)
        params = {
            name: param - workload.inner_lr * grad
            for (name, param), grad in zip(params.items(), grads, strict=True)
        }
    return params


def learn2learn_backward(net: nn.Module, workload: Workload, batch: TaskBatch) -> None:
    """Run learn2learn's `clone` and `adapt`, as in its examples."""
    maml = _imported("learn2learn").MAML(
        net, lr=workload.inner_lr, first_order=workload.first_order
    )
    for i in range(batch.num_tasks):
        learner = maml.clone()
        for _ in range(workload.steps):
            learner.adapt(loss_of(workload, learner(batch.support_x[i]), batch.support_y[i]))
        loss = loss_of(workload, learner(batch.query_x[i]), batch.query_y[i])
        (loss / batch.num_tasks).backward()


def learn2learn_answers(net: nn.Module, workload: Workload, batch: TaskBatch) -> Tensor:
    """Return learn2learn's predictions, without second derivatives."""
    maml = _imported("learn2learn").MAML(net, lr=workload.inner_lr, first_order=True)
    answers = []
    for i in range(batch.num_tasks):
        learner = maml.clone()
        for _ in range(workload.steps):
            learner.adapt(loss_of(workload, learner(batch.support_x[i]), batch.support_y[i]))
        with torch.no_grad():
            answers.append(learner(batch.query_x[i]))
    return torch.stack(answers)


def higher_backward(net: nn.Module, workload: Workload, batch: TaskBatch) -> None:
    """Run higher's inner loop, as in its MAML example; first order as in its documentation."""
    context = _imported("higher").innerloop_ctx
    inner = torch.optim.SGD(net.parameters(), lr=workload.inner_lr)
    params = list(net.parameters())
    for i in range(batch.num_tasks):
        with context(
            net, inner, copy_initial_weights=False, track_higher_grads=not workload.first_order
        ) as (learner, optimizer):
            for _ in range(workload.steps):
                optimizer.step(loss_of(workload, learner(batch.support_x[i]), batch.support_y[i]))
            loss = loss_of(workload, learner(batch.query_x[i]), batch.query_y[i])
            loss = loss / batch.num_tasks
            if not workload.first_order:
                loss.backward()
                continue
            grads = torch.autograd.grad(loss, list(learner.parameters()))
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad if param.grad is None else param.grad + grad


def _training(backward: Backward, net: nn.Module, workload: Workload, device: torch.device) -> Step:
    """Return a call of several training steps with Adam; tasks come from our sampler."""
    source, optimizer = source_of(workload, device), torch.optim.Adam(net.parameters())
    numbers = count()

    def step() -> None:
        for _ in range(workload.updates):
            optimizer.zero_grad()
            first = next(numbers) * workload.tasks
            backward(net, workload, source.batch("train", first, workload.tasks))
            optimizer.step()

    return step


# Other methods.


def protonet_backward(net: nn.Module, workload: Workload, batch: TaskBatch) -> None:
    """Run ProtoNet's loss per episode, with one pass over its rows, as in the official code."""
    for i in range(batch.num_tasks):
        features = net(torch.cat([batch.support_x[i], batch.query_x[i]]))
        support, query = features.split([workload.support_rows, workload.query_rows])
        sums = support.new_zeros(workload.way, support.shape[1])
        centers = sums.index_add(0, batch.support_y[i], support) / workload.shot
        logits = -torch.cdist(query, centers).square()
        (loss_of(workload, logits, batch.query_y[i]) / batch.num_tasks).backward()


def mann_backward(net: nn.Module, workload: Workload, batch: TaskBatch) -> None:
    """Run metarun's network on one sequence after another, with plain autograd."""
    for i in range(batch.num_tasks):
        rows = (batch.support_x[i], batch.support_y[i], batch.query_x[i])
        targets = torch.cat([batch.support_y[i], batch.query_y[i]])
        (loss_of(workload, net(*rows, ForwardContext()), targets) / batch.num_tasks).backward()


BACKWARD: dict[str, dict[str, Backward]] = {
    "maml": {
        "functional": functional_backward,
        "learn2learn": learn2learn_backward,
        "higher": higher_backward,
    },
    "training": {"functional": functional_backward, "jax": jax_loop.backward},
    "protonet": {"plain": protonet_backward},
    "mann": {"plain": mann_backward},
}
ANSWERS: dict[str, Answers] = {
    "functional": functional_answers,
    "learn2learn": learn2learn_answers,
}


def _evaluating(answers: Answers, net: nn.Module, workload: Workload, device: torch.device) -> Step:
    """Return a plain evaluation loop; its episodes come from our sampler, in equal batches."""
    source = source_of(workload, device)

    def step() -> float:
        right = []
        for start in range(0, workload.tasks, EPISODES_AT_ONCE):
            count = min(EPISODES_AT_ONCE, workload.tasks - start)
            batch = source.batch("test", start, count)
            right.append((answers(net, workload, batch).argmax(-1) == batch.query_y).float())
        return torch.cat(right).mean().item()

    return step


def _per_image(workload: Workload) -> Step:
    """Return a step that loads and resizes each image with Pillow, as common data sets do."""
    from PIL import Image

    paths = _drawings()
    rows = workload.tasks * (workload.support_rows + workload.query_rows)
    side = (workload.image, workload.image)

    def step() -> Tensor:
        images = []
        for image in range(rows):
            with Image.open(io.BytesIO(paths[image % len(paths)])) as picture:
                small = picture.convert("L").resize(side)
            images.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8))
        return torch.stack(images).float() / 255

    return step


@cache
def _drawings() -> list[bytes]:
    """Return the contents of the image files in an archive of the package."""
    from importlib.resources import as_file, files
    from zipfile import ZipFile

    archive = files("metarun.data") / "files" / "images_background_small1.zip"
    with as_file(archive) as path, ZipFile(path) as content:
        names = sorted(name for name in content.namelist() if Path(name).suffix == ".png")
        return [content.read(name) for name in names]
