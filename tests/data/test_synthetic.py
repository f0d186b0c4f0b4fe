"""Functions of one variable: closed forms, ranges and determinism."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from metarun.core.types import SPLITS, EpisodeSize, Split
from metarun.data.synthetic import (
    Formulas,
    FunctionEpisodes,
    GaussianProcess,
    Linear,
    Multimodal,
    Sinusoid,
)
from tests.data.sources import assert_same, make_source

SIZES = {split: EpisodeSize(1, 5, 10) for split in SPLITS}


def sinusoid(**options: Any) -> Sinusoid:
    return make_source(Sinusoid, sizes=SIZES, **options)


def linear(**options: Any) -> Linear:
    return make_source(Linear, sizes=SIZES, **options)


def process(**options: Any) -> GaussianProcess:
    return make_source(GaussianProcess, sizes=SIZES, **options)


def multimodal(**options: Any) -> Multimodal:
    return make_source(Multimodal, sizes=SIZES, **options)


def test_a_sinusoid_is_its_amplitude_times_a_shifted_sine() -> None:
    source = sinusoid()
    batch = source.batch("train", 3, 20)
    amplitude, phase, _ = source.parameters("train", 3, 20)
    expected = amplitude[:, None, None] * torch.sin(batch.query_x.double() - phase[:, None, None])
    torch.testing.assert_close(batch.query_y.double(), expected, rtol=1e-6, atol=1e-6)


def test_support_and_query_of_a_sinusoid_lie_on_one_curve() -> None:
    batch = sinusoid().batch("test", 0, 50)
    x = torch.cat([batch.support_x, batch.query_x], dim=1).double()
    y = torch.cat([batch.support_y, batch.query_y], dim=1).double()
    # A sin(x - phi) = a sin(x) + b cos(x): a least-squares fit has no residual.
    design = torch.cat([torch.sin(x), torch.cos(x)], dim=-1)
    fit = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(design @ fit, y, rtol=0.0, atol=1e-5)
    amplitude = fit.norm(dim=1)
    assert amplitude.min() >= 0.1
    assert amplitude.max() <= 5.0


def test_a_linear_function_is_slope_times_x_plus_offset() -> None:
    source = linear()
    batch = source.batch("train", 0, 20)
    slope, offset = source.parameters("train", 0, 20)
    expected = slope[:, None, None] * batch.support_x.double() + offset[:, None, None]
    torch.testing.assert_close(batch.support_y.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_frequency_stretches_the_sine_of_each_task() -> None:
    still, source = sinusoid(), sinusoid(frequency=(0.8, 1.2))
    batch = source.batch("train", 3, 500)
    amplitude, phase, _ = source.parameters("train", 3, 500)
    assert torch.equal(batch.query_x, still.batch("train", 3, 500).query_x)
    # The frequency follows from points where the sine is steep and its branch is known.
    x = batch.query_x.double()[:, :, 0]
    angle = torch.asin((batch.query_y.double()[:, :, 0] / amplitude[:, None]).clamp(-1, 1))
    frequency = (angle + phase[:, None]) / x
    read = frequency[(x - phase[:, None]).abs().lt(0.5) & x.gt(1.0) & angle.abs().lt(1.0)]
    assert 0.8 <= read.min() < 0.85
    assert 1.15 < read.max() <= 1.2 + 1e-4
    assert source.fingerprint() != still.fingerprint()
    assert sinusoid(frequency=(1.0, 1.0)).fingerprint() == still.fingerprint()


def test_curves_of_a_gaussian_process_have_its_covariance() -> None:
    source = process(lengthscale=(0.3, 0.6), scale=(0.5, 2.0), noise=0.1)
    batch = source.batch("train", 0, 400)
    lengthscale, scale = (p.numpy()[:, None, None] for p in source.parameters("train", 0, 400))
    assert 0.3 <= lengthscale.min() < 0.31
    assert 1.95 < scale.max() <= 2.0
    x = torch.cat([batch.support_x, batch.query_x], 1).double().numpy()
    y = torch.cat([batch.support_y, batch.query_y], 1).double().numpy()
    away = (x - x.transpose(0, 2, 1)) / lengthscale
    covariance = scale**2 * np.exp(-0.5 * away**2) + 0.1**2 * np.eye(15)
    # Whitened by the covariance, the values are independent standard normals.
    white = np.linalg.solve(np.linalg.cholesky(covariance), y).ravel()
    assert stats.kstest(white, "norm").pvalue > 0.01
    assert abs(white.std() - 1.0) < 0.03


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0)])
def test_a_process_needs_a_lengthscale_and_a_scale(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"data\.lengthscale=.*expected two positive numbers"):
        process(lengthscale=bounds)
    with pytest.raises(ValueError, match=r"data\.scale=.*expected two positive numbers"):
        process(scale=bounds)


def by_hand(family: str, a: float, b: float, c: float, x: float) -> float:
    if family == "sinusoid":
        return a * math.sin(b * x + c)
    if family == "sawtooth":
        turns = (b * x + c) / (2 * math.pi)
        return a * (2 * (turns - math.floor(turns)) - 1)
    if family == "quadratic":
        return a * (x - c) ** 2 + b
    return a * math.tanh(x - c) + b if family == "tanh" else a * x + b


def test_each_multimodal_task_is_a_function_of_its_family() -> None:
    source = multimodal(noise=0.0)
    batch, parameters = source.batch("train", 3, 60), source.parameters("train", 3, 60)
    assert batch.class_ids is not None
    assert batch.class_ids.shape == (60, 1)
    seen = set()
    for task, (number, *numbers) in enumerate(torch.stack(parameters, 1).tolist()):
        family = source.families[int(number)]
        assert batch.class_ids[task, 0] == number
        seen.add(family)
        for x, y in zip(batch.query_x[task], batch.query_y[task], strict=True):
            assert float(y) == pytest.approx(by_hand(family, *numbers, float(x)), abs=1e-4)
    assert seen == set(source.families)


def test_families_are_as_likely_and_fill_their_ranges() -> None:
    family, *numbers = multimodal().parameters("train", 0, 10_000)
    counts = np.bincount(family.int().numpy())
    assert stats.chisquare(counts).pvalue > 0.01
    pi = math.pi
    expected = {
        "sinusoid": [(0.1, 5.0), (0.5, 2.0), (0.0, 2 * pi)],
        "line": [(-3.0, 3.0), (-3.0, 3.0)],
        "quadratic": [(-0.15, 0.15), (-3.0, 3.0), (-3.0, 3.0)],
        "sawtooth": [(0.1, 5.0), (0.5, 2.0), (0.0, 2 * pi)],
        "tanh": [(-3.0, 3.0)] * 3,
    }
    for number, ranges in enumerate(expected.values()):
        own = [values[family == number] for values in numbers]
        for values, (low, high) in zip(own, ranges, strict=False):
            assert low <= values.min() < low + 0.02 * (high - low)
            assert high - 0.02 * (high - low) < values.max() <= high
    assert numbers[0][family == 2].abs().min() >= 0.02


def test_fewer_families_are_other_data_and_unknown_ones_are_refused() -> None:
    some = multimodal(families=["line", "tanh"])
    assert set(some.parameters("test", 0, 50)[0].tolist()) == {0.0, 1.0}
    assert some.fingerprint() != multimodal().fingerprint()
    with pytest.raises(ValueError, match=r"data\.families: cubic is unknown, expected some of sin"):
        multimodal(families=["line", "cubic"])
    with pytest.raises(ValueError, match=r"data\.families: expected one or more names, each once"):
        multimodal(families=["line", "line"])


SOURCES = [sinusoid(), linear(), sinusoid(noise=0.3), process(), multimodal()]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_is_the_stack_of_its_tasks(source: FunctionEpisodes, split: Split) -> None:
    batch = source.batch(split, 11, 9)
    for place in range(9):
        assert_same(batch[place : place + 1], source.batch(split, 11 + place, 1))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 40), st.data())
def test_any_cut_of_a_batch_gives_the_same_tasks(
    index: int, count: int, data: st.DataObject
) -> None:
    source = sinusoid()
    cut = data.draw(st.integers(0, count))
    whole = source.batch("train", index, count)
    assert_same(whole[:cut], source.batch("train", index, cut))
    assert_same(whole[cut:], source.batch("train", index + cut, count - cut))


def test_parameters_and_inputs_fill_their_ranges() -> None:
    source = sinusoid(amplitude=(2.0, 3.0), phase=(1.0, 1.5), x=(4.0, 6.0))
    amplitude, phase, _ = source.parameters("train", 0, 4000)
    x = source.batch("train", 0, 400).query_x
    for values, low, high in ((amplitude, 2.0, 3.0), (phase, 1.0, 1.5), (x, 4.0, 6.0)):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    clean, noisy = sinusoid().batch("train", 0, 1000), sinusoid(noise=0.5).batch("train", 0, 1000)
    torch.testing.assert_close(clean.support_x, noisy.support_x)
    rest = noisy.query_y - clean.query_y
    assert rest.std().item() == pytest.approx(0.5, rel=0.03)
    assert abs(rest.mean().item()) < 0.02


def test_splits_and_seeds_have_tasks_of_their_own() -> None:
    source, other = sinusoid(), make_source(Sinusoid, sizes=SIZES, seed=5)
    first = {split: source.batch(split, 0, 1).support_x for split in SPLITS}
    assert not torch.equal(first["train"], first["val"])
    assert not torch.equal(first["val"], first["test"])
    assert not torch.equal(first["train"], other.batch("train", 0, 1).support_x)
    assert torch.equal(first["test"], other.batch("test", 0, 1).support_x)


def test_double_precision_meets_the_same_tasks() -> None:
    single = sinusoid().batch("test", 0, 20)
    double = make_source(Sinusoid, sizes=SIZES, dtype=torch.float64).batch("test", 0, 20)
    assert double.support_y.dtype == torch.float64
    torch.testing.assert_close(double.support_x.float(), single.support_x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(double.support_y.float(), single.support_y, rtol=1e-5, atol=1e-5)


def test_shapes_are_rows_of_one_number() -> None:
    source = sinusoid()
    batch = source.batch("train", 0, 4)
    assert batch.support_x.shape == batch.support_y.shape == (4, 5, 1)
    assert batch.query_x.shape == batch.query_y.shape == (4, 10, 1)
    assert batch.class_ids is None
    assert (source.spec.kind, source.spec.input_shape, source.spec.output_dim) == (
        "regression",
        (1,),
        1,
    )


def test_training_may_do_without_query_rows() -> None:
    own = dict(SIZES) | {"train": EpisodeSize(1, 10, 0)}
    assert make_source(Sinusoid, sizes=own).batch("train", 0, 2).query_y.shape == (2, 0, 1)


def test_a_fingerprint_tells_families_apart() -> None:
    prints = {s.fingerprint() for s in (sinusoid(), sinusoid(noise=0.1), linear(), sinusoid())}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": (5.0, 0.1)}, r"data\.amplitude=\[5,0\.1\]: expected two numbers"),
        ({"phase": (0.0, math.inf)}, r"data\.phase=\[0,inf\]: expected two numbers"),
        ({"x": (1.0, 2.0, 3.0)}, r"data\.x=\[1,2,3\]: expected two numbers"),
        ({"noise": -1.0}, r"data\.noise=-1\.0: expected 0 or more"),
    ],
)
def test_impossible_ranges_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinusoid(**options)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (EpisodeSize(5, 5, 10), "way=5 has no meaning in a regression"),
        (EpisodeSize(1, 0, 10), "shot=0: expected 1 or more"),
        (EpisodeSize(1, 5, 0), "query=0: expected 1 or more"),
    ],
)
def test_impossible_sizes_are_refused(size: EpisodeSize, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_source(Sinusoid, sizes=dict.fromkeys(SPLITS, size))


@pytest.mark.parametrize("make", [sinusoid, linear, multimodal], ids=lambda make: make.__name__)
def test_the_truth_of_a_task_runs_through_its_rows(make: Callable[..., Formulas]) -> None:
    source = make(noise=0.0)
    for index in (0, 3):
        batch = source.batch("test", index, 1)
        truth = source.truth("test", index, batch.query_x[0])
        torch.testing.assert_close(truth, batch.query_y[0].double(), rtol=1e-5, atol=1e-5)


def test_numbers_that_a_function_has_are_named() -> None:
    for source in (sinusoid(), linear()):
        assert len(source.parameter_names) == len(source.parameters("test", 0, 1))
