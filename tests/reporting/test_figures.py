"""Tests of the numbers in a report's figures against independent computations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy import stats
from sklearn.decomposition import PCA

from metarun.algorithms.optimization.maml import MAML
from metarun.backbones.conv4 import Conv4
from metarun.reporting.figures import (
    adaptation,
    classes,
    comparison,
    curves,
    drawing,
    streams,
    tasks,
)
from metarun.reporting.figures.comparison import Entry
from metarun.reporting.figures.drawing import COLORS, Panel
from metarun.reporting.run_files import RunFiles
from tests.helpers import image_batch, image_spec, make


def files(tmp_path: Path, metric: str, values: list[float], **config: int) -> RunFiles:
    run = RunFiles(
        tmp_path, {"way": 5, "query": 3, "names": {}, "algo": {}, **config}, (), {}, COLORS[0]
    )
    run.__dict__["results"] = {"metric": metric, "way": 5}
    run.__dict__["arrays"] = {metric: np.array(values)}
    return run


def naive_cka(one: np.ndarray, other: np.ndarray) -> float:
    """Return ||Y'X||^2 / (||X'X|| ||Y'Y||) of centered columns."""
    x, y = (rows - rows.mean(0) for rows in (one, other))
    cross = np.linalg.norm(y.T @ x) ** 2
    return float(cross / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def test_cka_is_the_ratio_of_covariances_in_float64() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(20, 7)), draw.normal(size=(20, 4))
    ours = adaptation.linear_cka(torch.from_numpy(one), torch.from_numpy(other))
    assert ours == pytest.approx(naive_cka(one, other), abs=1e-12)


def test_cka_is_one_for_a_rotated_scaled_and_moved_copy() -> None:
    draw = np.random.default_rng(1)
    one = draw.normal(size=(12, 5))
    turn, _ = np.linalg.qr(draw.normal(size=(5, 5)))
    copy = 3.0 * one @ turn + 2.0
    ours = adaptation.linear_cka(torch.from_numpy(one), torch.from_numpy(copy))
    assert ours == pytest.approx(1.0, abs=1e-12)


def test_the_movement_of_a_layer_is_a_share_of_its_norm() -> None:
    before = {"body.a.weight": torch.tensor([[3.0]]), "body.a.bias": torch.tensor([4.0]),
              "head.weight": torch.tensor([[2.0]])}  # fmt: skip
    after = {**before, "body.a.bias": torch.tensor([4.5])}
    assert adaptation._movement(before, after) == pytest.approx({"body.a": 0.1, "head": 0.0})


@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
@pytest.mark.parametrize("query", [2, 8])
def test_every_layer_is_watched_however_the_pass_is_made(query: int, bn: str) -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=1, query=query)
    backbone = partial(Conv4, filters=[9, 4], blocks=2)
    learner = make(MAML, spec, backbone, inner_lr=0.1, bn=bn)
    seen = adaptation.watch(learner, batch.support_x, batch.support_y, batch.query_x)
    layers = [f"body.{kind}.{block}" for block in range(2) for kind in ("convs", "norms")]
    assert [sorted(layer) for layer in seen.layers] == [sorted([*layers, "head"])] * 2
    assert all(len(rows) == query * 3 for layer in seen.layers for rows in layer.values())


def test_the_plane_is_that_of_the_first_two_principal_components() -> None:
    rows = np.random.default_rng(2).normal(size=(30, 6)) * [5, 3, 1, 1, 1, 1]
    theirs = PCA(2).fit_transform(rows)
    ours = adaptation.principal(rows)
    signs = np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours * signs, theirs, atol=1e-9)


def test_a_single_direction_still_makes_a_plane() -> None:
    points = adaptation.principal(np.arange(4.0)[:, None])
    assert points.shape == (4, 2)
    assert not points[:, 1].any()


@pytest.mark.parametrize("higher", [True, False])
def test_the_good_task_is_better_than_the_median_and_that_than_the_bad(higher: bool) -> None:
    figures = np.random.default_rng(3).permutation(101).astype(float)
    figures[7] = np.nan
    chosen = tasks.chosen(figures, higher=higher)
    values = [figures[chosen[name]] for name in ("good", "median", "bad")]
    assert values == sorted(values, reverse=higher)
    assert values[1] == pytest.approx(50.0, abs=1.0)


