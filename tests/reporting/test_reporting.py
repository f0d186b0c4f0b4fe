"""Tests of `metarun report` on real runs: pages have all available parts, and name the others."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from metarun.cli.main import main
from tests.helpers import slow
from tests.reporting.conftest import RUNS, made, swept

BOTH = {"learning", "episodes"}
FITS = {"fit-good", "fit-median", "fit-bad"}
GRIDS = {"task-good", "task-median", "task-bad", "classes"}
INSIDE = {"moved", "cka", "adaptation"}
EXPECTED = {
    "maml": BOTH | FITS | INSIDE | {"tasks"},
    "characters": BOTH | GRIDS | INSIDE | {"loss", "features-pca-0", "features-tsne-1", "tasks"},
    "protonet": BOTH | GRIDS | {"loss", "features-pca", "features-tsne", "tasks"},
    "cell": BOTH | FITS | INSIDE,
    "anp": BOTH | FITS | {"loss", "tasks"},
    "cavia": BOTH | FITS | {"tasks", "adaptation"},
    "mixture": BOTH | FITS | {"families", "responsibilities", "tasks"},
    "snail": BOTH | GRIDS | {"presentations"},
    "metagan": BOTH | GRIDS | {"samples"},
    "stream": {"matrix", "stream"},
    "selector": BOTH | {"strategies"},
    "nearest": FITS | {"episodes"},
}


QUICK = {"maml", "characters", "stream"}


def figures_of(source: str) -> set[str]:
    return set(re.findall(r'<figure id="figure-([^"]+)"', source))


@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in sorted(RUNS)])
def test_a_run_shows_what_it_has(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(runs, name)
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(folder / "report.html")
    assert said.err == ""
    source = (folder / "report.html").read_text(encoding="utf-8")
    drawn = figures_of(source)
    assert EXPECTED[name] <= drawn
    for figure in drawn:
        for kind in ("svg", "png", "csv"):
            assert (folder / "figures" / f"{figure}.{kind}").stat().st_size
    ids = re.findall(r'\bid="([^"]+)"', source)
    assert len(ids) == len(set(ids))


def test_every_alt_text_and_caption_says_something(runs: Path) -> None:
    folder = made(runs, "characters")
    assert main(["report", str(folder)]) == 0
    source = (folder / "report.html").read_text(encoding="utf-8")
    alts = re.findall(r'<svg [^>]*aria-label="([^"]*)"', source)
    captions = re.findall(r"<figcaption>([^<]*)</figcaption>", source)
    assert len(alts) == len(captions) == len(figures_of(source))
    assert all(len(text) > 20 and "nan" not in text for text in (*alts, *captions))


def test_the_numbers_of_the_page_are_those_of_the_run(runs: Path) -> None:
    folder = made(runs, "maml")
    assert main(["report", str(folder)]) == 0
    results = json.loads((folder / "results.json").read_text())
    with (folder / "figures" / "adaptation.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, point in zip(rows, results["curve"], strict=True):
        assert float(row["mse"]) == pytest.approx(point["mean"], rel=1e-5)
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{results['test']['mean']:.4f} ± {results['test']['ci95']:.4f}" in source
    assert "metarun algo=maml data=sinusoid train.steps=6" in source


def test_the_fit_after_the_last_step_is_nearer_to_the_support_than_before(runs: Path) -> None:
    folder = made(runs, "maml")
    assert main(["report", str(folder)]) == 0
    with (folder / "figures" / "fit-median.csv").open() as file:
        rows = list(csv.DictReader(file))
    whats = {row["what"] for row in rows}
    assert whats == {"function", "query", "support", "0 steps", "1 step", "5 steps", "10 steps"}

    def error(what: str) -> float:
        curve = [(float(r["x"]), float(r["y"])) for r in rows if r["what"] == what]
        support = [(float(r["x"]), float(r["y"])) for r in rows if r["what"] == "support"]
        near = [min(curve, key=lambda point: abs(point[0] - x))[1] - y for x, y in support]
        return sum(d * d for d in near)

    assert error("10 steps") < error("0 steps")
    assert error("function") < 0.1 * error("0 steps")


def test_a_published_cell_stands_beside_what_was_reached(runs: Path) -> None:
    folder = made(runs, "cell")
    assert main(["report", str(folder)]) == 0
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "Published against measured" in source
    # Twelve episodes have so wide an interval that it holds the published value.
    assert "reached at 4 of 70,000 steps" in source
    assert "over 3 seeds, reproduced)" in source


@pytest.mark.slow
def test_a_later_test_is_listed(runs: Path) -> None:
    folder = made(runs, "protonet")
    assert main([f"test={folder}", "shot=2", "eval.episodes=4"]) == 0
    assert main(["report", str(folder)]) == 0
    assert "shot_2" in (folder / "report.html").read_text(encoding="utf-8").replace("=", "_")


@pytest.mark.slow
def test_a_sweep_has_a_table_its_curves_and_its_best_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = swept(runs)
    capsys.readouterr()
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 0
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    drawn = figures_of(source)
    assert {"reached", "learning-together", "adaptation-together"} <= drawn
    assert {"setting-algo-inner_lr", "fit-good"} <= drawn
    assert source.count('<tr data-series="entry') >= 4
    assert "8 runs: maml, reptile on sinusoid" in source
    with (tmp_path / "figures" / "reached.csv").open() as file:
        rows = list(csv.DictReader(file))
    vals = [float(row["meta-val"]) for row in rows]
    assert vals == sorted(vals)
    assert f"best on meta-val, 5 points on sinusoid</dt><dd>{rows[0]['run']}" in source


@pytest.mark.slow
def test_runs_on_different_data_are_not_drawn_on_one_axis(runs: Path, tmp_path: Path) -> None:
    folders = [str(made(runs, name)) for name in ("maml", "cavia", "protonet")]
    assert main(["report", *folders, "--output", str(tmp_path)]) == 0
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {"reached", "reached-2"} <= figures_of(source)
    ids = re.findall(r'\bid="([^"]+)"', source)
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_several_streams_are_drawn_together(runs: Path, tmp_path: Path) -> None:
    one = made(runs, "stream")
    other = tmp_path / "other"
    assert main([*RUNS["stream"], "algo.online_lr=0.3", f"hydra.run.dir={other}"]) == 0
    assert main(["report", str(one), str(other), "--output", str(tmp_path)]) == 0
    assert "stream-together" in figures_of((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_an_unfinished_run_shows_how_far_it_came(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(made(runs, "maml"), folder)
    for name in ("results.json", "episodes.npz", "report.html"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/m')
    status = {"state": "failed", "step": 4, "why": "step 4: out of <luck>"}
    status["time"] = "2026-01-01T00:00:00"
    (folder / "status.json").write_text(json.dumps(status))
    assert main(["report", str(folder)]) == 0
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "The run is failed at step 4: out of &lt;luck&gt;." in source
    assert f"metarun resume={folder}" in source
    assert figures_of(source) == {"learning"}
    (folder / "status.json").write_text(json.dumps({**status, "state": "running", "why": ""}))
    assert main(["report", str(folder)]) == 0
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "The run is running at step 4, or was killed since." in source


def test_a_run_whose_parameters_are_gone_says_why_no_task_is_shown(
    runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "light"
    shutil.copytree(made(runs, "maml"), folder)
    shutil.rmtree(folder / "checkpoints")
    assert main(["report", str(folder)]) == 0
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "No single tasks are shown" in source
    assert "learning" in figures_of(source)
    assert "fit-good" not in figures_of(source)


@pytest.mark.slow
def test_a_damaged_run_is_named_and_the_others_are_reported(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made(runs, "maml"), tmp_path / "good")
    shutil.copytree(made(runs, "maml"), tmp_path / "bad")
    (tmp_path / "bad" / "results.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 1
    assert "bad is damaged" in capsys.readouterr().err
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "last: there is no run below outputs/: type the folder of a run"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "contains no run: expected a run folder"),
        ([".", "--outptu=x"], "--outptu"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["report", *words])
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_page_of_somebody_elses_is_kept(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").write_text("mine")
    assert main(["report", str(made(runs, "maml")), "--output", str(tmp_path)]) == 2
    assert "exists and is not a page of metarun: type --output DIR" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_second_report_replaces_the_first(runs: Path) -> None:
    folder = made(runs, "maml")
    assert main(["report", str(folder)]) == 0
    first = (folder / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text(encoding="utf-8") == first


def test_an_algorithm_that_raises_costs_its_figures_and_no_more(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(made(runs, "nearest"), folder)

    def broken(*_: object) -> object:
        raise RuntimeError("too <many> rows")

    monkeypatch.setattr("metarun.algorithms.baselines.nearest.Nearest.answer", broken)
    assert main(["report", str(folder)]) == 0
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "No single tasks: RuntimeError: too &lt;many&gt; rows" in source
    assert figures_of(source) == {"episodes"}


def test_a_damaged_later_test_is_left_out_and_said(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tested"
    shutil.copytree(made(runs, "nearest"), folder)
    (folder / "tests" / "odd").mkdir(parents=True)
    (folder / "tests" / "odd" / "results.json").write_text("{")
    assert main(["report", str(folder)]) == 0
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "A later meta-test is left out" in source
    assert {"episodes", "fit-good"} <= figures_of(source)


def test_a_run_whose_episodes_are_gone_shows_how_it_learned(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "part"
    shutil.copytree(made(runs, "maml"), folder)
    (folder / "episodes.npz").unlink()
    assert main(["report", str(folder)]) == 1
    assert "remove the folder" not in capsys.readouterr().err
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "Its files are damaged" in source
    assert {"learning", "adaptation"} <= figures_of(source)


def test_a_folder_with_odd_letters_is_quoted(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "we ird'&=x"
    shutil.copytree(made(runs, "nearest"), folder)
    assert main(["report", str(folder)]) == 0
    text = html_text((folder / "report.html").read_text(encoding="utf-8"))
    (line,) = (line for line in text.splitlines() if line.startswith("metarun 'test="))
    assert shlex.split(line)[1] == f"test={folder}"


def html_text(source: str) -> str:
    """Return the texts of the blocks with a copy button."""
    return "\n".join(html.unescape(text) for text in re.findall(r"<pre[^>]*>(.*?)</pre>", source))


@pytest.mark.slow
def test_answers_are_averaged_over_views_as_in_the_test(tmp_path: Path) -> None:
    folder = tmp_path / "views"
    words = [*RUNS["protonet"], "eval.views=4", f"hydra.run.dir={folder}"]
    assert main(words) == 0
    assert main(["report", str(folder)]) == 0
    source = (folder / "report.html").read_text(encoding="utf-8")
    for name in ("good", "median", "bad"):
        with (folder / "figures" / f"task-{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        share = 100 * sum(row["right"] == "True" for row in rows) / len(rows)
        assert re.search(rf'task-{name}".*?{share:.2f} % of its queries', source, re.DOTALL)


@pytest.mark.slow
def test_a_run_that_diverged_is_reported_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "diverged"
    more = ["algo.inner_lr=30", "eval.inner_steps=60", f"hydra.run.dir={folder}"]
    assert main(["algo=fomaml", *RUNS["maml"][1:], *more]) == 0
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().err == ""
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", "".join(re.findall("<figcaption>.*?</figcaption>", source)))


@pytest.mark.slow
def test_entries_have_one_name_on_the_whole_page(runs: Path, tmp_path: Path) -> None:
    folders = [str(made(runs, name)) for name in ("maml", "cavia", "protonet", "characters")]
    assert main(["report", *folders, "--output", str(tmp_path)]) == 0
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr data-series="(entry\d+)"', source)
    assert set(rows) == {"entry0", "entry1", "entry2", "entry3"}
    for key in set(rows):
        places = set(re.findall(rf'id="(reached[-\d]*)--{key}-', source))
        assert len(places) == 1, (key, places)


@pytest.mark.slow
def test_streams_of_another_length_are_drawn_apart(runs: Path, tmp_path: Path) -> None:
    one, other = made(runs, "stream"), tmp_path / "longer"
    assert main([*RUNS["stream"], "data.tasks=4", f"hydra.run.dir={other}"]) == 0
    assert main(["report", str(one), str(other), "--output", str(tmp_path)]) == 0
    assert "stream-together" not in figures_of((tmp_path / "report.html").read_text("utf-8"))


def test_a_file_is_no_folder_for_a_report(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    output = str(tmp_path / "mine")
    assert main(["report", str(made(runs, "nearest")), "--output", output]) == 2
    assert "is a file: expected a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_says_the_command_that_made_it(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(swept(runs), folder)
    typed = ["/bin/metarun", "--multirun", "algo=maml,reptile", "algo.inner_lr=range(1, 3)"]
    for number, path in enumerate(sorted(folder.glob("*/environment.json"))):
        words = ["/bin/metarun", f"resume={path.parent}"] if number == 0 else typed
        path.write_text(json.dumps({**json.loads(path.read_text()), "command": words}))
    assert main(["report", str(folder)]) == 0
    text = html_text((folder / "report.html").read_text(encoding="utf-8"))
    assert "metarun --multirun algo=maml,reptile 'algo.inner_lr=range(1, 3)'" in text.splitlines()
    assert text.count("--multirun") == 1


@pytest.mark.slow
def test_tasks_of_images_are_placed_by_their_support(runs: Path) -> None:
    folder = made(runs, "protonet")
    assert main(["report", str(folder)]) == 0
    with (folder / "figures" / "tasks.csv").open() as file:
        rows = list(csv.DictReader(file))
    with np.load(folder / "episodes.npz") as arrays:
        accuracy = arrays["accuracy"]
    assert [float(row["accuracy, %"]) for row in rows] == pytest.approx(100 * accuracy, rel=1e-4)
    assert len({(row["first"], row["second"]) for row in rows}) == len(rows)
