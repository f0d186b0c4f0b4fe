"""Tasks from tables: equal to those of scikit-learn's tables, their encoding, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from metarun.core.types import SPLITS, EpisodeSize
from metarun.data.encoding import TableEncoding
from metarun.data.rows import Rows
from metarun.data.storage.table_files import Texts, read_table
from metarun.data.tables import Diabetes, Tables
from tests.data.example_tables import of_sklearn, write
from tests.data.sources import assert_same, make_source, sizes

COLORS = ("red", "green", "", "blue")


def rows(file: Any, way: int = 1, shot: int = 2, query: int = 3, **options: Any) -> Rows:
    named = [str(one) for one in file] if isinstance(file, list) else str(file)
    return make_source(Rows, file=named, **({"sizes": sizes(way, shot, query)} | options))


def sales(path: Path, shops: int = 12, least: int = 6) -> Path:
    """Write shops with unequal numbers of rows; the price has the shop and its row in it."""
    lines: list[tuple[Any, ...]] = [("shop", "day", "price", "color", "kind", "sales")]
    for shop in range(shops):
        for day in reversed(range(least + shop % 4)):
            price = f"{100 * shop + day}" if day != 2 else ""
            color = COLORS[(shop + day) % 4]
            kind = "ab"[day % 2]
            lines.append((f"shop{shop}", f"2024-01-{day + 1:02d}", price, color, kind, shop + day))
    return write(path, lines)


SHOPS: dict[str, Any] = {"target": "sales", "task": "shop", "columns": ["price", "color"]}


def test_diabetes_by_csv_has_the_tasks_of_data_diabetes(tmp_path: Path) -> None:
    bunch = datasets.load_diabetes()
    order = np.random.default_rng(0).permutation(442)
    splits = ["train"] * 265 + ["val"] * 88 + ["test"] * 89
    lines = list(of_sklearn(bunch, "y"))
    chosen = [(*lines[row + 1], split) for row, split in zip(order, splits, strict=True)]
    file = write(tmp_path / "a.csv", [(*lines[0], "split"), *chosen])
    one = {split: EpisodeSize(1, 12, 8) for split in SPLITS}
    ours = rows(file, sizes=one, target="y", features=(2, 10))
    theirs = make_source(Diabetes, sizes=one)
    for split in SPLITS:
        assert_same(ours.batch(split, 3, 30), theirs.batch(split, 3, 30))
    assert ours.spec == theirs.spec


def test_digits_by_csv_have_the_tasks_of_data_tables(tmp_path: Path) -> None:
    lines = list(of_sklearn(datasets.load_digits(), "digit"))
    parts = ["train"] * 5 + ["val"] * 2 + ["test"] * 3
    split = [(*line, parts[line[-1]]) for line in lines[1:]]
    file = write(tmp_path / "a.csv", [(*lines[0], "split"), *split])
    options: dict[str, Any] = {"features": (2, 8), "classes": (2, 6)}
    ours = rows(file, way=2, target="digit", constant="keep", **options)
    named = {"train": ["digits:0-4"], "val": ["digits:5-6"], "test": ["digits:7-9"]}
    theirs = make_source(Tables, sizes=sizes(2, 2, 3), **named, **options)
    for name in SPLITS:
        assert_same(ours.batch(name, 3, 30), theirs.batch(name, 3, 30))
    assert ours.spec == theirs.spec


@pytest.mark.parametrize("test", ["iris", "wine"])
def test_three_files_with_own_columns_have_the_tasks_of_data_tables(
    test: str, tmp_path: Path
) -> None:
    others = ["digits", "wine" if test == "iris" else "iris"]
    files: list[Path] = []
    for name in (*others, test):
        bunch = getattr(datasets, f"load_{name}")()
        bunch.target = bunch.target_names[bunch.target]
        files.append(write(tmp_path / f"{name}.csv", of_sklearn(bunch, "class")))
    options: dict[str, Any] = {"features": (2, 8), "classes": (2, 6)}
    ours = rows(files, way=2, target="class", constant="keep", **options)
    named = {split: [name] for split, name in zip(SPLITS, (*others, test), strict=True)}
    theirs = make_source(Tables, sizes=sizes(2, 2, 3), **named, **options)
    for split in SPLITS:
        assert_same(ours.batch(split, 3, 30), theirs.batch(split, 3, 30))


def by_task(file: Path, **options: Any) -> Rows:
    return rows(file, **(SHOPS | options))


def by_user(file: Path, **options: Any) -> Rows:
    return rows(file, way=2, target="kind", task="shop", columns=["price"], **options)


def by_class(file: Path, **options: Any) -> Rows:
    return rows(file, way=2, target="shop", columns=["price"], **options)


def by_row(file: Path, **options: Any) -> Rows:
    return rows(file, target="sales", columns=["price", "color"], **options)


@pytest.mark.parametrize("make", [by_task, by_user, by_class, by_row])
def test_a_batch_is_its_tasks_drawn_one_by_one(make: Callable[..., Rows], tmp_path: Path) -> None:
    source = make(sales(tmp_path / "a.csv", least=10))
    for split in SPLITS:
        whole = source.batch(split, 3, 7)
        for place in range(7):
            assert_same(source.batch(split, 3 + place, 1), whole[place : place + 1])
    again = make(tmp_path / "a.csv", tasks=3)
    assert_same(again.batch("train", 3, 3), again.batch("train", 0, 3))


def prices(source: Rows, x: torch.Tensor) -> np.ndarray:
    """Return the price of each row, in the units of the table."""
    column = source._encoding.inputs[0]
    return np.rint(x[..., 0].numpy().astype(float) * column.std + column.mean).astype(int)  # type: ignore[union-attr]


def test_a_task_has_different_rows_of_one_shop_with_their_values(tmp_path: Path) -> None:
    # No price is missing.
    text = sales(tmp_path / "a.csv").read_text().replace(",,", ",7,").replace("-03,7,", "-03,9,")
    lines = [line.split(",") for line in text.splitlines()]
    for line in lines[1:]:
        line[2] = str(100 * int(line[0][4:]) + int(line[1][-2:]))
    source = by_task(write(tmp_path / "b.csv", lines))
    target = source._encoding.targets[0]
    seen: dict[str, set[int]] = {}
    for split in SPLITS:
        batch = source.batch(split, 0, 40)
        found = np.concatenate([prices(source, batch.support_x), prices(source, batch.query_x)], 1)
        shop, day = found // 100, found % 100
        assert (shop == shop[:, :1]).all()
        assert all(len(set(own)) == 5 for own in day.tolist())
        y = (
            torch.cat([batch.support_y, batch.query_y], 1)[..., 0].numpy() * target.std
            + target.mean
        )
        np.testing.assert_allclose(y, shop + day - 1, atol=1e-4)
        seen[split] = set(shop[:, 0].tolist())
        # In val and test, tasks come in turn.
        if split != "train":
            assert len(set(shop[: len(seen[split]), 0].tolist())) == len(seen[split])
    assert set.union(*seen.values()) == set(range(12))
    assert sum(map(len, seen.values())) == 12


def test_with_an_order_the_support_comes_first(tmp_path: Path) -> None:
    source = by_task(
        sales(tmp_path / "a.csv"), order="day", columns=["sales2"] if False else ["price"]
    )
    batch = source.batch("test", 0, 30)
    days = torch.cat([batch.support_y, batch.query_y], 1)[..., 0]
    # Sales grow with the day.
    assert (days.diff(dim=1) > 0).all()


def test_labels_of_a_task_mean_the_same_in_all_tasks(tmp_path: Path) -> None:
    source = by_user(sales(tmp_path / "a.csv", least=10), shot=2, query=2)
    batch = source.batch("train", 0, 20)
    assert torch.equal(batch.class_ids, torch.tensor([[0, 1]]).expand(20, -1))  # type: ignore[arg-type]
    assert source.class_names("test") == ("a", "b")


def test_the_encoding_is_that_of_scikit_learn_on_the_training_rows(tmp_path: Path) -> None:
    file = sales(tmp_path / "a.csv", shops=30)
    source = by_task(file, max_categories=3)
    table = read_table(file, "data.file", text=["shop"])
    training = source._splits_of_rows == 0
    assert 0 < training.sum() < len(training)
    color = table["color"]
    assert isinstance(color, Texts)
    both = np.empty((len(color), 2), dtype=object)
    both[:, 0], both[:, 1] = table["price"], color.values()
    theirs = make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), [0]),
        (OneHotEncoder(max_categories=3, handle_unknown="infrequent_if_exist"), [1]),
        sparse_threshold=0,
    ).fit(both[training])
    np.testing.assert_allclose(source._x, theirs.transform(both).astype(float), atol=1e-12)
    new = np.array([[np.nan, "pink"], [5.0, ""]], dtype=object)
    ours = source._encoding.encode({"price": [None, 5.0], "color": ["pink", None]})
    np.testing.assert_allclose(ours, theirs.transform(new).astype(float), atol=1e-12)
    again = TableEncoding.from_text(source.resolved_options["encoding"])
    assert again == source._encoding
    targets = np.asarray(table["sales"])[training]
    moments = (source._encoding.targets[0].mean, source._encoding.targets[0].std)
    np.testing.assert_allclose(moments, (targets.mean(), targets.std()))


def test_an_encoding_that_is_given_is_not_fitted_again(tmp_path: Path) -> None:
    first = by_task(sales(tmp_path / "a.csv"))
    second = by_task(
        sales(tmp_path / "b.csv", shops=30), encoding=first.resolved_options["encoding"]
    )
    assert second._encoding == first._encoding
    assert second.fingerprint() != first.fingerprint()


def test_several_targets_are_the_outputs(tmp_path: Path) -> None:
    lines = sales(tmp_path / "a.csv").read_text().splitlines()
    more = [
        f"{line},{'twice' if not n else 2 * int(line.split(',')[-1])}"
        for n, line in enumerate(lines)
    ]
    (tmp_path / "b.csv").write_text("\n".join(more) + "\n")
    source = by_task(tmp_path / "b.csv", target=["sales", "twice"])
    batch = source.batch("train", 0, 9)
    assert source.spec.output_dim == 2
    torch.testing.assert_close(batch.support_y[..., 0], batch.support_y[..., 1])


def test_small_tasks_are_named_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = sales(tmp_path / "a.csv")
    with pytest.raises(
        ValueError, match=r"shop shop\d+ has 6 rows, 7 are needed in train .* \(9 of 12 remain\)"
    ):
        by_task(file, shot=4)
    source = by_task(file, shot=4, skip_small=True)
    counts = torch.cat([source._groups[split].counts for split in SPLITS])
    assert sorted(counts.tolist()) == [7] * 3 + [8] * 3 + [9] * 3
    assert "9 of 12 remain" in caplog.text


def test_a_split_column_is_taken(tmp_path: Path) -> None:
    lines = [line.split(",") for line in sales(tmp_path / "a.csv").read_text().splitlines()]
    word = {0: "train", 1: "validation", 2: "test"}
    lines = [[*line, word[int(line[0][4:]) % 3] if n else "fold"] for n, line in enumerate(lines)]
    source = by_task(write(tmp_path / "b.csv", lines), split="fold", order="day")
    assert {int(name[4:]) % 3 for name in source._groups["val"].tasks} == {1}
    parts = [[lines[0], *(line for line in lines if line[-1] == name)] for name in word.values()]
    files = [write(tmp_path / f"{n}.csv", part) for n, part in enumerate(parts)]
    apart = by_task(files, order="day", columns=["price", "color"])  # type: ignore[arg-type]
    for split in SPLITS:
        assert_same(apart.batch(split, 0, 5), source.batch(split, 0, 5))


def changed(old: str, new: str, count: int = -1) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, count)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (None, {"target": None}, "data.target=COLUMN is missing"),
        (None, {"target": "salse"}, "{file} has no such column: did you mean sales?"),
        (None, {"task": "store"}, "{file} has no such column: it has shop, day"),
        (None, {"columns": ["prise"]}, "{file} has no such column: did you mean price?"),
        (None, {"columns": ["sales"]}, "data.columns: sales is the target or the task"),
        (None, {"columns": []}, "has no column of inputs"),
        (None, {"target": "color"}, "the text 'green' in row 1: expected numbers, or type way=N"),
        (changed(",0\n", ",\n", 1), {}, "target sales is missing in row 6"),
        (changed(",0\n", ",NaN\n", 1), {}, "target sales is missing in row 6"),
        (changed(",0\n", ",inf\n", 1), {}, "target sales is infinite in row 6"),
        (changed(",0\n", ",free\n", 1), {}, "column sales has the text 'free' in row 6"),
        (changed(",105,", ",cheap,", 1), {}, "price has numbers and the text 'cheap' in row 8"),
        (changed(",105,", ",inf,", 1), {}, "column price is infinite in row 8"),
        (changed("shop0,", ",", 1), {}, "shop is missing in row 1"),
        (changed("color", "price", 1), {}, "has two columns 'price'"),
        (lambda text: text.splitlines()[0] + "\n", {}, "has a header and no rows"),
        (lambda _: "", {}, "is empty"),
        (None, {"max_categories": 1}, "data.max_categories=1: expected 2 or more"),
        (changed(",b,", ",a,"), {"columns": ["kind"]}, "kind: one value in all training rows"),
        (None, {"target": ["sales", "price"], "sizes": sizes(2)}, "one column of labels"),
        (None, {"sizes": sizes(3, 1, 1), "target": "kind"}, "way=3 is more than the 2 classes"),
        (None, {"sizes": sizes(1, train=EpisodeSize(2, 1, 1))}, "train.way=2 and way=1: both"),
        (None, {"classes": (2, 3)}, "data.classes needs data.features"),
        (None, {"order": "dya"}, "no such column: did you mean day?"),
        (None, {"split": "kind"}, "kind is 'b' in row 1: expected train, val or test"),
        (None, {"encoding": "{}"}, "data.encoding is damaged"),
    ],
)  # fmt: skip
def test_a_bad_table_is_answered_in_one_line(
    change: Any, options: Any, says: str, tmp_path: Path
) -> None:
    file = sales(tmp_path / "a.csv")
    if change is not None:
        text = change(file.read_text())
        assert text != file.read_text()
        file.write_text(text)
    with pytest.raises(ValueError) as caught:
        by_task(file, **options)
    assert says.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_or_a_class_in_two_splits_is_refused(tmp_path: Path) -> None:
    lines = [line.split(",") for line in sales(tmp_path / "a.csv").read_text().splitlines()]
    word = ("train", "val", "test")
    lines = [[*line, word[n % 3] if n else "split"] for n, line in enumerate(lines)]
    file = write(tmp_path / "b.csv", lines)
    says = "shop0 is in train and in val, but splits must not share"
    with pytest.raises(ValueError, match=f"shop {says} shops: correct its split"):
        by_task(file)
    with pytest.raises(ValueError, match=f"class {says} classes: correct its split"):
        by_class(file)


def test_constant_columns_are_left_out_or_kept(tmp_path: Path) -> None:
    text = sales(tmp_path / "a.csv").read_text().replace(",b,", ",a,")
    (tmp_path / "b.csv").write_text(text)
    both = ["price", "kind"]
    assert by_task(tmp_path / "b.csv", columns=both, constant="drop").spec.input_shape == (1,)
    assert by_task(tmp_path / "b.csv", columns=both, constant="keep").spec.input_shape == (2,)


@pytest.mark.slow
def test_a_million_rows_in_ten_thousand_tasks_are_drawn_without_python_per_task(
    tmp_path: Path,
) -> None:
    import time

    draw = np.random.default_rng(0)
    shop, x = draw.integers(0, 10_000, 1_000_000), draw.normal(size=(1_000_000, 3))
    with (tmp_path / "a.csv").open("w") as file:
        file.write("shop,a,b,y\n")
        file.writelines(
            f"s{s},{a:.4f},{b:.4f},{y:.4f}\n" for s, (a, b, y) in zip(shop, x, strict=True)
        )
    began = time.process_time()
    source = rows(tmp_path / "a.csv", target="y", task="shop", shot=5, query=10)
    assert time.process_time() - began < 60.0
    assert sum(len(source._groups[split].tasks) for split in SPLITS) == 10_000
    began = time.process_time()
    assert source.batch("train", 0, 10_000).num_tasks == 10_000
    assert time.process_time() - began < 2.0
