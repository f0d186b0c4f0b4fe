"""Omniglot: the shipped characters, the full set from every layout, splits and pixels."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from metarun.core.types import SPLITS, EpisodeSize, EpisodeSource, Split
from metarun.data.episodes import ClassEpisodes
from metarun.data.omniglot import Omniglot, OmniglotSmall, small_tables, split_of
from metarun.data.storage import omniglot_files
from metarun.data.storage.cache import Store, open_store
from metarun.data.storage.image_files import drawing
from metarun.data.storage.omniglot_files import FILES, PARTS, Character, characters, import_omniglot
from metarun.data.streams import OmniglotStream
from metarun.data.synthetic import Linear, Sinusoid
from tests.conftest import Command
from tests.data.sources import make_source, omniglot_drawings, png, sizes, write_omniglot_zips

TINY = (
    *(Character("images_background", "Alpha", number, "train") for number in (1, 2, 3)),
    *(Character("images_background", "Beta", number, "val") for number in (1, 2)),
    *(Character("images_evaluation", "Gamma", number, "train") for number in (1, 2)),
    *(Character("images_evaluation", "Gamma", number, "test") for number in (3, 4, 5)),
)


def small(**options: Any) -> OmniglotSmall:
    return make_source(OmniglotSmall, **options)


def episode_hash(source: EpisodeSource) -> str:
    """Return a hash of the pixels and labels of the first 20 test episodes."""
    batch = source.batch("test", 0, 20)
    digest = hashlib.sha256()
    for tensor in (batch.support_x, batch.support_y, batch.query_x, batch.query_y):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.slow
def test_the_characters_come_in_any_size_up_to_their_own() -> None:
    large = small(image_size=48, resize="antialias")
    assert large.spec.input_shape == (1, 48, 48)
    batch, before = large.batch("test", 0, 2), small(resize="antialias").batch("test", 0, 2)
    assert batch.class_ids is not None
    assert before.class_ids is not None
    assert torch.equal(batch.class_ids, before.class_ids)
    shrunk = torch.nn.functional.interpolate(batch.support_x.flatten(0, 1), 28, mode="area")
    likeness = torch.corrcoef(torch.stack([shrunk.flatten(), before.support_x.flatten()]))[0, 1]
    assert likeness > 0.95
    for side in (7, 106):
        with pytest.raises(ValueError, match=rf"data\.image_size={side}: expected 8 to 105"):
            small(image_size=side)


def test_all_characters_in_every_split() -> None:
    apart, whole = small(), small(classes="all")
    assert [whole.num_classes(split) for split in SPLITS] == [136 + 17 + 89] * 3
    names = [name for split in SPLITS for name in apart.class_names(split)]
    assert list(whole.class_names("test")) == sorted(names, key=lambda name: name.split("/")[0])

    def drawings(source: OmniglotSmall, split: Split) -> set[tuple[str, bytes]]:
        task = source.batch(split, 0, 8)
        assert task.class_ids is not None
        known, numbers = source.class_names(split), task.class_ids.unbind()
        return {
            (known[number], pixels.numpy().tobytes())
            for ids, x, y in zip(numbers, task.support_x, task.support_y, strict=True)
            for number, pixels in zip(ids[y].tolist(), x, strict=True)
        }

    # Each drawing has the name that it has where the splits are apart.
    found = drawings(whole, "test")
    assert {name.split("/")[0] for name, _ in found} > {"Sanskrit"}
    every = {
        (name, table.images[20 * place + row].div(255).numpy().tobytes())
        for table in small_tables("paper", 28).values()
        for place, name in enumerate(table.names)
        for row in range(20)
    }
    assert found <= every


def test_a_run_is_tested_on_all_characters(metarun: Command) -> None:
    words = ["algo=protonet", "data=omniglot_small", "~recipe", "backbone.filters=2", "way=2"]
    few = ["train.steps=1", "eval.episodes=3", "eval.val_episodes=2", "hydra.run.dir=run"]
    assert metarun(*words, *few).code == 0
    answer = metarun("test=run", "data.classes=all")
    assert answer.code == 0, answer.err
    results = [json.loads(path.read_text()) for path in Path("run").rglob("results.json")]
    assert len({result["data_fingerprint"] for result in results}) == 2


def test_the_small_set_has_the_alphabets_of_its_splits() -> None:
    source = small()
    assert [source.num_classes(split) for split in SPLITS] == [136, 17, 89]
    alphabets = [{n.split("/")[0] for n in source.class_names(split)} for split in SPLITS]
    assert alphabets[0] == {"Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"}
    assert alphabets[1] == {"Tagalog"}
    assert alphabets[2] == {"Japanese_(katakana)", "Sanskrit"}


def test_the_test_episodes_never_change() -> None:
    assert episode_hash(small()) == "9d3830f43cace4ec"
    assert small().fingerprint() == "f8fa02bfe031f75f"
    size = dict.fromkeys(SPLITS, EpisodeSize(1, 5, 10))
    # Without the values of the sine, whose last bit depends on the processor.
    x = make_source(Sinusoid, sizes=size).batch("test", 0, 20).support_x
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] == "b4a3ca5cc4623e58"
    x = make_source(Linear, sizes=size).batch("test", 0, 20).support_x
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] == "9d4d0424ace7a83a"


def test_ink_is_one_and_paper_is_zero() -> None:
    for source, values in ((small(), 2), (small(resize="antialias"), 50)):
        x = source.batch("test", 0, 20).support_x
        assert x.shape[2:] == (1, 28, 28)
        assert (float(x.min()), float(x.max())) == (0.0, 1.0)
        assert len(x.unique()) >= values
        assert 0.03 < x.mean() < 0.3
    assert len(small().batch("test", 0, 20).support_x.unique()) == 2


def test_the_papers_resizing_is_pillows_lanczos_on_one_bit() -> None:
    with zipfile.ZipFile(FILES / "images_background_small1.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")][::100]
        for name in names:
            image = Image.open(io.BytesIO(archive.read(name)))
            assert image.mode == "1"
            theirs = image.resize((28, 28), Image.Resampling.LANCZOS)
            expected = 255 * (1 - np.asarray(theirs, dtype=np.uint8))
            np.testing.assert_array_equal(drawing(image, "paper"), expected)
            gray = image.convert("L").resize((28, 28), Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(drawing(image, "antialias"), 255 - np.asarray(gray))


def test_a_users_drawing_is_prepared_as_the_data_were() -> None:
    with zipfile.ZipFile(FILES / "images_background_small2.zip") as archive:
        name = next(n for n in archive.namelist() if "Sanskrit/character01" in n and "png" in n)
        image = Image.open(io.BytesIO(archive.read(name)))
        image.load()
    for resize in ("paper", "antialias"):
        source = small(resize=resize)
        row = source.prepare([image, image.convert("RGB"), np.asarray(image)])
        first = source._tables["test"].images[
            source.class_names("test").index("Sanskrit/character01") * 20
        ]
        for prepared in row:
            torch.testing.assert_close(prepared, first / 255.0)


def test_a_transparent_drawing_stands_on_paper() -> None:
    image = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((20, 20, 35, 35), fill=(0, 0, 0, 255))
    prepared = drawing(image, "paper")
    assert prepared[0, 0] == 0
    assert prepared[14, 14] == 255


def test_within_alphabet_takes_a_task_from_one_alphabet() -> None:
    source = small(episodes="within_alphabet")
    names = source.class_names("train")
    ids = source.batch("train", 0, 100).class_ids
    assert ids is not None
    chosen = [{names[i].split("/")[0] for i in task} for task in ids.tolist()]
    assert all(len(alphabets) == 1 for alphabets in chosen)
    assert len(set.union(*chosen)) == 5


def test_tagalog_has_seventeen_characters_for_a_task_of_twenty() -> None:
    source = small(sizes=sizes(way=20))
    assert source.sizes["val"].way == 17
    rotated = small(sizes=sizes(way=20), rotations_eval="classes")
    assert rotated.sizes["val"].way == 20


def test_val_alone_can_have_its_rotations_as_classes() -> None:
    source = small(sizes=sizes(way=60), rotations_val="classes")
    assert source.sizes["val"].way == 60
    assert (source.num_classes("val"), source.num_classes("test")) == (4 * 17, 89)
    config, turned = small(sizes=sizes(way=5)), small(sizes=sizes(way=5), rotations_val="classes")
    assert torch.equal(config.batch("test", 0, 2).support_x, turned.batch("test", 0, 2).support_x)


@pytest.mark.parametrize("key", ["rotations_eval", "rotations_val"])
def test_a_mirrored_test_class_would_be_another_character(metarun: Command, key: str) -> None:
    answer = metarun("algo=nearest", "data=omniglot_small", f"data.{key}=mirrored")
    assert answer.code == 2
    assert f"data.{key}=mirrored: expected none, classes or per_task" in answer.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": sizes(way=137)}, "way=137 is more than the 89 classes in omniglot_small.s test"),
        ({"sizes": sizes(shot=10, query=15)}, r"has 20 images, 10\+15 are needed: lower"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_vinyals_split_has_its_published_sizes() -> None:
    everyone = characters()
    names = [character.name for character in everyone]
    assert len(names) == len(set(names)) == 1623
    assert len({character.alphabet for character in everyone}) == 50
    counts = {split: sum(c.vinyals == split for c in everyone) for split in SPLITS}
    assert counts == {"train": 1028, "val": 172, "test": 423}
    parts = [sum(c.part == part for c in everyone) for part in PARTS]
    assert parts == [964, 659]
    assert {c.alphabet for c in everyone if c.vinyals == "val"} == {
        "Armenian",
        "Bengali",
        "Early_Aramaic",
        "Hebrew",
        "Mkhedruli_(Georgian)",
    }


def test_the_background_split_tests_on_the_evaluation_set() -> None:
    counts = dict.fromkeys(SPLITS, 0)
    for character in characters():
        counts[split_of(character, "background")] += 1
    assert counts == {"train": 792, "val": 172, "test": 659}
    places = {(c.alphabet, split_of(c, "background")) for c in characters()}
    assert len(places) == len({alphabet for alphabet, _ in places}) == 50
    assert sum(split == "train" for _, split in places) == 25


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Create an Omniglot of ten characters; returns the folder with its two zip files."""
    from metarun.data import omniglot
    from tests.data import sources

    for module in (omniglot, omniglot_files, sources):
        monkeypatch.setattr(module, "characters", lambda: TINY)
    write_omniglot_zips(tmp_path / "zips")
    return tmp_path / "zips"


