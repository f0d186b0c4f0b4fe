"""Tables and matrices in files: formats, texts and numbers, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metarun.data.storage.table_files import Texts, as_texts, in_order, read_matrix, read_table

pa = pytest.importorskip("pyarrow")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def cells(column: Any) -> list[Any]:
    return column.values().tolist() if isinstance(column, Texts) else column.tolist()


def test_columns_are_numbers_or_texts_as_csv_reads_them(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [
        [str(number), ["red", "a, b", 'say "so"', "zwölf", ""][number % 5], f"{value:.6g}", "007"]
        for number, value in enumerate(generator.normal(size=50_000))
    ]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["n", "color", "x", "code"], *rows])
    found = read_table(path, "data.file", text=["code"])
    assert list(found) == ["n", "color", "x", "code"]
    assert cells(found["n"]) == list(map(float, range(50_000)))
    assert cells(found["color"]) == [row[1] for row in rows]
    assert cells(found["x"]) == [float(row[2]) for row in rows]
    assert cells(found["code"]) == ["007"] * 50_000


def test_a_column_that_turns_to_text_late_is_text_from_the_start(tmp_path: Path) -> None:
    lines = "".join(f"{number:03d}\n" for number in range(30_000))
    found = read_table(write(tmp_path / "a.csv", f"x\n{lines}end\n"), "data.file")
    assert cells(found["x"])[:2] == ["000", "001"]
    assert cells(found["x"])[-1] == "end"


def test_missing_numbers_are_nan_and_missing_texts_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\ufeffx,y\n1,a\n,\nNA,b\nn/a,NA\nnull,c\nNaN,d\n")
    found = read_table(path, "data.file")
    np.testing.assert_array_equal(found["x"], [1.0] + [np.nan] * 5)
    assert cells(found["y"]) == ["a", "", "b", "NA", "c", "d"]


def test_parquet_has_the_columns_of_the_csv(tmp_path: Path) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    path = write(tmp_path / "a.csv", "x,n,color,day\n1.5,1,red,2024-01-02\n,2,,2024-01-03\n")
    table = pyarrow.csv.read_csv(path)
    table = table.set_column(2, "color", table.column("color").dictionary_encode())
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    by_csv = read_table(path, "data.file", text=["n"])
    by_parquet = read_table(tmp_path / "a.parquet", "data.file", text=["n"])
    assert list(by_csv) == list(by_parquet)
    for name, column in by_csv.items():
        np.testing.assert_array_equal(cells(column), cells(by_parquet[name]))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.csv", None, "does not exist: expected a file .csv or .parquet"),
        ("a.xlsx", "x\n1\n", "a.xlsx: expected a file .csv or .parquet"),
        ("a.csv", "", "is empty: expected a header and rows"),
        ("a.csv", " \n\n", "is empty"),
        ("a.csv", "\ufeff", "is empty"),
        ("a.csv", "x,y\n", "has a header and no rows"),
        ("a.csv", "x,y,x\n1,2,3\n", "has two columns 'x': expected different names"),
        ("a.csv", "x,y\n1,2\n3\n", "row 2 has 1 cells, the header 2"),
        ("a.csv", "x;y\n1;2\n", "has its columns apart by ';': expected commas"),
        ("a.csv", "1,2\n3,4\n", "begins with numbers: expected the names of the columns"),
        ("a.csv", b"x,y\n\xff\xfe,1\n", "is not text in UTF-8"),
        ("a.csv", 'x,y\n"1,2\n', "is damaged: unexpected end of data"),
        ("a.csv", b"PAR1\0\0", "not what its name says, its content is a .parquet file"),
        ("a.csv", b"PK\x03\x04\0", "its content is a zip archive, such as .npz or .xlsx"),
        ("a.csv", b"x\0y\n", "its content is no format that is known here"),
        ("a.parquet", "x,y\n1,2\n", "its content is text, such as a CSV"),
        ("a.parquet", b"PAR1" + bytes(50), "is damaged: "),
    ],
)
def test_a_bad_table_is_answered_in_one_line(
    name: str, content: Any, says: str, tmp_path: Path
) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        read_table(tmp_path / name, "data.file")
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"data.file={tmp_path / name}")
    assert "\n" not in str(caught.value)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    bomb = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "a.npz", features=np.zeros((1, 2)), label=bomb)
    np.save(tmp_path / "a.npy", bomb)
    for name, says in (("a.npz", "array label holds Python objects"), ("a.npy", "Python objects")):
        with pytest.raises(ValueError, match=says):
            read_matrix(tmp_path / name, "data.file", text=["label"])
    assert not (tmp_path / "ran").exists()


def test_a_matrix_is_the_same_from_every_format(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    matrix, labels = np.random.default_rng(0).normal(size=(6, 3)), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "a.npz", features=matrix, label=labels)
    np.save(tmp_path / "a.npy", np.column_stack([matrix, labels]))
    columns = {f"f{k}": matrix[:, k] for k in range(3)} | {"label": labels}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    lines = [",".join(map(repr, map(float, row))) for row in matrix]
    text = "\n".join(f"{line},{label}" for line, label in zip(lines, labels, strict=True))
    write(tmp_path / "a.csv", f"a,b,c,label\n{text}\n")
    for name in ("a.npz", "a.npy", "a.parquet", "a.csv"):
        found = read_matrix(tmp_path / name, "data.file", text=["label", "split"])
        np.testing.assert_array_equal(found["features"], matrix)
        assert cells(as_texts(found["label"])) == ["0", "1", "2", "0", "1", "2"]


def test_names_that_are_numbers_are_in_the_order_of_the_numbers() -> None:
    assert in_order(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert in_order(["10", "9", "x"]) == ["10", "9", "x"]
