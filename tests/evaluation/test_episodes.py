"""The metrics of an evaluation, against values computed by hand."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from metarun.algorithms.metric.protonet import ProtoNet
from metarun.algorithms.optimization.maml import MAML
from metarun.backbones.conv4 import Conv4
from metarun.core.settings import EvalSettings
from metarun.core.sizes import Range
from metarun.core.statistics import NORMAL_95, interval, t_quantile, wilson_interval
from metarun.core.types import SPLITS, EpisodeSize, Prediction, VaryingSize
from metarun.data.omniglot import OmniglotSmall
from metarun.data.synthetic import Linear
from metarun.evaluation.calibration import fit_temperature
from metarun.evaluation.episodes import evaluate
from tests.data.sources import make_source
from tests.helpers import linear_backbone, make


def linear_tasks() -> Linear:
    size = EpisodeSize(1, 4, 6)
    source: Linear = make_source(Linear, sizes=dict.fromkeys(SPLITS, size), dtype=torch.float64)
    return source


def learner(**options: object) -> MAML:
    return make(MAML, linear_tasks().spec, linear_backbone, **{"inner_lr": 0.3, **options})


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706204736), (2, 4.302652730), (4, 2.776445105), (29, 2.045229642),
     (599, 1.963932249), (100000, 1.959987708)],
)  # fmt: skip
def test_the_quantile_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-9)


@pytest.mark.parametrize(("count", "trials"), [(0, 400), (17, 400), (380, 20000), (7, 7)])
def test_the_binomial_interval_holds_what_the_normal_test_does_not_reject(
    count: int, trials: int
) -> None:
    chances = np.linspace(0.0, 1.0, 200001)[1:-1]
    spread = np.sqrt(chances * (1 - chances) / trials)
    kept = chances[np.abs(count / trials - chances) <= NORMAL_95 * spread]
    found = wilson_interval(count, trials)
    assert found == pytest.approx((kept.min(), kept.max()), abs=2e-5)


def test_the_interval_is_t_s_over_root_n() -> None:
    mean, ci95 = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert ci95 == pytest.approx(4.302652730 / math.sqrt(3.0), abs=1e-8)


def test_one_value_has_no_interval() -> None:
    mean, ci95 = interval([0.5])
    assert mean == 0.5
    assert math.isnan(ci95)


def test_the_mse_of_a_net_that_answers_zero_is_the_mean_square_of_the_values() -> None:
    source, algorithm = linear_tasks(), learner(eval_inner_steps=0)
    with torch.no_grad():
        for parameter in algorithm.parameters():
            parameter.zero_()
    measured = evaluate(algorithm, source, "test", 7, 3)
    expected = source.batch("test", 0, 7).query_y.square().mean((1, 2))
    np.testing.assert_allclose(measured.values, expected.numpy(), rtol=1e-12)


def test_neither_figures_nor_hash_depend_on_how_the_episodes_are_cut() -> None:
    source, algorithm = linear_tasks(), learner()
    whole = evaluate(algorithm, source, "test", 7, 100, curve_steps=2)
    cut = evaluate(algorithm, source, "test", 7, 3, curve_steps=2)
    np.testing.assert_allclose(whole.values, cut.values, rtol=1e-12)
    np.testing.assert_allclose(whole.arrays["curve"], cut.arrays["curve"], rtol=1e-12)
    assert whole.digest == cut.digest


def test_embeddings_are_collected_over_the_episodes_where_there_are_any() -> None:
    class Mean(MAML):
        """A learner whose embedding of a task is the mean of its support."""

        def adapt(self, support_x, support_y):  # type: ignore[no-untyped-def]
            mean = torch.cat([support_x, support_y], 2).mean(1)
            return {**super().adapt(support_x, support_y), "mean": mean}

        def answer(self, adapted, query_x):  # type: ignore[no-untyped-def]
            weights = {name: tensor for name, tensor in adapted.items() if name != "mean"}
            outputs = super().answer(weights, query_x).outputs
            return Prediction(outputs, embedding=adapted["mean"])

    source = linear_tasks()
    batch = source.batch("test", 0, 7)
    expected = torch.cat([batch.support_x, batch.support_y], 2).mean(1)
    kept = evaluate(make(Mean, source.spec, linear_backbone), source, "test", 7, 3)
    np.testing.assert_array_equal(kept.arrays["embeddings"], expected.numpy())
    assert "embeddings" not in evaluate(learner(), source, "test", 7, 3).arrays


def test_other_episodes_have_another_hash() -> None:
    source, algorithm = linear_tasks(), learner()
    digests = {
        evaluate(algorithm, source, "test", 7, 7).digest,
        evaluate(algorithm, source, "test", 6, 7).digest,
        evaluate(algorithm, source, "val", 7, 7).digest,
    }
    assert len(digests) == 3


def test_each_point_of_the_curve_is_an_evaluation_with_as_many_steps() -> None:
    source = linear_tasks()
    curve = evaluate(learner(), source, "test", 5, 5, curve_steps=3).arrays["curve"]
    assert curve.shape == (4, 5)
    for steps in range(4):
        direct = evaluate(learner(eval_inner_steps=steps), source, "test", 5, 5)
        np.testing.assert_allclose(curve[steps], direct.values, rtol=1e-12)


def test_an_evaluation_changes_nothing_and_says_how_far_it_is() -> None:
    source, algorithm = linear_tasks(), learner()
    before = {name: value.clone() for name, value in algorithm.named_parameters()}
    done: list[int] = []
    evaluate(algorithm, source, "val", 7, 3, tick=done.append)
    assert done == [3, 6, 7]
    assert algorithm.training
    for name, value in algorithm.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_an_algorithm_that_draws_at_random_is_measured_alike_each_time() -> None:
    class Guesser(MAML):
        def answer(self, adapted, query_x):  # type: ignore[no-untyped-def]
            outputs = super().answer(adapted, query_x).outputs
            return Prediction(outputs + torch.randn_like(outputs))

    algorithm = make(Guesser, linear_tasks().spec, linear_backbone)
    first = evaluate(algorithm, linear_tasks(), "test", 4, 2).values
    torch.manual_seed(99)
    np.testing.assert_array_equal(first, evaluate(algorithm, linear_tasks(), "test", 4, 2).values)


def test_an_algorithm_that_overrides_predict_is_told_of_the_two_verbs() -> None:
    with pytest.raises(TypeError, match="Old overrides predict: override adapt and answer"):

        class Old(MAML):
            def predict(self, support_x, support_y, query_x):  # type: ignore[no-untyped-def]
                return super().predict(support_x, support_y, query_x)


def test_what_classes_are_taken_for_is_counted_over_all_queries() -> None:
    sizes = {split: EpisodeSize(3, 1, 4) for split in SPLITS}
    source = make_source(OmniglotSmall, sizes=sizes, dtype=torch.float64)
    algorithm = make(ProtoNet, source.spec, partial(Conv4, filters=2))
    found = evaluate(algorithm, source, "test", 7, 3).arrays["confusions"]
    naive: Counter[tuple[int, int]] = Counter()
    for index in range(7):
        batch = source.batch("test", index, 1)
        assert batch.class_ids is not None
        with torch.no_grad():
            answer = algorithm.eval().predict(batch.support_x, batch.support_y, batch.query_x)
        ids = batch.class_ids[0].tolist()
        for label, taken in zip(
            batch.query_y[0].tolist(), answer.outputs[0].argmax(-1).tolist(), strict=True
        ):
            naive[ids[label], ids[taken]] += 1
    assert {(own, taken): count for own, taken, count in found.tolist()} == naive
    assert max(found[:, :2].max(1)) < len(source.class_names("test"))
    measured = evaluate(algorithm, source, "test", 7, 3)
    queries = measured.record["queries"]
    assert (queries["number"], queries["wrong"]) == (84, round(84 * (1 - measured.values.mean())))
    assert (queries["low"], queries["high"]) == wilson_interval(queries["wrong"], 84)


@pytest.mark.parametrize("together", [1, 3, 25])
def test_episodes_of_different_sizes_are_measured_one_by_one_in_their_order(together: int) -> None:
    own = VaryingSize(Range(2, 4), Range(1, 2), Range(1, 3))
    sizes = dict.fromkeys(SPLITS, own.largest)
    source = make_source(
        OmniglotSmall, sizes=sizes, varying=dict.fromkeys(SPLITS, own), dtype=torch.float64
    )
    algorithm = make(ProtoNet, source.spec, partial(Conv4, filters=2)).eval()
    right: list[float] = []
    for index in range(20):
        task = source.batch("test", index, 1)
        with torch.no_grad():
            answer = algorithm.predict(task.support_x, task.support_y, task.query_x).outputs
        right.append(float((answer.argmax(-1) == task.query_y).double().mean()))
    found = evaluate(algorithm, source, "test", 20, together)
    np.testing.assert_allclose(found.values, right, rtol=1e-12)
    np.testing.assert_allclose(found.arrays["nll"].mean(), found.record["measures"]["nll"]["mean"])
    queries = sum(source.batch("test", index, 1).query_y.numel() for index in range(20))
    assert found.record["queries"]["number"] == queries
    assert found.digest == evaluate(algorithm, source, "test", 20, 7).digest
    assert found.digest != evaluate(algorithm, source, "test", 19, 7).digest


def test_a_temperature_is_fitted_to_episodes_of_different_sizes() -> None:
    own = VaryingSize(Range(2, 4), Range(1, 2), Range(1, 3))
    varied = {
        "sizes": dict.fromkeys(SPLITS, own.largest),
        "varying": dict.fromkeys(SPLITS, own),
    }
    source = make_source(OmniglotSmall, dtype=torch.float64, **varied)
    algorithm = make(ProtoNet, source.spec, partial(Conv4, filters=2)).eval()
    fitted = fit_temperature(algorithm, source, EvalSettings(val_episodes=12))

    def loss(temperature: float) -> float:
        total, rows = 0.0, 0
        for index in range(12):
            task = source.batch("val", index, 1)
            with torch.no_grad():
                logits = algorithm.predict(task.support_x, task.support_y, task.query_x).outputs
            scaled = logits[0] / temperature
            total += float(
                torch.nn.functional.cross_entropy(scaled, task.query_y[0], reduction="sum")
            )
            rows += len(scaled)
        return total / rows

    assert loss(fitted) < min(loss(0.9 * fitted), loss(1.1 * fitted))


def test_functions_have_no_classes_to_confuse() -> None:
    assert "confusions" not in evaluate(learner(), linear_tasks(), "test", 2, 2).arrays