def full(root: Path, **options: Any) -> Omniglot:
    two = dict.fromkeys(SPLITS, EpisodeSize(2, 1, 2))
    return make_source(Omniglot, root=str(root), **({"sizes": two} | options))


def same_arrays(one: Store, other: Store) -> bool:
    return one.files == other.files


def test_the_same_set_comes_from_zips_folders_and_torchvisions_layout(
    tiny: Path, tmp_path: Path
) -> None:
    stores = [import_omniglot(tiny, tmp_path / "a")]
    config, nested = tmp_path / "plain", tmp_path / "nested" / "omniglot-py"
    twice = tmp_path / "twice"
    for part in PARTS:
        with zipfile.ZipFile(tiny / f"{part}.zip") as archive:
            archive.extractall(config)
            archive.extractall(nested)
            archive.extractall(twice / part)
    (config / PARTS[0] / ".DS_Store").write_bytes(b"")
    sources = [config, config / PARTS[1], nested.parent, nested, twice, tiny / f"{PARTS[0]}.zip"]
    stores += [import_omniglot(s, tmp_path / f"root{i}") for i, s in enumerate(sources)]
    assert all(same_arrays(store, stores[0]) for store in stores)
    assert open_store(tmp_path / "a" / "omniglot") == stores[0]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["omniglot"]
    stores[0].verify()


