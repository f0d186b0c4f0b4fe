from __future__ import annotations

import contextlib
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from metarun.bench import workloads
from metarun.bench.suite import Suite
from metarun.bench.tables import times
from metarun.bench.workloads import WORKLOADS
from metarun.cli.main import main
from tests.bench.tiny import BY_NAME, TINY
from tests.conftest import Command

ROOT = Path(__file__).parents[2]
QUICKLY = ["--seconds", "0.001", "--no-memory", "--against", "functional,plain,PIL"]


class Done(NamedTuple):
    code: int
    out: str
    record: dict[str, Any]
    figure: str


@contextlib.contextmanager
def tiny_catalogue() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "WORKLOADS", TINY)
        patch.setitem(workloads.GROWTH, "tasks", (1, 3))
        patch.setitem(workloads.GROWTH, "steps", (1, 2))
        patch.setattr("metarun.bench.measuring._SIZES", (16,))
        patch.setenv("COLUMNS", "80")
        yield patch


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One run of the command on small workloads of every method."""
    folder = tmp_path_factory.mktemp("bench")
    out = io.StringIO()
    words = ["--workload", "sinusoid", "protonet", "evaluation", "sampling"]
    files = ["--json", str(folder / "a.json"), "--figure", str(folder / "a.svg")]
    with tiny_catalogue(), contextlib.redirect_stdout(out):
        code = main(["bench", *words, "--engine", "auto,loop", "--graph", "none", "--growth",
                     "tasks,steps", *QUICKLY, *files])  # fmt: skip
    record = json.loads((folder / "a.json").read_text())
    return Done(code, out.getvalue(), record, (folder / "a.svg").read_text())


@pytest.mark.slow
def test_a_run_succeeds_and_shows_a_line_for_each_side(done: Done) -> None:
    assert done.code == 0
    for word in (
        "sinusoid",
        "(vmap,",
        "(loop,",
        "functional",
        "plain",
        "PIL",
    ):
        assert word in done.out


@pytest.mark.slow
def test_its_table_fits_80_columns(done: Done) -> None:
    _, _, table = done.out.partition("\n")
    lines = [line for line in table.splitlines() if not line.startswith("not compared")]
    assert max(map(len, lines)) <= 80
    assert "…" not in table


@pytest.mark.slow
def test_the_record_names_the_machine(done: Done) -> None:
    machine = done.record["machine"]
    assert machine["processor"]
    assert machine["device"] == "cpu"
    assert {"torch", "python"} <= machine["versions"].keys()
    assert machine["torch_threads"] >= 1
    assert machine["cores"] >= 1
    assert machine["date"].startswith("2")
    assert done.record["peak_gflops"]["float32"] > 0


@pytest.mark.slow
def test_the_record_holds_every_figure_of_every_side(done: Done) -> None:
    results = done.record["results"]
    # Two engines for each but the sampler, which has none.
    assert len(results) == 2 * 3 + 1
    for result in results:
        sides = [result["metarun"], *result["baselines"]]
        assert len(sides) >= 2
        for side in sides:
            assert side["rounds"] >= 3
            assert side["milliseconds"] > 0
            assert side["first_milliseconds"] > 0
            assert side["memory_mib"] is None
        for baseline in result["baselines"]:
            low, high = baseline["ratio_quartiles"]
            assert 0 < low <= high
            ratio = baseline["milliseconds"] / result["metarun"]["milliseconds"]
            assert baseline["ratio"] == pytest.approx(ratio)


@pytest.mark.slow
def test_every_difference_of_a_step_is_in_the_record(done: Done) -> None:
    for result in done.record["results"]:
        for baseline in result["baselines"]:
            if result["workload"]["method"] == "sampling":
                assert baseline["difference"] is None
            else:
                assert 0 <= baseline["difference"] < 1e-10
                assert result["gflop"] > 0
                assert baseline["share_of_peak"] > 0


@pytest.mark.slow
def test_curves_have_a_point_for_each_size(done: Done) -> None:
    curves = done.record["growth"]
    assert {curve["side"] for curve in curves} >= {
        "metarun, none",
        "metarun, loop, none",
        "functional",
    }
    for curve in curves:
        expected = {"tasks": [1, 3], "steps": [1, 2]}[curve["size"]]
        assert [point["size"] for point in curve["points"]] == expected
    assert "protonet" not in {c["workload"] for c in curves if c["size"] == "steps"}


@pytest.mark.slow
def test_the_figure_is_an_svg_with_the_names_in_it(done: Done) -> None:
    assert ET.fromstring(done.figure).tag == "{http://www.w3.org/2000/svg}svg"
    for word in ("engine=loop", "functional loop", "protonet, by tasks", "times as fast as"):
        assert word in done.figure


@pytest.mark.slow
def test_the_figure_of_a_record_is_that_of_its_run(done: Done, metarun: Command) -> None:
    Path("a.json").write_text(json.dumps(done.record))
    with tiny_catalogue():
        answer = metarun("bench", "--from", "a.json", "--figure", "again.svg")
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    assert Path("again.svg").read_text() == done.figure


@pytest.mark.parametrize("name", ["speed", "growth"])
def test_the_pictures_of_the_readme_are_drawn_from_their_records(
    name: str, metarun: Command
) -> None:
    record = ROOT / f".github/pictures/{name}.json"
    assert metarun("bench", "--from", str(record), "--figure", "a.svg").code == 0
    drawn = Path("a.svg").read_text()
    machine = json.loads(record.read_text())["machine"]
    for word in (machine["processor"], "learn2learn", "Speed of" if name == "speed" else "A step"):
        assert word in drawn
    # Nothing is left empty, and no text is too small for a slide.
    assert ">plain<" not in drawn
    assert min(map(int, re.findall(r"font-size: (\d+)px", drawn))) >= 8


def test_the_record_of_the_readme_has_the_ratios_of_its_table() -> None:
    page = (ROOT / "metarun/bench/README.md").read_text()
    for result in json.loads((ROOT / ".github/pictures/speed.json").read_text())["results"]:
        (baseline,) = result["baselines"]
        low, high = baseline["ratio_quartiles"]
        shown = f"{times(baseline['ratio'])}× ({times(low)}–{times(high)})"
        assert f"| {baseline['name']} | " in page
        assert f"| {shown} |" in page


def test_list_has_a_line_about_every_workload(metarun: Command) -> None:
    answer = metarun("bench", "--list")
    assert answer.code == 0
    for workload in WORKLOADS:
        assert any(line.startswith(f" {workload.name} ") for line in answer.out.splitlines())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--workload", "snusoid"], "--workload snusoid: did you mean sinusoid?"),
        (["--engine", "auto,vmpa"], "--engine vmpa: did you mean vmap?"),
        (["--engine", ","], "--engine has no value: expected auto, vmap, loop, threads"),
        (["--precision", "float64"], "--precision float64: did you mean float32?"),
        (["--against", "learn2laern"], "did you mean learn2learn?"),
        (["--growth", "taks"], "did you mean tasks?"),
        (["--growth", "steps", "--workload", "mann"], "--growth steps does not apply to mann"),
        (["--growth", "processes", "--device", "cuda"], "use --device cpu"),
        (["--seconds", "0"], "--seconds 0.0: expected a positive number"),
        (["--memory-steps", "-1"], "--memory-steps -1: expected 0 or more"),
        (["--device", "cuda:77"], "--device cuda:77: "),
        (["--tf32", "al"], "--tf32 al: did you mean all?"),
        (["--device", "gpu"], "--device gpu: expected cpu"),
        (["--figure", "a.pdf"], "--figure a.pdf: expected a file name ending in .svg or .png"),
        (["--json", "nowhere/a.json"], "there is no folder nowhere"),
        (["--from", "a.json"], "--from a.json: type --figure FILE, which it draws"),
        (["--from", "a.json", "--figure", "a.svg"], "--from a.json: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_suit_is_one_line_and_exit_code_2(
    words: list[str], part: str, metarun: Command, tmp_path: Path
) -> None:
    answer = metarun("bench", *words)
    assert answer.code == 2
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert line.startswith("error: ")
    assert part in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--json", "--figure"])
def test_a_file_that_is_there_is_never_written_over(
    option: str, metarun: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine.svg").write_text("precious")
    answer = metarun("bench", option, "mine.svg")
    assert answer.code == 2
    assert "mine.svg already exists: choose a new file name" in answer.err
    assert (tmp_path / "mine.svg").read_text() == "precious"


def test_markdown_has_a_line_for_each_rival(metarun: Command) -> None:
    with tiny_catalogue():
        answer = metarun(
            "bench",
            "--workload",
            "sinusoid,protonet",
            "--markdown",
            "--memory-steps",
            "0",
            *QUICKLY,
        )
    lines = [line for line in answer.out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith(f"| {BY_NAME['sinusoid'].about} (vmap) |")


def test_ctrl_c_shows_and_writes_what_was_measured_before(
    metarun: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Suite.measure

    def stop(suite: Suite, workload: Any) -> Any:
        if workload.name == "protonet":
            raise KeyboardInterrupt
        return measure(suite, workload)

    monkeypatch.setattr(Suite, "measure", stop)
    with tiny_catalogue():
        answer = metarun(
            "bench", "--workload", "sinusoid", "protonet", "--json", "a.json", *QUICKLY
        )
    assert answer.code == 130
    assert "sinusoid" in answer.out
    assert "interrupted" in answer.err
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["interrupted"] is True
    assert [result["workload"]["name"] for result in record["results"]] == ["sinusoid"]


def test_a_leak_would_be_seen(metarun: Command) -> None:
    with tiny_catalogue():
        answer = metarun(
            "bench", "--workload", "sinusoid", "--memory-steps", "20", "--seconds", "0.001",
            "--against", "functional",
        )  # fmt: skip
    assert "MiB over 20 sinusoid steps" in answer.out


def test_a_file_that_is_no_record_is_refused(metarun: Command) -> None:
    Path("a.json").write_text('{"results": 3}')
    answer = metarun("bench", "--from", "a.json", "--figure", "a.svg")
    assert answer.code == 2
    assert "--from a.json: expected a file that `metarun bench --json` has written" in answer.err
    assert not Path("a.svg").exists()
