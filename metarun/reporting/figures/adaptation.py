"""Figures of adaptation inside a network: features, movement of layers, reuse of features.

Shapes: S support rows, Q query rows, F features, L layers, T tasks, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from metarun.algorithms.common.adapting import AdaptingLearner, Support
from metarun.algorithms.functional import Params, flatten
from metarun.backbones.layers.context import ForwardContext
from metarun.core.statistics import Floats, interval
from metarun.evaluation.episodes import tasks_alike
from metarun.reporting.figures.drawing import COLORS, MARKERS, SIZE, Panel, Series, named_rows
from metarun.reporting.figures.tasks import Learned, answer, chosen, letter, task_of

_TASKS, _FEW_TASKS = 6, 3
"""Test tasks over which the movement of layers is averaged; the second is for slow learners."""
_EMBEDDED_TASKS = 100
_MOST_NUMBERS = 20_000_000
"""Limit on the adapted parameters of all embedded tasks together."""
_MOST_PIXELS = 2_000_000
"""Limit on the pixels of all support images that place tasks."""
_GRID = 100
_TSNE_FROM = 12


@dataclass
class Watched:
    """A network before and after adaptation to one task.

    Attributes:
        steps: Inner steps between the two.
        features: (Q, F) features of the queries, before and after.
        layers: Output (Q, …) of each layer with parameters, before and after.
        moved: ||after - before|| / ||before|| of each layer's parameters.
    """

    steps: int = 0
    features: list[Tensor] = field(default_factory=list)
    layers: list[dict[str, Tensor]] = field(default_factory=list)
    moved: dict[str, float] = field(default_factory=dict)


def panels(learned: Learned, figures: Floats) -> list[Panel]:
    """Return figures of a task's features, and of the layers of a learner with inner steps."""
    spec = learned.source.spec
    if spec.streams is not None:
        return []
    median = chosen(figures, higher=spec.higher_is_better)["median"]
    made: list[Panel] = []
    if spec.kind == "classification":
        made += _features(learned, median)
    learner = _adapting(learned)
    if learner is not None:
        made += _layers(learned, learner, len(figures))
    return made


def _adapting(learned: Learned) -> AdaptingLearner | None:
    """Return the learner that adapts by inner steps, also inside MetaGAN; None without one."""
    learner = getattr(learned.algorithm, "learner", learned.algorithm)
    return learner if isinstance(learner, AdaptingLearner) else None


# Recording of a network's outputs.