def test_splits_and_pixels_of_an_imported_set_are_right(tiny: Path, tmp_path: Path) -> None:
    import_omniglot(tiny, tmp_path)
    source = full(tmp_path, rotations="none", rotations_eval="none")
    assert source.class_names("train")[3:] == ("Gamma/character01", "Gamma/character02")
    assert source.class_names("test") == tuple(f"Gamma/character{i:02d}" for i in (3, 4, 5))
    background = full(tmp_path, split="background", rotations_eval="none")
    assert [len(background._tables[split].names) for split in SPLITS] == [3, 2, 5]
    for resize in ("paper", "antialias"):
        images = full(tmp_path, resize=resize)._tables["test"].images
        drawings = [data for _, path, data in omniglot_drawings() if path.startswith("Gamma")][40:]
        assert len(images) == len(drawings) == 60
        for row, data in zip(images, drawings, strict=True):
            image = Image.open(io.BytesIO(data))
            np.testing.assert_array_equal(row[0].numpy(), drawing(image, resize))


def test_an_imported_set_has_its_drawings_in_any_size(tiny: Path, tmp_path: Path) -> None:
    store = import_omniglot(tiny, tmp_path)
    drawings = [data for _, path, data in omniglot_drawings() if path.startswith("Beta")]
    for resize in ("paper", "antialias"):
        source = full(tmp_path, resize=resize, image_size=40, rotations_eval="none")
        images = source._tables["val"].images
        assert images.shape == (40, 1, 40, 40)
        for row, data in zip(images, drawings, strict=True):
            image = Image.open(io.BytesIO(data))
            np.testing.assert_array_equal(row[0].numpy(), drawing(image, resize, 40))
        np.testing.assert_array_equal(source.prepare([image])[0, 0] * 255, images[-1, 0])
    meta = store.folder / "meta.json"
    content = json.loads(meta.read_text(encoding="utf-8"))
    del content["files"]["originals"]
    meta.write_text(json.dumps(content), encoding="utf-8")
    assert full(tmp_path).spec.input_shape == (1, 28, 28)
    with pytest.raises(ValueError, match=r"image_size=40 needs the original drawings.*delete"):
        full(tmp_path, image_size=40)


