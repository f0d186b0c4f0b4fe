"""Tests of `metarun table`: marks, seeds, cells that were not run, and paired differences."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from metarun.config.catalogue import conf_dir
from metarun.config.composition import composer
from metarun.reporting.published import Group, Run, group, published_lines, read_runs
from metarun.reporting.references import read_reference
from metarun.reporting.results import figure_of, paired
from metarun.reporting.tables import Figure, RowSeries, Table, render
from tests.conftest import Command
from tests.reporting.test_tables import result

SMALL = [
    "train.steps=2", "train.tasks_per_step=2", "eval.episodes=6", "eval.val_episodes=4",
    "train.log_every=1", "device=cpu", "threads=1",
]  # fmt: skip
CELL = "zintgraf2019_sinusoid_2context"


def rows_of(text: str) -> list[dict[str, str]]:
    """Return the rows of all tables, which CSV joins in one."""
    return list(csv.DictReader(io.StringIO(text)))


def cells(rows: list[dict[str, str]]) -> Mapping[str, dict[str, str]]:
    return {row["experiment"]: row for row in rows if row.get("experiment")}


def test_a_point_of_the_curve_stands_for_the_figure_after_so_many_steps() -> None:
    one = result([0.5, 0.75])
    curve = np.asarray([[0.25, 0.25], [0.5, 1.0]])
    one = type(one)(one.record, one.episodes, None, curve)
    assert figure_of([one]).mean == 62.5
    assert figure_of([one], inner_steps=1).mean == 75.0
    with pytest.raises(LookupError, match="not measured after 2 steps"):
        figure_of([one], inner_steps=2)


def test_a_presentation_of_a_class_stands_for_the_figure_there() -> None:
    one = result([0.5, 0.75])
    one = replace(one, presentations=np.asarray([[0.25, 0.75], [0.25, 1.0]]))
    assert figure_of([one]).mean == 62.5
    assert figure_of([one], presentation=1).mean == 25.0
    assert figure_of([one], presentation=2).mean == 87.5
    with pytest.raises(LookupError, match="not measured at presentation 3"):
        figure_of([one], presentation=3)


def test_a_pair_is_told_apart_where_the_paired_t_test_says_so() -> None:
    draw = np.random.default_rng(0)
    for shift in (0.0, 0.02, 0.05):
        one = draw.uniform(size=40)
        other = one - shift + 0.1 * draw.normal(size=40)
        found = paired([result(list(one), "mse")], [result(list(other), "mse")])
        known = stats.ttest_rel(one, other)
        assert found.mean == pytest.approx(np.mean(one - other))
        assert found.meets(Figure(0.0)) == (known.pvalue > 0.05)


def test_intervals_meet_where_they_overlap() -> None:
    assert Figure(1.0, 0.2).meets(Figure(1.3, 0.1))
    assert not Figure(1.0, 0.2).meets(Figure(1.31, 0.1))
    assert Figure(1.0, 0.2).meets(Figure(1.2, None))
    assert not Figure(1.0, float("nan")).meets(Figure(1.1))


def test_latex_escapes_what_means_something_to_it() -> None:
    text = render("latex", [Table("t", [{"a_b": "50 % & more", "c": Figure(1.5, 0.25)}])])
    assert text.splitlines()[2:] == [
        r"\toprule",
        r"a\_b & c \\",
        r"\midrule",
        r"50 \% \& more & 1.50 $\pm$ 0.25 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_html_has_the_numbers_to_sort_by_and_executes_nothing() -> None:
    lines = [
        {"run": "<script>alert(1)</script>", "time": "1 min 30 s", "ours": Figure(1.5), "x": ""},
        {"run": "b", "time": "–", "ours": Figure(float("nan")), "x": ""},
    ]
    table = Table("a & b", lines, series={"b": RowSeries("entry1", "#123456")})
    text = render("html", [table])
    assert "<script" not in text
    assert "<caption>a &amp; b</caption>" in text
    assert text.count("<th ") == 3
    values = re.findall(r'data-value="([^"]+)"', text)
    assert values == ["90.0", "1.5"]
    assert '<tr data-series="entry1" tabindex="0"><td><span class="dot"' in text
    assert text.count("<tr") == 3


def test_a_paper_is_held_against_what_was_run(metarun: Command, tmp_path: Path) -> None:
    answer = metarun("-m", f"experiment={CELL}", "seed=0,1", *SMALL)
    assert answer.code == 0, answer.err
    each, table = answer.out.split("runs are finished")
    # Each run ends with the published value, and the sweep with the table.
    assert each.count(f"{CELL}: Zintgraf et al. 2019, Table 1\n") == 2
    assert each.count("0.21 ± 0.02 (unverified)") == 2
    assert CELL in table
    answer = metarun("table", "outputs/sweeps", "--format", "csv")
    found = cells(rows_of(answer.out))
    ours = found[CELL]
    results = [json.loads(p.read_text()) for p in sorted(tmp_path.rglob("results.json"))]
    assert float(ours["ours"]) == pytest.approx(
        np.mean([r["test"]["mean"] for r in results]), rel=1e-4
    )
    over_seeds = stats.t.ppf(0.975, 1) * stats.sem([r["test"]["mean"] for r in results])
    assert float(ours["ours ci95 over seeds"]) == pytest.approx(over_seeds, rel=1e-4)
    assert (ours["published"], ours["published ci95"]) == ("0.21", "0.02")
    assert ours["published mark"] == "unverified"
    assert float(ours["difference"]) == pytest.approx(float(ours["ours"]) - 0.21, abs=0.01)
    assert (ours["ours mark"], ours["steps"]) == ("partial", "2 of 50,000")
    reference = read_reference([conf_dir()], CELL)
    assert reference is not None
    assert float(ours["reference"]) == reference.cells[0].value
    assert ours["reference mark"] == reference.cells[0].outcome
    assert "changed: " in ours["note"]
    assert "eval.episodes=6" in ours["note"]
    assert (ours["seeds"], ours["episodes"]) == ("2", "6")
    # The other rows of the paper's table are marked "not run".
    other = found["zintgraf2019_sinusoid_50context"]
    assert (other["ours"], other["steps"]) == ("not run", "0 of 50,000")


def test_a_figure_that_was_not_measured_says_so(metarun: Command) -> None:
    words = ["experiment=finn2017_sinusoid_5shot", *SMALL, "eval.curve_steps=5"]
    assert metarun(*words).code == 0
    rows = rows_of(metarun("table", "outputs", "--format", "csv").out)
    found = {row["task"]: row["ours"] for row in rows if row.get("experiment") == words[0][11:]}
    assert float(found["5 points, 5 steps"]) > 0
    assert found["5 points, 10 steps"] == "not measured after 10 steps: eval.curve_steps"


def test_every_format_has_every_row(metarun: Command) -> None:
    assert metarun(f"experiment={CELL}", *SMALL).code == 0
    for style in ("terminal", "markdown", "latex", "json", "html"):
        answer = metarun("table", "outputs", "--format", style)
        assert answer.code == 0, answer.err
        text = answer.out.replace("\\_", "_")
        assert all(f"zintgraf2019_sinusoid_{n}context" in text for n in (1, 2, 3, 4, 5, 50))
        assert text.count("not run") >= 5
        assert "0.21" in text


@pytest.mark.slow
def test_runs_of_no_paper_are_ranked_by_meta_val_and_named_by_what_differs(
    metarun: Command,
) -> None:
    words = ["-m", "data=linear", "optim.lr=0.0001,0.05", "seed=0,1", *SMALL, "train.steps=60"]
    assert metarun(*words).code == 0
    rows = rows_of(metarun("table", "outputs", "--format", "csv").out)
    own = [row for row in rows if row.get("run")]
    assert {row["run"] for row in own} == {"optim.lr=0.0001", "optim.lr=0.05"}
    assert float(own[0]["meta-val"]) < float(own[1]["meta-val"])
    assert [row["seeds"] for row in own] == ["2", "2"]
    (pair,) = (row for row in rows if row["table"].startswith("on the same episodes"))
    assert (pair["best on meta-val"], pair["other"]) == (own[0]["run"], own[1]["run"])


def test_a_seed_that_was_run_twice_counts_once(metarun: Command, tmp_path: Path) -> None:
    for _ in range(2):
        assert metarun("data=linear", "seed=3", *SMALL).code == 0
    (found,) = group(read_runs([tmp_path / "outputs"]))
    assert len(found.runs) == 1


def test_a_rehearsal_says_of_how_many_steps(metarun: Command) -> None:
    assert metarun("data=linear", *SMALL, "train.steps=5000", "train.rehearse=1e-9").code == 0
    (row,) = rows_of(metarun("table", "outputs", "--format", "csv").out)
    assert row["steps"] == "1 of 5,000"


def test_a_run_that_is_not_finished_is_named_with_the_first_of_its_reason(
    metarun: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert metarun("data=linear", *SMALL).code == 0
    (status,) = tmp_path.rglob("status.json")
    why = f"out of luck {'for ever and ' * 20}ever; `metarun resume=…` continues"
    status.write_text(json.dumps({"state": "failed", "step": 1, "why": why}))
    monkeypatch.setenv("COLUMNS", "80")
    lines = metarun("table", "outputs").out.splitlines()
    assert lines[0] == "not finished"
    text = " ".join(lines)
    assert "failed at step 1 of " in text
    assert "out of luck for ever and" in text
    assert text.count("continues") == 1
    assert max(len(line) for line in lines if "outputs/" not in line) <= 80
    assert len(lines) < 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["last"], "last: there is no run below outputs/"),
        ([], "metarun table needs a folder or --paper NAME: type `metarun table outputs/sweeps`"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], ". contains no run: expected a run folder"),
        (["--paper", "fin"], "--paper fin: expected one of "),
    ],
)
def test_a_table_of_nothing_is_refused(words: list[str], message: str, metarun: Command) -> None:
    answer = metarun("table", *words)
    assert answer.code == 2
    assert answer.err.startswith(f"error: {message}")


@pytest.mark.slow
def test_a_damaged_run_is_named_and_hides_no_other(metarun: Command, tmp_path: Path) -> None:
    words = ["-m", "data=linear", "algo=maml,anil", *SMALL]
    assert metarun(*words).code == 0
    (results,) = (tmp_path / "outputs/sweeps").glob("algo=anil*/results.json")
    config = results.with_name("config.yaml")
    whole = config.read_text()
    for damaged, remedy in ((config, "remove the folder"), (results, "metarun resume=")):
        config.write_text(whole)
        damaged.write_text("{")
        answer = metarun("table", "outputs")
        assert answer.code == 1
        assert f"{results.parent.name} is damaged: {damaged.name}" in answer.err
        assert remedy in answer.err
        assert "algo=maml" in answer.out
        assert "algo=anil" not in answer.out
    answer = metarun(*words)
    assert answer.code == 0, answer.err
    assert "results.json is damaged" in answer.err
    assert "algo=anil" in answer.out


def test_a_learner_without_training_steps_has_a_word() -> None:
    with composer() as compose:
        config = compose.job(["experiment=javed2019_omniglot_online_1class"]).config
    one = result([0.04, 0.05], steps=0, seconds=1.0)
    run = Run(Path("run"), config, (), one, {"state": "finished", "time": ""})
    (line,) = published_lines(Group((run,), config, ""))
    assert (str(line["ours"]), line["steps"]) == ("4.50 ± 6.35 (reproduced)", "0 of 0")