@contextmanager
def _recorded(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record by name the last output of `body` and of every layer with its own parameters."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output.detach()

        return hook

    own = [
        (name, part)
        for name, part in net.named_modules()
        if name == "body" or list(part.parameters(recurse=False))
    ]
    handles = [part.register_forward_hook(note(name)) for name, part in own if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def watch(learner: AdaptingLearner, x: Tensor, y: Tensor, query_x: Tensor) -> Watched:
    """Adapt to one task, and record features, layers and movement before and after.

    Args:
        learner: Learner that adapts.
        x, y: Support of the task, (1, S, …).
        query_x: Inputs whose outputs are recorded, (1, Q, …).
    """
    seen = Watched(learner.evaluation_steps(learner.inner_steps))
    ways, ctx = learner.ways(y), learner.query_context()

    def task(net: nn.Module, theta: Params, *rows: Tensor) -> Tensor:
        path = learner.path(net, theta, Support(rows[0], rows[1], ways), seen.steps)
        for weights in (path[0], path[-1]):
            adapted = learner.with_statistics(net, theta, weights, rows[0])
            with _recorded(net) as outputs:
                learner.outputs(net, theta, adapted, rows[2], ctx)
            seen.features += [outputs.pop("body")] if "body" in outputs else []
            seen.layers.append(outputs)
        # Adapted numbers that are no parameters of the network are left out.
        before, after = ({n: p for n, p in at.items() if n in theta} for at in (path[0], path[-1]))
        seen.moved = _movement({**theta, **before}, {**theta, **after})
        return rows[2].new_zeros(())

    learner.map_tasks(task, x, y, query_x)
    return seen


def _movement(before: Params, after: Params) -> dict[str, float]:
    """Return the change of each layer's weights and biases, relative to their initial norm."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in before)
    moved: dict[str, float] = {}
    for layer in layers:
        own = [name for name in before if name.rpartition(".")[0] == layer]
        start = torch.cat([before[name].flatten() for name in own]).double()
        end = torch.cat([after[name].flatten() for name in own]).double()
        moved[layer] = float((end - start).norm() / start.norm().clamp_min(1e-12))
    return moved


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Return the similarity of two representations of the same rows by linear CKA.

    Centered kernel alignment (Kornblith et al. 2019, eq. 5 with linear kernels) is
    <K, L> / (||K|| ||L||) for the centered Gram matrices of (Q, …) and (Q, …). It is 1 for
    representations that are equal up to a rotation and a scale.
    """
    grams = []
    for rows in (one, other):
        flat = rows.double().flatten(1)
        flat = flat - flat.mean(0)
        grams.append(flat @ flat.T)
    norm = grams[0].norm() * grams[1].norm()
    return float((grams[0] * grams[1]).sum() / norm) if norm > 0 else float("nan")


# Layers.


def _layers(learned: Learned, learner: AdaptingLearner, episodes: int) -> list[Panel]:
    seen: list[Watched] = []
    tasks = _FEW_TASKS if _is_large(learner) else _TASKS
    for index in range(min(tasks, episodes)):
        batch = task_of(learned, index)
        seen.append(watch(learner, batch.support_x, batch.support_y, _rows(learned, batch.query_x)))
    if not seen[0].steps or len(seen) < 2:
        return []
    moved = _finite({layer: [w.moved[layer] for w in seen] for layer in seen[0].moved})
    alike = _finite(
        {
            layer: [linear_cka(w.layers[0][layer], w.layers[1][layer]) for w in seen]
            for layer in seen[0].layers[0]
        }
    )
    if not moved or not alike:
        return []
    steps, tasks = seen[0].steps, len(seen)
    still = [layer for layer, values in moved.items() if max(values) == 0.0]
    most = max(moved, key=lambda layer: float(np.mean(moved[layer])))
    least = min(alike, key=lambda layer: float(np.mean(alike[layer])))
    summary = f"{most} moves most, by {100 * float(np.mean(moved[most])):.3g} % of its norm"
    if still:
        summary += (
            f"; {', '.join(still)} not at all" if len(still) < 5 else f"; {len(still)} do not"
        )
    reused = f"{least} changes most (CKA {float(np.mean(alike[least])):.2f})"
    return [
        _dots(
            "moved",
            "How far each layer moves",
            {name: 100 * np.array(values) for name, values in moved.items()},
            "movement in adaptation, % of the norm",
            f"||after - before|| / ||before|| of each layer's parameters in {steps} inner "
            f"steps, mean and 95 % interval over {tasks} test tasks: {summary}.",
            learned.color,
        ),
        _dots(
            "cka",
            "Features reused",
            {name: np.array(values) for name, values in alike.items()},
            "CKA, before against after",
            "Similarity of each layer's outputs for the queries before and after adaptation: "
            "linear CKA (Kornblith et al. 2019), which is 1 for features reused unchanged. "
            f"Mean and 95 % interval over {tasks} test tasks; {reused}.",
            learned.color,
            limits=(0.0, 1.03),
        ),
    ]


def _finite(layers: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the layers with finite values for all tasks; none if adaptation diverged."""
    return {layer: values for layer, values in layers.items() if np.isfinite(values).all()}


def _rows(learned: Learned, query_x: Tensor) -> Tensor:
    """Return the queries, or a denser grid for a function of one variable."""
    inputs: tuple[float, float] | None = getattr(learned.source, "inputs", None)
    if inputs is None or learned.source.spec.input_shape != (1,):
        return query_x
    low, high = inputs
    grid = torch.linspace(low, high, _GRID, dtype=query_x.dtype, device=query_x.device)
    return grid[None, :, None]


def _dots(
    name: str,
    title: str,
    values: dict[str, Floats],
    label: str,
    caption: str,
    color: str,
    limits: tuple[float, float] | None = None,
) -> Panel:
    """Return a figure with a dot and its interval for each layer, the first layer on top."""
    layers = list(values)
    figures = [interval(values[layer]) for layer in layers]
    mean, width = (np.array(column) for column in zip(*figures, strict=True))
    figure, axes, places = named_rows(layers, 0.24)
    axes.errorbar(mean, places, xerr=width, fmt="o", color=color, markersize=4, linewidth=1.2)
    axes.set(xlabel=label, xlim=limits or (0.0, None))
    return Panel(
        name,
        title,
        caption,
        f"{label} of {len(layers)} layers. {caption}",
        figure,
        {"layer": layers, "mean": list(map(float, mean)), "ci95": list(map(float, width))},
    )


# Features of one task.


def _features(learned: Learned, index: int) -> list[Panel]:
    """Return figures of a task's queries as points, before and after any adaptation."""
    batch = task_of(learned, index)
    labels = batch.query_y[0].cpu().numpy()
    learner = _adapting(learned)
    if learner is not None:
        found = watch(learner, batch.support_x, batch.support_y, batch.query_x).features
        titles = ["before adaptation", "after adaptation"]
    else:
        found = _answered(learned, index, len(labels))
        titles = ["features of the queries"]
    views = [_plane(rows.double().flatten(1).cpu().numpy()) for rows in found]
    near = [_nearest(rows.double().flatten(1), batch.query_y[0]) for rows in found]
    made: list[Panel] = []
    for place, (view, share) in enumerate(zip(views, near, strict=True)):
        for method, points in view.items():
            key = f"features-{method.lower().replace('-', '')}"
            key += f"-{place}" if len(views) > 1 else ""
            made.append(_points(key, f"{method}, {titles[place]}", points, labels, share, index))
    return made


def _answered(learned: Learned, index: int, queries: int) -> list[Tensor]:
    """Return the (Q, F) features of a learner without inner steps; none without a body."""
    batch, net = task_of(learned, index), getattr(learned.algorithm, "net", None)
    if not isinstance(net, nn.Module):
        return []
    with _recorded(net) as seen:
        answer(learned, batch, batch.query_x, index)
    body = seen.get("body")
    if body is None or len(body) < queries:
        return []
    # In a joint pass of support and queries, the support's rows come first.
    return [body[-queries:]]


def _plane(rows: Floats) -> dict[str, Floats]:
    """Return (Q, 2) coordinates by PCA and, if scikit-learn is installed, by t-SNE."""
    views = {"PCA": principal(rows)}
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return views
    if len(rows) < _TSNE_FROM or not np.isfinite(rows).all() or np.ptp(rows) == 0.0:
        return views
    made = TSNE(perplexity=min(20.0, len(rows) / 4), init="pca", random_state=0, max_iter=500)
    return {**views, "t-SNE": np.asarray(made.fit_transform(rows), dtype=np.float64)}


def principal(rows: Floats) -> Floats:
    """Return the (N, 2) coordinates of N rows along their first two principal components."""
    centered = np.nan_to_num(rows - rows.mean(0))
    left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
    plane = (left * sizes)[:, :2]
    return plane if plane.shape[1] == 2 else np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))


def _nearest(rows: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose nearest neighbor has the same class, in all dimensions."""
    distances = torch.cdist(rows, rows)
    distances.fill_diagonal_(float("inf"))
    return float((labels[distances.argmin(1)] == labels).double().mean())


def _points(name: str, title: str, points: Floats, labels: Any, share: float, index: int) -> Panel:
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    series: dict[str, Series] = {}
    for way in range(int(labels.max()) + 1):
        own = points[labels == way]
        color = COLORS[way % len(COLORS)]
        key = f"way{way}"
        marker = MARKERS[way % len(MARKERS)]
        axes.scatter(
            own[:, 0], own[:, 1], s=18, color=color, marker=marker, alpha=0.85, gid=f"{key}-points"
        )
        series[key] = Series(letter(way), color, marker=marker)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    summary = f"{100 * share:.0f} % of the queries have a nearest neighbor of their own class"
    return Panel(
        name,
        title,
        f"The queries of the median test task ({index}) in feature space, with one marker for "
        f"each class. In all dimensions of the features, {summary}.",
        f"Points in a plane, one for each query. {summary}.",
        figure,
        {
            "class": [letter(int(label)) for label in labels],
            "first": list(map(float, points[:, 0])),
            "second": list(map(float, points[:, 1])),
        },
        series,
    )


# Tasks as points.


def task_vectors(learned: Learned, episodes: int) -> Floats | None:
    """Return the (T, P) changes of parameters in adaptation to some test tasks.

    Returns None for a learner without inner steps, or if adaptation would take too long.
    """
    learner = _adapting(learned)
    if learner is None or learned.source.spec.streams is not None:
        return None
    count = sum(parameter.numel() for parameter in learner.parameters())
    tasks = min(_EMBEDDED_TASKS, episodes, _MOST_NUMBERS // max(count, 1))
    if tasks < _TSNE_FROM or _is_large(learner):
        return None
    steps = learner.evaluation_steps(learner.inner_steps)
    batch = tasks_alike(learned.source, "test", tasks)
    ways = learner.ways(batch.support_y)

    def task(net: nn.Module, theta: Params, *rows: Tensor) -> Tensor:
        path = learner.path(net, theta, Support(rows[0], rows[1], ways), steps)
        names = [name for name in path[0] if path[0][name].is_floating_point()]
        return flatten({name: path[-1][name] - path[0][name] for name in names})

    moved = learner.map_tasks(task, batch.support_x, batch.support_y)
    return np.asarray(moved.cpu().double().numpy())


def support_vectors(learned: Learned, episodes: int) -> Floats | None:
    """Return the (T, F) mean support features of some test tasks.

    Returns None for a learner without such a network, or if enough tasks would take too long.
    """
    body = getattr(getattr(learned.algorithm, "net", None), "body", None)
    spec = learned.source.spec
    if body is None or spec.kind != "classification":
        return None
    each = learned.source.batch("test", 0, 1).support_x.numel()
    tasks = min(_EMBEDDED_TASKS, episodes, _MOST_PIXELS // each)
    if tasks < _TSNE_FROM:
        return None
    ctx = ForwardContext(running=learned.algorithm.bn_statistics == "running")
    support = tasks_alike(learned.source, "test", tasks).support_x
    with torch.no_grad():
        means = torch.stack([body(rows, ctx).flatten(1).mean(0) for rows in support])
    return np.asarray(means.cpu().double().numpy())


def _is_large(learner: AdaptingLearner) -> bool:
    """Return whether a hundred adaptations would take seconds."""
    convolutional = any(isinstance(module, nn.Conv2d) for module in learner.modules())
    return convolutional and learner.device.type == "cpu"


def embedded(
    points: Floats, hue: Floats, label: str, what: str, names: Sequence[str] | None = None
) -> Panel:
    """Return a figure of test tasks as points in a plane.

    Args:
        points: Coordinates of the tasks, (N, 2).
        hue: A number for each task that sets its color, (N,).
        label: Name of this number.
        what: Description of the vectors that the points represent.
        names: Names of the groups that the numbers denote; each group gets its own marker. None
            for numbers that are not groups.
    """
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    series: dict[str, Series] = {}
    x, y = points.T
    if names is not None:
        for number in np.unique(hue).astype(int):
            own, key = hue == number, f"group{number}"
            color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
            dots = axes.scatter(x[own], y[own], s=12, color=color, marker=marker, alpha=0.8)
            dots.set_gid(f"{key}-points")
            series[key] = Series(names[number], color, marker=marker)
    else:
        dots = axes.scatter(x, y, s=14, c=hue, cmap="viridis", alpha=0.9)
        figure.colorbar(dots, ax=axes, label=label)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    return Panel(
        "tasks",
        "Test tasks",
        f"Each of {len(points)} test tasks is a point: {what}, projected on the first two "
        f"principal components. Colors show {label.replace(', %', ' in %')}.",
        f"{len(points)} test tasks as points of a plane, colored by {label}.",
        figure,
        {"first": list(map(float, x)), "second": list(map(float, y)), label: list(map(float, hue))},
        series or None,
    )
