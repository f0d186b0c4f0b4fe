"""Measures against values computed row by row, and a measure that a user adds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metarun import load
from metarun.cli.main import main
from metarun.core.results import completed, measures_of
from metarun.core.statistics import interval, pseudo_values, t_quantile
from metarun.core.types import Prediction, TaskBatch, TaskSpec
from metarun.evaluation.calibration import best_temperature
from metarun.evaluation.measures import Answers, Joined, ece, nll
from metarun.runs.folder import RunFolder
from metarun.runs.openings import openings, openings_with
from metarun.trackers.base import final

TINY = [
    "algo=protonet", "data=omniglot_small", "way=3", "shot=1", "query=4", "backbone.filters=4",
    "train.steps=2", "train.tasks_per_step=2", "eval.episodes=6", "eval.val_episodes=4",
    "eval.tasks_per_batch=4", "device=cpu", "threads=1",
]  # fmt: skip


def answers(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Answers:
    spec = TaskSpec("classification", (1,), logits.shape[-1], logits.shape[-1])
    batch = TaskBatch(labels, labels, labels, labels)
    return Answers(spec, batch, Prediction(logits), temperature)


def drawn(tasks: int = 40, queries: int = 7, ways: int = 4) -> tuple[Tensor, Tensor]:
    """Logits and labels that are right more often than not."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(ways, (tasks, queries), generator=draw)
    logits = 2.0 * torch.randn(tasks, queries, ways, generator=draw, dtype=torch.float64)
    return logits + 1.5 * torch.nn.functional.one_hot(labels, ways), labels


