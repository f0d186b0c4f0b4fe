"""Tests of `metarun predict`: labels for a folder of images from a few examples."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import metarun
from metarun.cli import predict
from metarun.config import build
from metarun.core.files import write_new
from metarun.runs.folder import RunFolder
from tests.conftest import Command
from tests.inference.test_learner import trained

WORDS = ("ka", "kha", "ga")


@pytest.fixture(scope="module")
def protonet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["algo=protonet", "data=omniglot_small", "train.way=5", "train.steps=20"]
    return trained(tmp_path_factory.mktemp("runs") / "protonet", words)


@pytest.fixture(scope="module")
def maml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["algo=maml", "data=omniglot_small", "way=3", "train.steps=2"]
    return trained(tmp_path_factory.mktemp("runs") / "maml", words)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files of three new characters: three drawings each in `few`, 17 in `many`."""
    root = tmp_path_factory.mktemp("drawings")
    archive = Path(metarun.__file__).parent / "data" / "files" / "images_background_small2.zip"
    with zipfile.ZipFile(archive) as file:
        names = sorted(n for n in file.namelist() if "Sanskrit" in n and n.endswith(".png"))
        for number, word in enumerate(WORDS):
            for place, name in enumerate(names[20 * number : 20 * (number + 1)], start=1):
                path = root / ("few" if place <= 3 else "many") / word / f"{place:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read(name))
    return root


@pytest.fixture
def few(drawings: Path, tmp_path: Path) -> Path:
    """Support images that a test may modify."""
    return shutil.copytree(drawings / "few", tmp_path / "few")


@pytest.fixture
def many(drawings: Path, tmp_path: Path) -> Path:
    """Query images that a test may modify."""
    return shutil.copytree(drawings / "many", tmp_path / "many")


def words(run: Path, support: Path, query: Path, *more: str) -> list[str]:
    paths = ["predict", str(run), "--support", str(support), "--query", str(query)]
    return [*paths, "--device", "cpu", *more]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(path: Path) -> np.ndarray:
    """The probabilities of every class, (N, W)."""
    columns = [f"p({word})" for word in sorted(WORDS)]
    return np.array([[float(row[column]) for column in columns] for row in rows(path)])


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "metarun", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        timeout=120,
    )


