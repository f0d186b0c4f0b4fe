"""Groups of tasks and their families: the index against scikit-learn's, and a run's report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from metarun.cli.main import main
from metarun.evaluation.task_clusters import adjusted_rand_index, counts, gaussian_mixture


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40))
def test_the_index_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    families, groups = (np.array(own) for own in zip(*pairs, strict=True))
    found = adjusted_rand_index(counts(families, groups))
    assert found == pytest.approx(adjusted_rand_score(families, groups), abs=1e-12)


def test_counts_are_tasks_of_each_family_in_each_group() -> None:
    table = counts(np.array([0, 0, 1, 2]), np.array([1, 1, 0, 1]))
    assert table.tolist() == [[0, 2], [1, 0], [0, 1]]


def test_a_mixture_of_normals_finds_clouds_of_any_scale() -> None:
    draw = np.random.default_rng(0)
    families = np.arange(90) % 3
    points = draw.standard_normal((90, 4)) * [1.0, 100.0, 1.0, 1.0]
    points[:, 0] += 8.0 * (families == 1)
    points[:, 1] += 800.0 * (families == 2)
    groups = gaussian_mixture(points, 3)
    assert groups is not None
    assert adjusted_rand_score(families, groups) > 0.95
    assert gaussian_mixture(np.full((5, 2), np.nan), 2) is None
    assert gaussian_mixture(np.zeros((2, 2)), 3) is None


def test_without_scikit_learn_there_are_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    assert gaussian_mixture(np.zeros((5, 2)), 2) is None


@pytest.mark.parametrize(
    ("algo", "by"),
    [("mixture", "responsibilities"), ("cavia", "a mixture of normals over embeddings")],
)
def test_a_run_says_how_well_families_are_found(
    algo: str, by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"algo={algo}", "data=multimodal", "data.families=[line,sinusoid]", "device=cpu"]
    words += ["train.steps=2", "eval.episodes=40", "eval.val_episodes=2", "threads=1"]
    words += ["~recipe", "backbone.hidden=[8]", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main(words) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    found = results["families"]
    assert found["by"] == by
    with np.load(tmp_path / "run/episodes.npz") as arrays:
        families = arrays["families"]
        assert set(families) == {0, 1}
        if algo == "mixture":
            groups = arrays["groups"]
            assert (groups == arrays["embeddings"].argmax(1)).all()
            assert found["counts"] == counts(families, groups).tolist()
    assert np.sum(found["counts"]) == 40
    assert found["adjusted_rand_index"] == pytest.approx(
        adjusted_rand_index(np.array(found["counts"]))
    )
    assert "families found" in capsys.readouterr().out