def naive_ece(logits: Tensor, labels: Tensor) -> float:
    """The sum over bins of their share times the gap of accuracy and confidence, row by row."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True):
        shares = [math.exp(value) / sum(map(math.exp, row)) for value in row]
        sure = max(shares)
        place = next(b for b in range(1, 16) if sure <= b / 15)
        bins.setdefault(place, []).append((sure, shares.index(sure) == label))
    total = sum(map(len, bins.values()))
    gaps = [
        len(rows) / total * abs(np.mean([r for _, r in rows]) - np.mean([s for s, _ in rows]))
        for rows in bins.values()
    ]
    return float(sum(gaps))


def summed(logits: Tensor, labels: Tensor) -> np.ndarray:
    """The values of the calibration error of each episode."""
    found = ece(answers(logits, labels))
    assert found is not None
    joined = Joined({"ece": found.numpy()}, np.zeros(len(logits)), None)  # type: ignore[arg-type]
    return ece.summary(joined).arrays["ece"]


def test_the_calibration_error_is_that_of_a_count_row_by_row() -> None:
    logits, labels = drawn()
    values = summed(logits, labels)
    assert values.shape == (40,)
    assert values.mean() == pytest.approx(naive_ece(logits, labels), abs=1e-12)
    # How queries are divided among episodes does not matter for the error itself.
    again = summed(logits.reshape(70, 4, 4), labels.reshape(70, 4))
    assert again.mean() == pytest.approx(values.mean(), abs=1e-12)


def test_a_classifier_that_is_sure_and_wrong_has_an_error_of_one_and_one_of_chance_none() -> None:
    labels = torch.zeros(3, 4, dtype=torch.int64)
    wrong = torch.tensor([0.0, 1e4]).expand(3, 4, 2)
    np.testing.assert_allclose(summed(wrong, labels), 1.0)
    half = torch.tensor([[0, 1, 0, 1]]).expand(3, 4)
    np.testing.assert_allclose(summed(torch.zeros(3, 4, 2), half), 0.0, atol=1e-12)


def test_the_negative_log_likelihood_of_equal_logits_is_the_logarithm_of_the_ways() -> None:
    labels = drawn()[1]
    found = nll(answers(torch.zeros(40, 7, 4), labels))
    torch.testing.assert_close(found, torch.full((40,), math.log(4.0), dtype=torch.float64))


def test_the_negative_log_likelihood_is_the_cross_entropy_of_logits_over_temperature() -> None:
    logits, labels = drawn()
    found = nll(answers(logits, labels, temperature=2.5))
    for task in range(len(logits)):
        expected = torch.nn.functional.cross_entropy(logits[task] / 2.5, labels[task])
        assert float(found[task]) == pytest.approx(float(expected))  # type: ignore[index]


def test_regressions_have_neither() -> None:
    targets = torch.zeros(2, 3, 1)
    spec = TaskSpec("regression", (1,), 1, 1)
    here = Answers(spec, TaskBatch(targets, targets, targets, targets), Prediction(targets))
    assert nll(here) is None
    assert ece(here) is None


# The interval of a pooled statistic.


def test_pseudo_values_of_a_mean_are_the_means_of_the_episodes() -> None:
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((30, 5))
    sums = np.stack([rows.sum(1), np.full(30, 5.0)], 1)
    values = pseudo_values(sums, lambda pooled: pooled[..., 0] / pooled[..., 1])
    np.testing.assert_allclose(values, rows.mean(1), atol=1e-12)


def test_the_interval_of_a_pooled_statistic_is_the_jackknifes() -> None:
    logits, labels = drawn()
    mean, ci95 = interval(summed(logits, labels))
    kept = [[j for j in range(40) if j != i] for i in range(40)]
    left_out = np.array([naive_ece(logits[rows], labels[rows]) for rows in kept])
    error = math.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum())
    assert mean == pytest.approx(naive_ece(logits, labels))
    assert ci95 == pytest.approx(t_quantile(39) * error)


def test_one_episode_has_a_value_and_no_interval() -> None:
    logits, labels = drawn(tasks=1)
    mean, ci95 = interval(summed(logits, labels))
    assert mean == pytest.approx(naive_ece(logits, labels))
    assert math.isnan(ci95)


def test_logits_that_are_not_finite_give_measures_that_are_not() -> None:
    logits, labels = drawn()
    logits[3, 2] = math.nan
    assert not np.isfinite(summed(logits, labels)).any()
    assert int(torch.isnan(nll(answers(logits, labels))).sum()) == 1  # type: ignore[arg-type]


# Temperature.


def test_the_temperature_has_the_least_cross_entropy() -> None:
    logits, labels = drawn()
    rows, classes = logits.flatten(0, 1), labels.flatten()
    best = best_temperature(rows.numpy(), classes.numpy())

    def cross_entropy(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(rows / temperature, classes))

    assert all(cross_entropy(best) < cross_entropy(best * factor) for factor in (0.99, 1.01))


@pytest.mark.parametrize("factor", [1e-2, 1.0, 30.0])
def test_logits_times_a_factor_have_a_temperature_times_the_factor(factor: float) -> None:
    logits, labels = drawn()
    rows, classes = logits.flatten(0, 1).numpy(), labels.flatten().numpy()
    found = best_temperature(factor * rows, classes)
    assert found == pytest.approx(factor * best_temperature(rows, classes))


def test_logits_of_the_true_probabilities_have_a_temperature_near_one() -> None:
    draw = np.random.default_rng(0)
    logits = 2.0 * draw.standard_normal((40000, 5))
    noise = draw.gumbel(size=logits.shape)
    assert best_temperature(logits, (logits + noise).argmax(1)) == pytest.approx(1.0, abs=0.03)


# Runs.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measures") / "run"
    assert main([*TINY, f"hydra.run.dir={path}"]) == 0
    return path


def test_a_classifier_has_both_measures_in_its_files(run: Path) -> None:
    results = RunFolder(run).read_results()
    named = {measure.name: (measure, value) for measure, value in measures_of(results)}
    with np.load(run / "episodes.npz") as arrays:
        for name in ("nll", "ece"):
            measure, value = named[name]
            assert (measure.better, arrays[name].shape) == ("lower", (6,))
            assert value["mean"] == pytest.approx(arrays[name].mean())
            assert final(results)[f"test/{name}"] == value["mean"]
    assert results["temperature"] == 1.0


def test_a_temperature_of_meta_val_is_stored_and_leaves_accuracies_alone(
    run: Path, tmp_path: Path
) -> None:
    plain = RunFolder(run).read_results()
    assert main([*TINY, "eval.temperature=val", f"hydra.run.dir={tmp_path}"]) == 0
    results = RunFolder(tmp_path).read_results()
    temperature = results["temperature"]
    assert temperature != 1.0
    assert results["test"] == plain["test"]
    assert results["measures"]["nll"]["mean"] != plain["measures"]["nll"]["mean"]
    # `metarun predict` gives the calibrated probabilities, and the same labels.
    images = [np.full((28, 28), shade, dtype=np.uint8) for shade in (0, 90, 255, 30)]
    one, other = (load(path).fit(images[:3], list("abc")) for path in (run, tmp_path))
    logits = np.log(one.predict_proba(images)) / temperature
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(other.predict_proba(images), expected, rtol=1e-6)


def test_a_regression_has_no_temperature(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data=sinusoid", "eval.temperature=val", "train.steps=1"]) == 2
    assert "eval.temperature=val needs episodes of classification" in capsys.readouterr().err


def test_a_table_has_a_measure_only_if_it_is_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(run)]) == 0
    assert "negative log-likelihood" not in capsys.readouterr().out
    assert main(["table", str(run), "--columns", "ece,nll"]) == 0
    out = capsys.readouterr().out
    value = RunFolder(run).read_results()["measures"]["nll"]["mean"]
    assert "expected calibration error, %" in out
    assert f"{value:.3f} ± " in out
    assert main(["table", str(run), "--columns", "nl"]) == 2
    assert "--columns nl: expected nll, ece" in capsys.readouterr().err


def test_a_comparison_has_a_measure_only_if_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "--dir", str(tmp_path / "runs"), *TINY]
    assert main([*words, "--columns", "nl"]) == 2
    assert "--columns nl: expected one of log_likelihood, coverage, nll, ece" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()
    assert main(words) == 0
    assert "negative log-likelihood" not in capsys.readouterr().out
    assert main([*words, "--columns", "nll"]) == 0
    (results,) = (tmp_path / "runs").glob("*/results.json")
    value = json.loads(results.read_text())["measures"]["nll"]["mean"]
    out = capsys.readouterr().out
    assert "negative log-likelihood, nats" in out
    assert f"{value:.3f} ± " in out


def test_results_of_before_are_completed() -> None:
    value = {"mean": 0.5, "ci95": 0.1}
    results = completed({"metric": "mse", "log_likelihood": value, "coverage": value})
    shown = {measure.title: own["mean"] for measure, own in measures_of(results)}
    assert shown == {"log-likelihood": 0.5, "within the 95 % band": 0.5}
    assert (results["temperature"], results["test_openings"]) == (1.0, 1)


# How often the test split was opened.


def test_meta_tests_on_the_own_test_split_are_counted(tmp_path: Path) -> None:
    words = ["data=linear", "backbone.hidden=[4]", "train.steps=1", "eval.episodes=2"]
    small = ["eval.val_episodes=2", "device=cpu", "threads=1", "~recipe"]
    assert main([*words, *small, f"hydra.run.dir={tmp_path}"]) == 0
    assert RunFolder(tmp_path).read_results()["test_openings"] == openings(tmp_path) == 1
    stored = []
    for other in ("shot=7", "data=sinusoid", "eval.episodes=3"):
        assert main([f"test={tmp_path}", other]) == 0
        newest = max(
            (tmp_path / "tests").glob("*/results.json"), key=lambda p: p.stat().st_mtime_ns
        )
        stored.append(json.loads(newest.read_text())["test_openings"])
    assert stored == [2, 2, 3]
    assert openings(tmp_path) == 3
    # A longer training ends with a meta-test of its own.
    assert main([f"resume={tmp_path}", "train.steps=2"]) == 0
    assert RunFolder(tmp_path).read_results()["test_openings"] == openings(tmp_path) == 4


def test_a_meta_test_that_was_removed_has_been_made(run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "tests" / "one", tmp_path / "tests" / "two"
    for folder, number in ((tmp_path, 1), (one, 2), (two, 3)):
        folder.mkdir(parents=True, exist_ok=True)
        record = json.loads((run / "results.json").read_text()) | {"test_openings": number}
        (folder / "results.json").write_text(json.dumps(record))
    (one / "results.json").unlink()
    assert openings(tmp_path) == 3


def test_damaged_results_that_are_not_counted_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "environment.json").write_text('{"data_fingerprint": "own"}')
    (tmp_path / "results.json").write_bytes(bytes(9))
    assert openings_with(RunFolder(tmp_path), "own") == 1
    assert "results.json is damaged: test_openings leaves its meta-test out" in caplog.text


# A user's measure: one function in a module outside the repository.

STRANGER = """
from metarun.evaluation.measures import measure