def test_the_full_set_counts_rotations_as_classes_unless_told_otherwise(
    tiny: Path, tmp_path: Path
) -> None:
    import_omniglot(tiny, tmp_path)
    assert [full(tmp_path).num_classes(split) for split in SPLITS] == [20, 8, 12]
    maml = full(tmp_path, rotations="per_task", rotations_eval="per_task")
    assert [maml.num_classes(split) for split in SPLITS] == [5, 2, 3]


def test_without_the_data_the_message_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data=omniglot is not in .*metarun data omniglot --root"):
        full(tmp_path)


def rewrite(path: Path, change: dict[str, bytes | None]) -> None:
    """Rewrite a zip with some members changed, dropped (None) or added."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {name: data for name, data in change.items() if data is not None}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if change.get(name, b"") is not None:
                archive.writestr(name, data)


FIRST = "images_background/Alpha/character01/0001_01.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FIRST: None}, "Alpha/character01 has 19 drawings, 20 are expected"),
        ({FIRST: b"no picture"}, r"Alpha/character01/0001_01.png cannot be read as an image"),
        (
            {FIRST: png(Image.new("1", (28, 28)))},
            "0001_01.png is 28 x 28, Omniglot's drawings are 105 x 105",
        ),
        (
            {"images_background/Delta/character01/9_01.png": b"x"},
            "has 6 characters, Omniglot's images_background has 5: Delta/character01 does not",
        ),
        (
            {f"images_background/Beta/character02/0005_{i:02d}.png": None for i in range(1, 21)},
            "has 4 characters, Omniglot's images_background has 5: Beta/character02 is missing",
        ),
    ],
)
def test_an_incomplete_set_is_refused_and_leaves_nothing(
    tiny: Path, tmp_path: Path, change: dict[str, bytes | None], message: str
) -> None:
    rewrite(tiny / "images_background.zip", change)
    with pytest.raises(ValueError, match=message):
        import_omniglot(tiny, tmp_path / "root")
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").iterdir())


def test_a_zip_that_was_cut_off_is_named(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is not a complete zip file"):
        import_omniglot(tiny, tmp_path)


def test_a_zip_with_a_flipped_byte_is_named(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "images_evaluation.zip"
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is damaged at"):
        import_omniglot(tiny, tmp_path)


def test_what_is_not_there_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder"):
        import_omniglot(tmp_path / "nowhere", tmp_path)
    (tiny / "images_evaluation.zip").unlink()
    with pytest.raises(ValueError, match=r"neither images_evaluation\.zip nor a folder"):
        import_omniglot(tiny, tmp_path)
    with pytest.raises(ValueError, match="ship with metarun as data=omniglot_small"):
        import_omniglot(FILES, tmp_path)


def test_a_damaged_store_says_what_to_do(tiny: Path, tmp_path: Path) -> None:
    folder = import_omniglot(tiny, tmp_path).folder
    original = (folder / "paper.npy").read_bytes()
    (folder / "paper.npy").write_bytes(original[:-1] + bytes([original[-1] ^ 255]))
    store = open_store(folder)
    assert store is not None
    with pytest.raises(ValueError, match=r"paper\.npy was changed since it was imported: delete"):
        store.verify()
    (folder / "paper.npy").write_bytes(original[:-1])
    with pytest.raises(ValueError, match=r"paper\.npy has \d+ of its \d+ bytes: delete"):
        full(tmp_path)
    (folder / "meta.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        full(tmp_path)


def test_a_full_disk_leaves_nothing_behind(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match="0 MB free, 150 MB are needed: free some space"):
        import_omniglot(tiny, tmp_path / "root")
    assert not (tmp_path / "root").exists()


@pytest.mark.slow
def test_the_full_layout_with_all_its_characters_is_imported(tmp_path: Path) -> None:
    write_omniglot_zips(tmp_path / "zips")
    import_omniglot(tmp_path / "zips", tmp_path / "root")
    source = make_source(Omniglot, root=str(tmp_path / "root"), sizes=sizes(way=20))
    assert [source.num_classes(split) for split in SPLITS] == [4112, 688, 1692]
    assert isinstance(source, ClassEpisodes)
    assert source.batch("test", 0, 2).query_x.shape == (2, 60, 1, 28, 28)


def test_an_imported_set_streams_its_evaluation_characters(tiny: Path, tmp_path: Path) -> None:
    import_omniglot(tiny, tmp_path)
    sizes = {
        "train": EpisodeSize(1, 3, 2),
        "val": EpisodeSize(2, 3, 2),
        "test": EpisodeSize(5, 3, 2),
    }
    options = {"split": "background", "rotations": "none", "rotations_eval": "none"}
    source = make_source(OmniglotStream, root=str(tmp_path), sizes=sizes, remember=4, **options)
    batch = source.batch("test", 0, 2)
    assert batch.support_x.shape == (2, 15, 1, 28, 28)
    assert batch.support_y[0].tolist() == [label for label in range(5) for _ in range(3)]
    assert source.batch("train", 0, 2).query_x.shape[1] == 2 + 4
    assert source.spec.output_dim == 5
