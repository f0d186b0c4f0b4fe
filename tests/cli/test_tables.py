"""Runs on a table: trained, tested, used without the table, and `metarun predict` with tables."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import metarun as package
from metarun.cli.main import main
from metarun.config import build
from tests.conftest import Command
from tests.data.example_tables import shops, taste, write

TINY = ["train.steps=2", "train.tasks_per_step=2", "train.eval_every=2", "eval.episodes=4",
        "eval.val_episodes=4", "eval.curve_steps=0", "device=cpu"]  # fmt: skip
SALES = ["data=csv", "data.file=shops.csv", "data.target=sales", "data.task=shop",
         "data.columns=[price,promotion,weekday]", *TINY]  # fmt: skip
LIKES = ["data=csv", "data.file=taste.csv", "data.target=likes", "data.task=user", "way=2",
         "shot=3", "query=3", *TINY]  # fmt: skip


pytestmark = pytest.mark.usefixtures("there")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs on two tables, which are gone, and some rows of them."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tables")
        patch.chdir(folder)
        for name, make, runs in (
            ("shops", shops, {"maml": SALES, "cnp": SALES}),
            ("taste", taste, {"protonet": LIKES}),
        ):
            lines = list(make(np.random.default_rng(0)))
            write(Path(f"{name}.csv"), lines)
            for algo, words in runs.items():
                assert main([f"algo={algo}", *words, f"hydra.run.dir={algo}"]) == 0
            own = [line for line in lines[1:] if line[0] in ("shop3", "shop9", "user3", "user9")]
            few = [n for n, line in enumerate(own) if [o[0] for o in own[:n]].count(line[0]) < 8]
            write(Path(f"{name}_few.csv"), [lines[0], *(own[n] for n in few)])
            rest = [line for n, line in enumerate(own) if n not in few]
            write(Path(f"{name}_rows.csv"), [lines[0], *rest])
            Path(f"{name}.csv").rename(f"{name}_gone.csv")
    return folder


@pytest.fixture
def there(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "_cached_source", build._cached_source.__wrapped__)
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


def read(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_those_of_the_learner_in_the_units_of_the_table(metarun: Command) -> None:
    answer = metarun("predict", "maml", "--support", "shops_few.csv", "--query", "shops_rows.csv",
                     "--csv", "p.csv")  # fmt: skip
    assert answer.code == 0, answer.err
    assert "2 tasks from 16 examples" in answer.out
    made, given, few = read("p.csv"), read("shops_rows.csv"), read("shops_few.csv")
    assert list(made[0]) == ["row", "shop", "sales"]
    assert [line["shop"] for line in made] == [line["shop"] for line in given]
    learner = package.load("maml", device="cpu")

    def columns(lines: list[dict[str, str]]) -> dict[str, list[Any]]:
        price = [float(line["price"] or "nan") for line in lines]
        return {"price": price} | {n: [li[n] for li in lines] for n in ("promotion", "weekday")}

    own = [line for line in few if line["shop"] == "shop9"]
    learner.fit(columns(own), [float(line["sales"]) for line in own])
    wanted = learner.predict(columns([line for line in given if line["shop"] == "shop9"]))
    found = [float(line["sales"]) for line in made if line["shop"] == "shop9"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # In the units of the table, not standardized.
    assert np.mean(found) > 20
    errors = [float(a["sales"]) - float(b["sales"]) for a, b in zip(made, given, strict=True)]
    rmse = np.sqrt(np.mean(np.square(errors)))
    assert f"root mean squared error of sales: {rmse:.3g}"[:-1] in answer.out


def test_a_learner_with_a_spread_writes_it(metarun: Command) -> None:
    words = ["--support", "shops_few.csv", "--query", "shops_rows.csv", "--csv", "p.csv"]
    assert metarun("predict", "cnp", *words).code == 0
    made = read("p.csv")
    assert list(made[0]) == ["row", "shop", "sales", "sales_spread"]
    assert all(float(line["sales_spread"]) > 0 for line in made)


def test_labels_are_written_with_their_probabilities(metarun: Command) -> None:
    words = ["--support", "taste_few.csv", "--query", "taste_rows.csv", "--csv", "p.csv"]
    answer = metarun("predict", "protonet", *words)
    assert answer.code == 0, answer.err
    made, given = read("p.csv"), read("taste_rows.csv")
    assert list(made[0]) == ["row", "user", "likes", "probability", "p(no)", "p(yes)"]
    right = sum(a["likes"] == b["likes"] for a, b in zip(made, given, strict=True))
    assert f"{right} of {len(given)} rows" in answer.out
    assert all(float(line["p(no)"]) + float(line["p(yes)"]) > 0.999 for line in made)


def test_a_table_without_tasks_is_one_task(metarun: Command) -> None:
    for name in ("few", "rows"):
        lines = [line for line in read(f"shops_{name}.csv") if line["shop"] == "shop3"]
        names = ["price", "promotion", "weekday"] + ["sales"] * (name == "few")
        write(Path(f"{name}.csv"), [names, *([line[n] for n in names] for line in lines)])
    answer = metarun("predict", "maml", "--support", "few.csv", "--query", "rows.csv")
    assert answer.code == 0, answer.err
    assert "1 task from 8 examples" in answer.out
    assert "error" not in answer.out
    assert list(read("predictions.csv")[0]) == ["row", "sales"]


def test_a_test_on_another_table_takes_the_encoding_of_the_run(metarun: Command) -> None:
    few = {"shop", *(f"shop{number}" for number in range(50))}
    lines = [line for line in shops(np.random.default_rng(5)) if line[0] in few]
    write(Path("other.csv"), lines)
    answer = metarun("test=maml", "data.file=other.csv", "eval.episodes=4")
    assert answer.code == 0, answer.err
    # On the table itself, the result is that of the run.
    assert metarun("test=maml", "data.file=shops_gone.csv", "eval.episodes=4").code == 0
    folder = next(Path("maml/tests").glob("*shops_gone*"))
    with np.load(folder / "episodes.npz") as again, np.load("maml/episodes.npz") as before:
        np.testing.assert_array_equal(again["mse"], before["mse"])


def test_a_run_resumes_where_the_table_is_now(metarun: Command) -> None:
    answer = metarun("resume=maml", "train.steps=4", "data.file=shops_gone.csv")
    assert answer.code == 0, answer.err
    assert "warning" not in answer.err
    text = Path("shops_gone.csv").read_text().replace("shop1,", "shop1x,")
    Path("other.csv").write_text(text)
    answer = metarun("resume=maml", "train.steps=6", "data.file=other.csv")
    assert answer.code == 2
    assert "type where the same data are now" in answer.err


@pytest.mark.parametrize(
    ("run", "change", "says"),
    [
        (
            "maml",
            {"shops_few.csv": ("price", "cost")},
            "--support shops_few.csv has no such column",
        ),
        ("maml", {"shops_rows.csv": ("price", "prise")}, "no such column: did you mean prise?"),
        ("maml", {"shops_few.csv": ("sales", "sold")}, "the target=sales: --support"),
        ("maml", {"shops_rows.csv": ("shop9,", "shop7,")}, "shop shop7 of row"),
        ("maml", {"shops_rows.csv": ("shop", "\0")}, "is not what its name says"),
        ("maml", {"shops_few.csv": (None, "")}, "--support=shops_few.csv is empty"),
        ("protonet", {}, "the target=likes: --support"),
    ],
)
def test_bad_tables_are_answered_in_one_line(
    run: str, change: Any, says: str, metarun: Command
) -> None:
    for name, (old, new) in change.items():
        text = Path(name).read_text()
        Path(name).write_text(new if old is None else text.replace(old, new))
    before = sorted(Path().rglob("*"))
    answer = metarun("predict", run, "--support", "shops_few.csv", "--query", "shops_rows.csv")
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert says in line
    assert sorted(Path().rglob("*")) == before


def test_a_run_on_images_takes_no_table(metarun: Command) -> None:
    words = ["data=tables", "algo=protonet", *TINY, "hydra.run.dir=run"]
    assert metarun(*words).code == 0
    answer = metarun("predict", "run", "--support", "shops_few.csv", "--query", "shops_rows.csv")
    assert answer.code == 2
    assert "was trained on data=tables: expected a run on data=csv" in answer.err


def test_a_bad_table_makes_no_folder(metarun: Command) -> None:
    for word, says in (
        ("data.target=price", "target price is missing in row"),
        ("data.file=none.csv", "data.file=none.csv does not exist"),
        ("data.task=shpo", "did you mean shop?"),
        ("shot=50", "data.skip_small=true"),
    ):
        words = [w for w in SALES if w.partition("=")[0] != word.partition("=")[0]]
        files = [] if "file" in word else ["data.file=shops_gone.csv"]
        words = [w for w in words if not (files and w.startswith("data.file="))]
        answer = metarun("algo=maml", *words, *files, word, "hydra.run.dir=new")
        assert answer.code == 2
        assert says in answer.err.splitlines()[-1]
        assert not Path("new").exists()


def test_the_columns_of_a_table_are_listed(metarun: Command) -> None:
    answer = metarun("data", "csv", "--from", "shops_few.csv")
    assert answer.code == 0
    assert "promotion: texts, 2 different, 0 missing" in answer.out
    assert "price: numbers, " in answer.out
    assert metarun("data", "csv").code == 2


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["maml", "protonet"])
def test_a_learner_of_one_task_of_a_table_is_exported(
    algo: str, there: Path, metarun: Command
) -> None:
    """Its answers for encoded rows are those of `predict`, in the units of the target."""
    os.chdir(there)
    name, task = ("shops", "shop3") if algo == "maml" else ("taste", "user3")
    for part in ("few", "rows"):
        header, *lines = read_lines(f"{name}_{part}.csv")
        write(Path(f"{part}.csv"), [header, *(line for line in lines if line[0] == task)])
    answer = metarun("export", str(there / algo), "--format", "torch", "--support", "few.csv")
    assert answer.code == 0, answer.err
    assert metarun("predict", algo, "--support", "few.csv", "--query", "rows.csv").code == 0
    learner = package.load(algo)
    header, *lines = read_lines("rows.csv")
    columns = {key: [line[n] for line in lines] for n, key in enumerate(header)}
    rows = learner.encoding.encode({k: table_column(v) for k, v in columns.items()})
    found = torch.export.load("classifier.pt2").module()(torch.from_numpy(rows).float()).numpy()
    expected = read("predictions.csv")
    keys = ["sales"] if algo == "maml" else [k for k in expected[0] if k.startswith("p(")]
    numbers = np.array([[float(line[k]) for k in keys] for line in expected])
    np.testing.assert_allclose(found, numbers, rtol=1e-4, atol=1e-5)
    card = Path("classifier.pt2.md").read_text()
    assert ("`price`: (x - " in card) == (algo == "maml")
    answer = metarun("export", algo, "--format", "onnx", "--support", f"{name}_few.csv")
    assert (answer.code, "has rows of several tasks" in answer.err) == (2, True)


def read_lines(path: str) -> list[list[str]]:
    with Path(path).open() as file:
        return list(csv.reader(file))


def table_column(values: list[str]) -> list[Any]:
    try:
        return [float(value) if value else float("nan") for value in values]
    except ValueError:
        return list(values)