@measure("margin", "margin of the best class", unit="%", better="higher", places=1)
def margin(answers):
    best = answers.probabilities.topk(2).values
    return (best[..., 0] - best[..., 1]).mean(1)

def plain(answers):
    return answers.targets.double().mean(1)

@measure("ece", "taken")
def taken(answers):
    return answers.targets.double().mean(1)
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("stranger", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stranger_adds_a_measure_by_one_function(
    stranger: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*TINY, "eval.measures=[stranger.margin]", "hydra.run.dir=run"]) == 0
    results = RunFolder(stranger / "run").read_results()
    with np.load("run/episodes.npz") as arrays:
        assert arrays["margin"].shape == (6,)
        mean = arrays["margin"].mean()
    assert final(results)["test/margin"] == pytest.approx(mean)
    assert 0.0 < mean < 1.0
    # Tables and reports take it from the results and need no module.
    monkeypatch.delitem(sys.modules, "stranger")
    Path("stranger.py").unlink()
    capsys.readouterr()
    assert main(["table", "run", "--columns", "margin"]) == 0
    out = capsys.readouterr().out
    assert "margin of the best class, %" in out
    assert f"{100 * mean:.1f} ± " in out
    assert main(["report", "run"]) == 0
    page = Path("run/report.html").read_text()
    assert "margin of the best class, %" in page
    assert f"{100 * mean:.1f} ± " in page


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stranger.nothing", "stranger has no nothing"),
        ("nowhere.margin", "there is no module nowhere"),
        ("stranger.plain", "stranger.plain is no measure: expected a function with the decorator"),
        ("stranger.taken", "stranger.taken has the name ece, which is taken"),
        ("margin", "expected the dotted name"),
    ],
)
@pytest.mark.usefixtures("stranger")
def test_what_is_no_measure_is_one_line_before_any_file(
    name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, f"eval.measures=[{name}]"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("outputs").exists()
