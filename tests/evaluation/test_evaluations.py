"""The three verbs of an evaluation on episodes and streams: run, state_dict, load_state_dict."""

from __future__ import annotations

import numpy as np
import pytest

from metarun.config.build import Experiment, build_experiment
from metarun.evaluation.evaluation import Evaluated, Evaluation
from metarun.evaluation.on_split import meta_test, meta_validation
from tests.helpers import composed

SMALL = ["eval.episodes=5", "eval.val_episodes=3", "eval.tasks_per_batch=2", "device=cpu"]
EPISODES = ["algo=maml", "data=linear", "backbone.hidden=[4]", "~recipe"]
STREAMS = ["algo=replay", "data=stream_linear", "data.tasks=2", "backbone.hidden=[4]", "shot=3"]


@pytest.fixture(params=[EPISODES, STREAMS], ids=["episodes", "streams"], scope="module")
def made(request: pytest.FixtureRequest) -> Experiment:
    return build_experiment(composed(*request.param, *SMALL))


def on_test(made: Experiment) -> Evaluation:
    return meta_test(made.algorithm, made.source, made.eval)


def assert_same(one: Evaluated, other: Evaluated) -> None:
    assert one.record == other.record
    assert one.files == other.files
    assert one.digest == other.digest
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])


class StopError(Exception):
    pass


def test_an_evaluation_that_is_stopped_and_continued_equals_a_whole_one(made: Experiment) -> None:
    whole = on_test(made).run()

    def stop(done: int) -> None:
        if done >= 4:
            raise StopError

    first = on_test(made)
    with pytest.raises(StopError):
        first.run(stop)
    second = on_test(made)
    state = first.state_dict()
    if state is not None:
        second.load_state_dict(state)
    assert_same(second.run(), whole)
    assert_same(first.run(), whole)


def test_an_evaluation_counts_to_its_size(made: Experiment) -> None:
    done: list[int] = []
    evaluation = on_test(made)
    evaluation.run(done.append)
    assert done[-1] == evaluation.size
    assert done == sorted(done)


def test_meta_validation_has_the_metric_alone(made: Experiment) -> None:
    found = meta_validation(made.algorithm, made.source, made.eval).run()
    assert found.values.shape == (3,)
    assert set(found.arrays) == {made.source.spec.metric}
    assert found.record["measures"] == {}