@pytest.mark.parametrize("answers", [15, 75])
def test_every_episode_is_in_one_bin_as_wide_as_the_others(answers: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    values = [k / answers for k in draw.integers(answers // 3, answers + 1, size=300)]
    run = files(tmp_path, "accuracy", values, way=5, query=answers // 5)
    panel = curves.histogram(run)
    assert panel is not None
    assert sum(panel.columns["episodes"]) == len(values)
    for low, high, count in zip(*panel.columns.values(), strict=True):
        inside = [v for v in values if low < 100 * v < high]
        assert len(inside) == count
        # Each bin covers the same number of possible accuracies.
        width = (high - low) * answers / 100
        assert width == pytest.approx(round(width))


def test_an_error_far_from_all_others_is_counted_in_the_last_bin(tmp_path: Path) -> None:
    values = [*np.linspace(0.1, 1.0, 999), 1e6]
    panel = curves.histogram(files(tmp_path, "mse", values))
    assert panel is not None
    assert sum(panel.columns["episodes"]) == 1000
    assert panel.columns["from"][-1] < 2.0
    assert panel.columns["to"][-1] == 1e6
    assert "The last bin counts 5 episodes beyond it, too." in panel.caption


def test_a_class_is_judged_by_its_own_queries(tmp_path: Path) -> None:
    pairs = np.array([[0, 0, 6], [0, 2, 2], [2, 2, 9], [2, 0, 1], [1, 1, 5]])
    run = files(tmp_path, "accuracy", [])
    run.arrays.update(confusions=pairs, class_names=np.array(["a", "b", "c"]))
    by_class, confused = classes.panels(run)
    shares = dict(zip(by_class.columns["class"], by_class.columns["accuracy"], strict=True))
    assert shares == pytest.approx({"a": 0.75, "c": 0.9, "b": 1.0})
    # A class c predicted as a differs from a class a predicted as c.
    rows = list(zip(*confused.columns.values(), strict=True))
    assert rows == [("a", "c", 2, pytest.approx(0.25)), ("c", "a", 1, pytest.approx(0.1))]
    assert "a is taken for c most often (2 queries), of 3 wrong answers" in confused.caption


def test_without_a_wrong_answer_no_pair_is_confused(tmp_path: Path) -> None:
    run = files(tmp_path, "accuracy", [])
    run.arrays.update(confusions=np.array([[0, 0, 6], [1, 1, 6]]))
    assert [panel.name for panel in classes.panels(run)] == ["classes"]


def test_an_algorithm_has_its_color_whoever_stands_beside_it() -> None:
    alone = {name: drawing.colors([name])[name] for name in ("maml", "protonet", "anil")}
    together = drawing.colors(["protonet", "anil", "maml", "reptile", "r2d2"])
    assert len(set(together.values())) == 5
    assert sum(together[name] == look for name, look in alone.items()) >= 2


def test_no_two_algorithms_look_alike_before_every_look_is_taken() -> None:
    looks = drawing.colors(f"algorithm{n}" for n in range(24))
    assert len(set(looks.values())) == 24
    assert len(drawing.colors(f"algorithm{n}" for n in range(60))) == 60


def test_no_algorithm_has_the_gray_of_what_is_none() -> None:
    looks = drawing.colors(f"algorithm{n}" for n in range(24))
    assert COLORS[-1] not in {color for color, _ in looks.values()}


def test_a_panel_is_written_three_times_and_the_same_each_time(tmp_path: Path) -> None:
    def panel() -> Panel:
        figure = Figure(figsize=(2, 1))
        figure.add_subplot().plot([0, 1], [0, 1])
        return Panel("line", "Line", "", "", figure, {"x": [0, 1], "y": [0.1234567, float("nan")]})

    drawing.write(tmp_path / "one", panel())
    drawing.write(tmp_path / "two", panel())
    for kind in ("svg", "png", "csv"):
        one, two = ((tmp_path / n / f"line.{kind}").read_bytes() for n in ("one", "two"))
        assert one == two
    assert (tmp_path / "one" / "line.csv").read_text() == "x,y\n0,0.123457\n1,\n"


def test_the_curve_of_several_seeds_is_that_of_their_averaged_episodes(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    curves = draw.uniform(size=(3, 4, 20))
    runs = []
    for curve in curves:
        run = files(tmp_path, "mse", [])
        run.arrays["curve"] = curve
        runs.append(run)
    entry = comparison.Entry("entry0", "maml", runs, {}, 0.5, 0.1, 0.5, COLORS[0], "-", True)
    panel = comparison.adaptation([entry], "mse")
    assert panel is not None
    for step in range(4):
        values = curves[:, step].mean(0)
        half = stats.t.ppf(0.975, 19) * values.std(ddof=1) / np.sqrt(20)
        assert panel.columns["mse"][step] == pytest.approx(values.mean())
        assert panel.columns["ci95"][step] == pytest.approx(half)


def learned(tmp_path: Path, lines: list[dict[str, float]]) -> Panel | None:
    run = files(tmp_path, "accuracy", [])
    run.__dict__["metrics"] = lines
    return curves.learning(run)


def test_a_single_point_of_training_is_seen(tmp_path: Path) -> None:
    val = {"step": 40, "val/accuracy": 0.5, "val/accuracy_ci95": 0.1}
    panel = learned(tmp_path, [{"step": 40, "train/accuracy": 0.4}, val])
    assert panel is not None
    drawn = [line for line in panel.figure.axes[0].get_lines() if line.get_gid() != "chance"]
    assert [line.get_marker() for line in drawn] == ["o", "o"]


def test_updates_are_counted_in_whole_numbers(tmp_path: Path) -> None:
    panel = learned(tmp_path, [{"step": s, "train/accuracy": 0.4} for s in (1, 2, 3)])
    assert panel is not None
    assert all(tick == round(tick) for tick in panel.figure.axes[0].get_xticks())


def test_a_learner_that_is_only_validated_as_it_starts_has_no_curve(tmp_path: Path) -> None:
    assert learned(tmp_path, [{"step": 0, "val/accuracy": 0.5, "val/accuracy_ci95": 0.1}]) is None


@pytest.mark.parametrize("count", [10, 30])
def test_the_spread_of_episodes_has_its_unit(count: int, tmp_path: Path) -> None:
    values = list(np.linspace(0.2, 0.8, count))
    accuracy = curves.histogram(files(tmp_path, "accuracy", values))
    error = curves.histogram(files(tmp_path, "mse", values))
    assert accuracy is not None
    assert error is not None
    lowest = "20 %" if count < 20 else "23 %"
    assert f"lie between {lowest} and " in accuracy.caption
    assert f"lie between {lowest[:-2]}" not in error.caption
    told = error.caption.rpartition("interval. ")[2]
    assert "%" not in told


def test_no_tick_of_an_accuracy_is_below_zero_or_above_all(tmp_path: Path) -> None:
    values = [k / 5 for k in (0, 1, 2, 5) for _ in range(10)]
    panel = curves.histogram(files(tmp_path, "accuracy", values, query=1))
    assert panel is not None
    ticks = panel.figure.axes[0].get_xticks()
    assert len(ticks) > 2
    assert ticks.min() >= 0.0
    assert ticks.max() <= 100.0


def test_a_figure_is_drawn_once_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rc_context(drawing.STYLE):
        panel = curves.histogram(files(tmp_path, "mse", [1.0, 2.0, 4.0, 5.0, 6.0]))
    assert panel is not None
    drawn: list[object] = []
    draw = Figure.draw

    def counted(figure: Figure, renderer: object) -> None:
        drawn.append(renderer)
        draw(figure, renderer)

    monkeypatch.setattr(Figure, "draw", counted)
    drawing.write(tmp_path / "figures", panel)
    assert len(drawn) == 2


def test_accuracy_along_a_stream_is_in_percent_and_ends_at_all() -> None:
    columns = ["rows", "current", "current_ci95", "cumulative_loss", "cumulative_loss_ci95",
               "seen", "seen_ci95"]  # fmt: skip
    values = [(k, 0.9, 0.5, k, 1, 0.8, 0.1) for k in (10, 20)]
    lines = [dict(zip(columns, map(str, row), strict=True)) for row in values]
    results = {"metric": "accuracy", "layout": {"visits": [0, 1]}}
    figure = streams._panels({"a": lines}, results, {"a": drawing.Series("a", COLORS[0])})
    current, loss, seen = figure.axes
    assert current.get_lines()[0].get_ydata() == pytest.approx([90.0, 90.0])
    assert seen.get_lines()[0].get_ydata() == pytest.approx([80.0, 80.0])
    assert loss.get_lines()[0].get_ydata() == pytest.approx([10.0, 20.0])
    assert current.get_ylim()[1] <= 104.0
    assert "%" in current.get_ylabel()
    assert "%" not in loss.get_ylabel()
    matrix = streams._matrix(np.array([[0.5, 1.0]]), results)
    assert matrix.axes[0].images[0].get_array().max() == pytest.approx(100.0)


def test_errors_along_a_stream_that_span_decades_have_a_logarithmic_axis() -> None:
    columns = ["rows", "current", "current_ci95", "cumulative_loss", "cumulative_loss_ci95",
               "seen", "seen_ci95"]  # fmt: skip

    def lines(error: float) -> list[dict[str, str]]:
        values = [(k, error, 2 * error, k, 1, error, 0.1) for k in (10, 20)]
        return [dict(zip(columns, map(str, row), strict=True)) for row in values]

    looks = {name: drawing.Series(name, COLORS[0]) for name in ("good", "bad")}
    results = {"metric": "mse", "layout": {"visits": [0, 1]}}
    curves = {"good": lines(0.01), "bad": lines(4.0)}
    current, loss, seen = streams._panels(curves, results, looks).axes
    assert [axes.get_yscale() for axes in (current, loss, seen)] == ["log", "linear", "log"]
    assert 0.001 < current.get_ylim()[0] < 0.01
    alike = {"good": lines(3.0), "bad": lines(4.0)}
    assert streams._panels(alike, results, looks).axes[0].get_yscale() == "linear"


def test_curves_of_several_seeds_are_read_once_however_many_steps_they_share() -> None:
    class Read(list[float]):
        times = 0

        def __iter__(self) -> Iterator[float]:
            self.times += 1
            return super().__iter__()

    curves = [(Read([1, 2, 3, 5]), Read([4, 6, 8, 9])), (Read([2, 3, 4, 5]), Read([2, 2, 0, 3]))]
    runs = [SimpleNamespace(curve=lambda _, own=own: own) for own in curves]
    steps, means, _ = comparison._val(cast(Entry, SimpleNamespace(runs=runs)), "mse")
    assert (steps.tolist(), means.tolist()) == ([2.0, 3.0, 5.0], [4.0, 5.0, 6.0])
    assert {part.times for pair in curves for part in pair} == {1}