def test_every_image_gets_a_class_a_line_and_a_row(
    protonet: Path, drawings: Path, tmp_path: Path
) -> None:
    done = process(*words(protonet, drawings / "few", drawings / "many"), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(tmp_path / "predictions.csv")
    assert [row["file"] for row in found] == [
        f"{word}/{place:02d}.png" for word in sorted(WORDS) for place in range(4, 21)
    ]
    for row in found:
        answers = {word: float(row[f"p({word})"]) for word in WORDS}
        assert row["class"] == max(answers, key=answers.__getitem__)
        assert float(row["probability"]) == max(answers.values())
        assert sum(answers.values()) == pytest.approx(1.0, abs=1e-5)
        assert re.search(rf"^{row['file']} +{row['class']} +[\d.]+ %", done.stdout, re.MULTILINE)
    right = sum(row["class"] == row["file"].partition("/")[0] for row in found)
    assert right > 34, "chance is 17"
    assert f"accuracy {100 * right / 51:.1f} %: {right} of 51 " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.csv", "predictions.html"}


def test_it_answers_as_the_learner_in_python_does(
    protonet: Path, drawings: Path, metarun: Command, tmp_path: Path
) -> None:
    assert metarun(*words(protonet, drawings / "few", drawings / "many")).code == 0
    files = sorted((drawings / "few").rglob("*.png"))
    learner = load(protonet).fit(files, [file.parent.name for file in files])
    expected = learner.predict_proba(sorted((drawings / "many").rglob("*.png")))
    np.testing.assert_allclose(numbers(tmp_path / "predictions.csv"), expected, rtol=1e-5)


def load(run: Path) -> metarun.predict.Learner:  # type: ignore[name-defined]
    return metarun.load(run, device="cpu")


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_an_answer_does_not_depend_on_the_other_queries(
    name: str, drawings: Path, metarun: Command, request: pytest.FixtureRequest
) -> None:
    run, support = request.getfixturevalue(name), drawings / "few"
    assert metarun(*words(run, support, drawings / "many", "--csv", "all.csv")).code == 0
    alone = drawings / "many/ga/04.png"
    assert metarun(*words(run, support, alone, "--csv", "one.csv")).code == 0
    together = rows(Path("all.csv")).index(
        next(row for row in rows(Path("all.csv")) if row["file"] == "ga/04.png")
    )
    np.testing.assert_allclose(
        numbers(Path("one.csv"))[0], numbers(Path("all.csv"))[together], atol=2e-6
    )


def test_it_does_with_transductive_batch_norm(maml: Path, drawings: Path, metarun: Command) -> None:
    support = drawings / "few"
    for query, name in ((drawings / "many", "all.csv"), (drawings / "many/ga/04.png", "one.csv")):
        answer = metarun(*words(maml, support, query, "--csv", name, "--transductive"))
        assert (answer.code, answer.err) == (0, "")
        assert "batch norm: transductive" in answer.out
    assert np.abs(numbers(Path("one.csv"))[0] - numbers(Path("all.csv"))[0]).max() > 1e-4


def test_transductive_batch_norm_is_over_all_queries_however_many(
    maml: Path, drawings: Path, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (250, 7):
        monkeypatch.setattr(predict, "_AT_ONCE", size)
        for words_, name in (([], "plain"), (["--transductive"], "together")):
            place = ["--csv", f"{name}{size}.csv", *words_]
            assert metarun(*words(maml, drawings / "few", drawings / "many", *place)).code == 0
    for name in ("plain", "together"):
        one, other = numbers(Path(f"{name}250.csv")), numbers(Path(f"{name}7.csv"))
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_few_images_are_in_memory_at_once(
    protonet: Path, drawings: Path, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metarun.inference.learner import Learner

    sizes: list[int] = []
    whole = Learner.predict_proba

    def counted(self: Learner, inputs: list[Path]) -> np.ndarray:
        sizes.append(len(inputs))
        return whole(self, inputs)

    monkeypatch.setattr(Learner, "predict_proba", counted)
    monkeypatch.setattr(predict, "_AT_ONCE", 20)
    assert metarun(*words(protonet, drawings / "few", drawings / "many")).code == 0
    assert sizes == [20, 20, 11]


# Content of the folders.


def test_names_are_shown_on_one_line_and_kept_in_the_csv(
    protonet: Path, few: Path, drawings: Path, metarun: Command, tmp_path: Path
) -> None:
    names = ["a b.png", "[red]x.png", "new\nline.png", "ret\rurn.png", "日本語.png", 'q",.png']
    query = tmp_path / "q"
    query.mkdir()
    for name in [*names, f"{'long' * 40}.png"]:
        shutil.copy(drawings / "many/ka/05.png", query / name)
    (few / "ka").rename(few / "[bold]class\nof 日本語")
    answer = metarun(*words(protonet, few, query))
    assert (answer.code, answer.err) == (0, "")
    for shown in (
        "a b.png",
        "[red]x.png",
        r"new\nline.png",
        "日本語.png",
        "longlong.png",
        "…",
        "[bold]cla",
    ):
        assert shown in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80
    assert set(names) < {row["file"] for row in rows(Path("predictions.csv"))}
    assert len(answer.out.splitlines()) == 7 + len(("title", "head", "end", "page"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name has to be UTF-8")
def test_a_name_that_is_no_text_is_answered_too(
    protonet: Path, drawings: Path, metarun: Command, tmp_path: Path
) -> None:
    query = tmp_path / "q"
    query.mkdir()
    shutil.copy(drawings / "many/ka/05.png", os.fsencode(query) + b"/caf\xe9.png")
    assert metarun(*words(protonet, drawings / "few", query)).code == 0
    assert [row["file"] for row in rows(Path("predictions.csv"))] == [r"caf\udce9.png"]


def test_pictures_of_every_mode_are_answered_alike(
    protonet: Path, drawings: Path, metarun: Command, tmp_path: Path
) -> None:
    query = tmp_path / "q"
    query.mkdir()
    drawn = Image.open(drawings / "many/ka/05.png")
    ink = drawn.convert("L")
    ink.save(query / "gray.PNG")
    drawn.convert("RGB").save(query / "color.tif")
    clear = Image.new("RGBA", drawn.size, (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), mask=ink.point(lambda value: 255 - value))
    clear.save(query / "clear.png")
    Image.fromarray(np.asarray(ink).astype(np.uint16) * 257).save(query / "deep.png")
    drawn.save(query / "plain.bmp")
    assert metarun(*words(protonet, drawings / "few", query)).code == 0
    answers = numbers(Path("predictions.csv"))
    np.testing.assert_array_equal(answers, np.broadcast_to(answers[0], (5, 3)))


def test_folders_below_and_links_are_followed_once(
    protonet: Path, drawings: Path, metarun: Command, tmp_path: Path
) -> None:
    query = tmp_path / "q"
    (query / "deep/er").mkdir(parents=True)
    shutil.copy(drawings / "many/ka/05.png", query / "deep/er")
    (query / "deep/loop").symlink_to(query)
    (query / "linked").symlink_to(drawings / "many/ga")
    assert metarun(*words(protonet, drawings / "few", query)).code == 0
    found = [row["file"] for row in rows(Path("predictions.csv"))]
    assert found == ["deep/er/05.png", *(f"linked/{place:02d}.png" for place in range(4, 21))]


def test_what_may_have_been_meant_is_named_and_what_nobody_put_there_is_not(
    protonet: Path, few: Path, many: Path, metarun: Command
) -> None:
    for name in (".DS_Store", "Thumbs.db", ".hidden.png", "IMG_1.HEIC", "notes.txt"):
        (many / name).touch()
    (few / ".git").mkdir()
    (few / "ka/below").mkdir()
    answer = metarun(*words(protonet, few, many))
    assert answer.code == 0
    assert answer.err == (
        "note: ignored, neither images nor class folders: below, IMG_1.HEIC, notes.txt\n"
    )
    assert len(rows(Path("predictions.csv"))) == 51


def test_an_image_that_is_an_example_does_not_count_as_right(
    protonet: Path, drawings: Path, metarun: Command
) -> None:
    answer = metarun(*words(protonet, drawings / "few", drawings / "few"))
    assert "accuracy: not available, since every query is also a support image" in answer.out
    answer = metarun(*words(protonet, drawings / "few", drawings))
    said = " ".join(answer.out.split())
    assert "of 51 labels equal the folder name, 9 support images not counted" in said


def test_there_is_no_accuracy_where_a_folder_is_no_class(
    protonet: Path, drawings: Path, many: Path, metarun: Command
) -> None:
    (many / "ka").rename(many / "what")
    for query in (many, drawings / "many/ka"):
        answer = metarun(*words(protonet, drawings / "few", query))
        assert answer.code == 0
        assert "accuracy" not in answer.out


# The CSV file.


def test_nothing_that_is_there_is_written_over(
    protonet: Path, drawings: Path, metarun: Command, tmp_path: Path
) -> None:
    command = words(protonet, drawings / "few", drawings / "many/ka")
    (tmp_path / "predictions.csv").write_text("precious")
    (tmp_path / "predictions-2.csv").symlink_to("nowhere")
    answer = metarun(*command)
    assert answer.code == 0
    assert "all 17 predictions with all probabilities: predictions-3.csv" in answer.out
    assert (tmp_path / "predictions.csv").read_text() == "precious"
    assert (tmp_path / "predictions-2.csv").is_symlink()
    refused = metarun(*command, "--csv", "predictions.csv")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "error: --csv predictions.csv already exists: choose a new file name\n"
    names = ["predictions-2.csv", "predictions-3.csv", "predictions-3.html", "predictions.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_file_that_came_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert write_new(path, b"one") == path
    with pytest.raises(FileExistsError):
        write_new(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_leaves_nothing(
    protonet: Path, drawings: Path, metarun: Command, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    answer = metarun(*words(protonet, drawings / "few", drawings / "many"))
    assert (answer.code, answer.out) == (2, "")
    wanted = "error: no space is left for predictions.csv: free some and repeat the command\n"
    assert answer.err == wanted
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_finds_no_space_takes_its_list_with_it(
    protonet: Path, drawings: Path, metarun: Command, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fsync, written = os.fsync, []

    def full(number: int) -> None:
        written.append(number)
        # The list and its folder are synced before.
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    command = words(protonet, drawings / "few", drawings / "many")
    answer = metarun(*command, "--csv", "mine.csv")
    assert answer.code == 2
    assert answer.err.startswith("error: no space is left for mine.html: free some")
    assert list(tmp_path.iterdir()) == []
    assert metarun(*command, "--csv", "mine.csv").code == 0


def test_a_long_list_is_cut_on_a_terminal_alone(
    protonet: Path, drawings: Path, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = words(protonet, drawings / "few", drawings / "many")
    assert len(re.findall(r"^\w+/\d+\.png", metarun(*command).out, re.MULTILINE)) == 51
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = metarun(*command).out
    assert len(re.findall(r"\w+/\d+\.png", out)) == 30
    assert "… and 21 more\n" in out
    assert "all 51 predictions with all probabilities: predictions-2.csv" in out


# Invalid requests.


def alone(few: Path) -> None:
    for word in ("kha", "ga"):
        shutil.rmtree(few / word)


def empty(few: Path) -> None:
    for file in (few / "ga").iterdir():
        file.unlink()
    (few / "ga/Thumbs.db").touch()
    (few / "ga/1.heic").touch()


def flat(few: Path) -> None:
    shutil.copy(few / "ga/01.png", few / "lost.png")


def broken(few: Path) -> None:
    (few / "ga/02.png").write_bytes((few / "ga/02.png").read_bytes()[:90])


def nowhere(few: Path) -> None:
    (few / "ga/09.png").symlink_to("nothing")


def gone(few: Path) -> None:
    shutil.rmtree(few)


def bare(few: Path) -> None:
    gone(few)
    few.mkdir()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (alone, "has one class folder, ka: expected two or more"),
        (empty, "few/ga has no images (found only 1.heic): add a few images or remove the folder"),
        (flat, "lost.png is directly in --support: expected one folder per class, as in"),
        (broken, "ga/02.png cannot be read as an image"),
        (nowhere, "there is no image"),
        (gone, "few does not exist: expected a folder"),
        (bare, "few has no class folders: expected two or more, each named after its class"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_examples_that_are_unfit_are_named(
    spoil: Callable[[Path], None], says: str, protonet: Path, few: Path, drawings: Path,
    metarun: Command, tmp_path: Path,
) -> None:  # fmt: skip
    spoil(few)
    check_refused(metarun(*words(protonet, few, drawings / "many")), says, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (gone, "few does not exist: expected a folder"),
        (bare, "few has no images: expected files such as *.png and *.jpg"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_queries_that_are_unfit_are_named(
    spoil: Callable[[Path], None], says: str, protonet: Path, few: Path, drawings: Path,
    metarun: Command, tmp_path: Path,
) -> None:  # fmt: skip
    spoil(few)
    check_refused(metarun(*words(protonet, drawings / "few", few)), says, tmp_path)


@pytest.mark.parametrize("bn", [[], ["--transductive"]], ids=["alone", "together"])
def test_a_query_that_cannot_be_read_is_listed_and_the_others_are_answered(
    bn: list[str], maml: Path, few: Path, drawings: Path, metarun: Command
) -> None:
    broken(few)
    nowhere(few)
    answer = metarun(*words(maml, drawings / "few", few, *bn))
    assert answer.code == 0
    assert "note: 2 of 10 queries cannot be read, and have no row: 02.png, 09.png" in answer.err
    found = [row["file"] for row in rows(Path("predictions.csv"))]
    assert len(found) == 8
    assert not {"ga/02.png", "ga/09.png"} & set(found)
    assert " of 8 labels equal the folder name" in answer.out
    for file in few.rglob("*.png"):
        if not file.is_symlink():
            file.write_bytes(b"no image")
    answer = metarun(*words(maml, drawings / "few", few, "--csv", "none.csv", *bn))
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "cannot be read as an image" in answer.err
    assert not Path("none.csv").exists()


# The page.


def test_a_page_shows_each_query_with_its_nearest_example(
    protonet: Path, few: Path, drawings: Path, metarun: Command, tmp_path: Path
) -> None:
    query = tmp_path / "q"
    query.mkdir()
    shutil.copy(few / "kha/02.png", query / "<b>.png")
    shutil.copy(drawings / "many/ka/05.png", query / "other.png")
    answer = metarun(*words(protonet, few, query))
    assert answer.code == 0, answer.err
    assert "with images and their nearest examples: predictions.html" in answer.out
    page = Path("predictions.html").read_text()
    lines = re.findall(r"<tr><td>.*</tr>", page)
    assert len(lines) == 2
    assert "&lt;b&gt;.png" in lines[0]
    assert "<b>" not in page
    # The query is the example itself.
    pictures = re.findall(r'src="(data:image/jpeg;base64,[^"]+)"', lines[0])
    assert len(pictures) == 2
    assert pictures[0] == pictures[1]
    assert "kha/02.png" in lines[0]
    row = rows(Path("predictions.csv"))[1]
    assert f"<td>{row['class']}</td>" in lines[1]
    assert f"{100 * float(row['probability']):.1f} %" in lines[1]
    assert "distance of features" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page


def test_the_page_of_a_learner_without_features_compares_pixels(
    maml: Path, drawings: Path, metarun: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "_ON_THE_PAGE", 4)
    assert metarun(*words(maml, drawings / "few", drawings / "many")).code == 0
    page = Path("predictions.html").read_text()
    assert "distance of pixels" in page
    assert "The first 4 of 51 queries" in page
    assert page.count("<tr><td>") == 4


def test_no_page_is_overwritten(
    protonet: Path, drawings: Path, metarun: Command, tmp_path: Path
) -> None:
    Path("predictions.html").write_text("mine")
    command = words(protonet, drawings / "few", drawings / "many/ga/04.png")
    assert metarun(*command).code == 0
    assert Path("predictions.html").read_text() == "mine"
    made = {"predictions-2.csv", "predictions-2.html"}
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.html"} | made
    for name, says in (
        ("predictions.csv", "its page predictions.html already exists: choose a new file name"),
        ("new.html", "--csv new.html: its page has the same name: choose one such as"),
    ):
        answer = metarun(*command, "--csv", name)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert says in answer.err


# Images that do not suit the run.


def test_photographs_for_a_run_of_gray_characters_are_noted(
    protonet: Path, metarun: Command, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        pixels = draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / "1.png")
    answer = metarun(*words(protonet, Path("photos"), Path("photos")))
    assert answer.code == 0
    assert answer.err == (
        "note: the run was trained on gray images of 28 x 28 pixels, and these are in color "
        "(1.png): expect little, and train on images like them (data=folder)\n"
    )


def test_images_that_are_enlarged_are_noted(
    protonet: Path, metarun: Command, tmp_path: Path
) -> None:
    for name, shade in (("a", 0), ("b", 255)):
        (tmp_path / "tiny" / name).mkdir(parents=True)
        Image.new("L", (9, 12), shade).save(tmp_path / "tiny" / name / "1.png")
    answer = metarun(*words(protonet, Path("tiny"), Path("tiny")))
    assert answer.code == 0
    assert answer.err == (
        "note: the run was trained on images of 28 x 28 pixels, and these have about 9: they are "
        "enlarged\n"
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--csv", "no/where.csv"], "--csv no/where.csv: there is no folder no"),
        (["--csv", "."], "--csv . is a folder: choose a new file name"),
        (["--device", "tpu"], "device=tpu: expected auto, cpu, cuda"),
        (["--sure"], "unrecognized arguments: --sure: expected `metarun predict RUN --support"),
        (["x" * 9] * 99, " …: expected `metarun predict RUN --support DIR --query DIR "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_are_unfit_are_named(
    more: list[str], says: str, protonet: Path, drawings: Path, metarun: Command, tmp_path: Path
) -> None:
    command = words(protonet, drawings / "few", drawings / "many", *more)
    check_refused(metarun(*command), says, tmp_path)


def check_refused(answer: object, says: str, folder: Path) -> None:
    code, out, err = answer  # type: ignore[misc]
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 400
    assert says in err
    assert {path.name for path in folder.iterdir()} <= {"few", "new"}


def test_its_help_fits_80_columns(metarun: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = metarun("predict", "--help")
    assert (answer.code, answer.err) == (0, "")
    assert max(map(len, answer.out.splitlines())) <= 80


def test_options_that_are_missing_are_named(metarun: Command, tmp_path: Path) -> None:
    says = "required: --support, --query: expected `metarun predict RUN --support DIR --query DIR "
    check_refused(metarun("predict", "a"), says, tmp_path)


def test_a_run_that_is_unfit_is_named(
    maml: Path, drawings: Path, metarun: Command, tmp_path: Path, few: Path
) -> None:
    query = drawings / "many"
    check_refused(metarun(*words(tmp_path / "no", few, query)), "there is no such folder", tmp_path)
    check_refused(metarun(*words(few, few, query)), "is not a run folder", tmp_path)
    RunFolder.create(tmp_path / "new", RunFolder.open(maml).config_text())
    command = words(tmp_path / "new", few, query)
    check_refused(metarun(*command), "new has no checkpoint yet: continue it with", tmp_path)
    shutil.copytree(few / "ka", few / "fourth")
    says = (
        "fit got 4 classes, but this MAML was trained on 3 ways: give 3 classes, train with way=4"
    )
    check_refused(metarun(*words(maml, few, query)), says, tmp_path)


@pytest.mark.parametrize(
    "words_",
    [
        ["algo=maml", "data=sinusoid", "train.steps=1"],
        ["algo=protonet", "data=tables", "train.steps=1"],
        ["algo=online", "data=stream_linear", "data.tasks=2"],
    ],
    ids=" ".join,
)
def test_a_run_that_labels_no_images_is_named(
    words_: list[str], few: Path, drawings: Path, metarun: Command, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    if "data=tables" in words_:
        pytest.importorskip("sklearn")
    run = trained(tmp_path_factory.mktemp("runs") / "run", words_)
    says = f"was trained on {words_[1]} and cannot label images: expected a run such as that of"
    check_refused(metarun(*words(run, few, drawings / "many")), says, tmp_path)


def test_a_warning_does_not_come_between_a_mistake_and_its_line(
    few: Path, drawings: Path, metarun: Command, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    # Meta-val has 17 classes, which causes a warning whenever the data set is built again.
    setting = ["algo=maml", "data=omniglot_small", "way=20", "train.steps=1"]
    run = trained(tmp_path_factory.mktemp("runs") / "run", [*setting, "eval.curve_steps=0"])
    build._cached_source.cache_clear()
    says = "fit got 3 classes, but this MAML was trained on 20 ways"
    check_refused(metarun(*words(run, few, drawings / "many")), says, tmp_path)


def test_a_run_along_a_stream_of_images_labels_them(
    drawings: Path, metarun: Command, tmp_path_factory: pytest.TempPathFactory
) -> None:
    setting = ["algo=online", "data=stream_omniglot_small", "way=3", "shot=2", "query=1"]
    run = trained(tmp_path_factory.mktemp("runs") / "run", setting)
    assert metarun(*words(run, drawings / "few", drawings / "many")).code == 0
    np.testing.assert_allclose(numbers(Path("predictions.csv")).sum(1), 1.0, atol=1e-5)


# Notes and interrupts.


def test_a_run_that_goes_on_answers_with_what_it_has(
    protonet: Path, drawings: Path, metarun: Command, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = shutil.copytree(protonet, tmp_path_factory.mktemp("runs") / "running")
    run = RunFolder.open(copy)
    run.set_status("running", step=30)
    with run.locked():
        before = sorted(copy.rglob("*"))
        answer = metarun(*words(copy, drawings / "few", drawings / "many"))
        assert sorted(copy.rglob("*")) == before
    assert answer.code == 0
    assert "is not finished (running): its best checkpoint so far is used" in answer.err


def test_batch_norm_that_the_run_was_not_tested_with_is_named(
    protonet: Path, drawings: Path, metarun: Command
) -> None:
    answer = metarun(*words(protonet, drawings / "few", drawings / "many", "--transductive"))
    assert answer.code == 0
    assert "differs from the run's own test, which used bn=running" in answer.err


@pytest.mark.slow
def test_an_interrupt_in_the_midst_is_one_line_and_leaves_nothing(
    protonet: Path, drawings: Path, tmp_path: Path
) -> None:
    # In another process, since pytest handles the signals of this one.
    code = (
        "import os, signal, sys, time\n"
        # A process that a shell has started with & ignores SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from metarun.cli import main, predict\n"
        # Another thread may receive the signal first, so this one waits.
        "predict.as_csv = lambda *_: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words(protonet, drawings / "few", drawings / "many")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_names_that_a_spreadsheet_would_run_are_quoted() -> None:
    answers = np.array([[0.75, 0.25], [0.25, 0.75]])
    text = predict.as_csv(["=1+1.png", "b.png"], ["@a", "-b"], answers).decode()
    assert text.splitlines()[1:] == [
        '"\'=1+1.png","\'@a",0.75,0.75,0.25',
        '"b.png","\'-b",0.75,0.25,0.75',
    ]
