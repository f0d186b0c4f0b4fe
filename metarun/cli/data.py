"""`metarun data`: list data sets, download or import them, and verify their files."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path

from metarun.cli.list import example
from metarun.config.catalogue import conf_dir, entries
from metarun.core.console import busy, definitions, table_console
from metarun.core.streams import tell
from metarun.core.words import number_of
from metarun.data.storage import registry
from metarun.data.storage.cache import Store, open_store


def run(args: argparse.Namespace) -> int:
    """Run `metarun data [NAME [CLASS]] [--from PATH] [--root DIR] [--verify]`; return a code.

    Raises:
        ValueError: The name is unknown, or the data cannot be fetched, imported or verified.
    """
    if args.name is None:
        if args.source is not None:
            raise ValueError(
                "--from PATH needs the name of a data set: type `metarun data NAME --from PATH`"
            )
        return _list(args.root, verify=args.verify)
    name, place = args.name, registry.place_of(args.name)
    if name not in _known():
        raise ValueError(_unknown(name))
    if place == "folder":
        return _check_folder(args.source or args.root)
    if name == "torchvision":
        return _torchvision(args)
    if place == "file":
        return _check_file(name, args.source)
    if name in registry.PLACES and place == "store":
        return _provide(name, args.source, args.root, verify=args.verify)
    if args.source is not None:
        raise ValueError(f"{name} is {_STATES[place]}: type it without --from")
    if args.verify and place == "shipped":
        _verify_shipped()
    state = _STATES[place]
    if name in registry.TRANSFORMED:
        state = _sources(args.root)
    tell(f"{name} is {state}; type `metarun {example([conf_dir()], 'data', name)}`")
    return 0


_STATES = {
    "made": "ready: no files are needed",
    "shipped": "shipped with metarun",
    "store": "made of the images of another data set",
}


def _sources(root: str | None) -> str:
    """Return whose images a stream can transform."""
    here = ", ".join(registry.stored_sources(root))
    return f"ready with data.source={here}; others, such as mnist, after `metarun data NAME`"


_HOW = re.compile(r" \(`metarun data .*\)$")


def _known() -> dict[str, str]:
    """Return the shipped data sets with their descriptions; streams come last."""
    found = entries([conf_dir()], "data")
    return {name: found[name] for name in sorted(found, key=lambda n: (n.startswith("stream_"), n))}


def _list(root: str | None, *, verify: bool) -> int:
    """Print the table of data sets; return the exit code."""
    base = registry.resolve_root(root)
    console = table_console()
    # How to get the files is said of each data set as it is here.
    found = {
        name: f"{_HOW.sub('', line)}\n{_state(name, base, root, verify=verify)}"
        for name, line in _known().items()
    }
    for line in definitions(found, console.width):
        console.print(line, soft_wrap=True)
    return 0


def _state(name: str, base: Path, root: str | None, *, verify: bool) -> str:
    """Return where a data set is, or how to get it."""
    place = registry.place_of(name)
    if place in ("folder", "file"):
        return f"type data={name} data.{'root=PATH' if place == 'folder' else 'file=FILE'}"
    if name == "torchvision":
        stored = sorted(path.name.partition("_")[2] for path in base.glob("torchvision_*"))
        here = f"; stored: {', '.join(stored)}" if stored else ""
        return f"fetch one with `metarun data torchvision CLASS`{here}"
    if name == "mixed":
        return "ready as soon as its data.sources are"
    if name in registry.TRANSFORMED:
        return _sources(root)
    if place != "store":
        return _STATES[place]
    try:
        store = open_store(base / registry.store_of(name))
        if store is not None and verify:
            store.verify()
    except ValueError as error:
        return f"damaged: {error}"
    if store is not None:
        return f"available in {store.folder}"
    return str(registry.missing(name, root)).partition(": ")[2]


def _provide(name: str, source: str | None, root: str | None, *, verify: bool) -> int:
    """Download or import a data set, or say that it is already there; return the exit code."""
    base = registry.resolve_root(root)
    store = open_store(base / registry.store_of(name))
    if store is not None:
        if source is not None:
            raise ValueError(
                f"{name} is already in {store.folder}: delete that folder to import it again"
            )
        if verify:
            store.verify()
        print(f"{_describe(store)}{', all files verified' if verify else ''}")
        return 0
    if verify:
        raise ValueError(str(registry.missing(name, root)))
    path = None if source is None else Path(source).expanduser()
    print(_describe(_import(name, path, base)))
    return 0


def _torchvision(args: argparse.Namespace) -> int:
    """Download or import a data set of torchvision; return the exit code."""
    from metarun.data.storage.torchvision_sets import PARTS, fetch_torchvision, store_name

    if args.which is None:
        raise ValueError(f"type `metarun data torchvision CLASS`, one of {', '.join(PARTS)}")
    base = registry.resolve_root(args.root)
    store = open_store(base / store_name(args.which))
    if store is None:
        source = None if args.source is None else Path(args.source).expanduser()
        store = fetch_torchvision(args.which, source, base)
    if args.verify:
        store.verify()
    print(_describe(store))
    return 0


def _import(name: str, source: Path | None, base: Path) -> Store:
    if name == "miniimagenet":
        from metarun.data.storage.miniimagenet_files import FORMS, import_miniimagenet

        if source is None:
            raise ValueError(
                "miniimagenet cannot be downloaded, since its photographs belong to ImageNet: "
                f"import files you have with --from PATH; supported formats are {FORMS}"
            )
        return import_miniimagenet(source, base)
    if name == "omniglot":
        from metarun.data.storage.omniglot_files import fetch_omniglot, import_omniglot

        return fetch_omniglot(base) if source is None else import_omniglot(source, base)
    from metarun.data.storage.image_sets import fetch_images, import_images

    store = registry.store_of(name)
    return fetch_images(store, base) if source is None else import_images(store, source, base)


def _describe(store: Store) -> str:
    facts = store.facts
    counts = facts.get("counts")
    if isinstance(counts, list):
        content = f"{len(counts)} classes, {sum(counts)} images"
    elif counts is None:
        content = f"{facts['classes']} classes, {facts['images']} images"
    else:
        classes = "/".join(str(len(numbers)) for numbers in counts.values())
        images = sum(sum(numbers) for numbers in counts.values())
        content = f"{classes} train/val/test classes, {images} images"
    return f"{facts['name']} is in {store.folder}: {content}"


def _check_folder(root: str | None) -> int:
    """Read every image of a user's folder and print the number of classes in each split."""
    if root is None:
        raise ValueError(
            "data=folder reads your own images: check them with `metarun data folder --from PATH`"
        )
    absent = registry.missing("folder", root)
    if absent is not None:
        raise ValueError(absent)
    with busy("reading the images"):
        from metarun.data.folder import list_folder
        from metarun.data.image_files import check_readable

        splits = list_folder(Path(root).expanduser())
        groups = [files for classes in splits.values() for files in classes.values()]
        check_readable([file for files in groups for file in files])
    for split, classes in splits.items():
        low, high = (end(map(len, classes.values())) for end in (min, max))
        each = f"{low} to {high} images" if low < high else number_of(low, "image")
        print(f"{split}: {len(classes)} class{'es' * (len(classes) != 1)} of {each}")
    words = f"algo=protonet data=folder data.root={root}"
    tell(f"all images are readable: train with `metarun {words}`")
    return 0


def _check_file(name: str, source: str | None) -> int:
    """Read a user's file and print its columns, or its classes if it holds features."""
    from metarun.data.storage.table_files import Texts, as_texts, read_matrix, read_table

    if source is None:
        raise ValueError(
            f"data={name} reads your own file: look at it with `metarun data {name} --from FILE`"
        )
    if name == "features":
        arrays = read_matrix(source, "--from", text=("label", "split"))
        for key, array in arrays.items():
            if isinstance(array, Texts) or array.ndim == 1:
                texts = as_texts(array)
                print(f"{key}: {len(texts):,} values, {len(texts.names):,} different")
            else:
                print(f"{key}: {' x '.join(map(str, array.shape))} of {array.dtype}")
        print(f"train with `metarun data={name} data.file={source}`")
        return 0
    for key, column in read_table(source, "--from").items():
        if isinstance(column, Texts):
            empty = int((column.values() == "").sum())
            print(f"{key}: texts, {len(column.names):,} different, {empty:,} missing")
        else:
            known = column[column == column]
            bounds = f"{known.min():g} to {known.max():g}" if len(known) else "none"
            print(f"{key}: numbers, {bounds}, {len(column) - len(known):,} missing")
    order = " data.order=COLUMN" if name == "stream_csv" else ""
    print(
        f"train with `metarun data={name} data.file={source} data.target=COLUMN{order} "
        "data.task=COLUMN`"
    )
    return 0


def _verify_shipped() -> None:
    import zipfile

    from metarun.data.storage.omniglot_files import FILES

    for path in sorted(FILES.glob("*.zip")):
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except zipfile.BadZipFile:
            bad = path.name
        if bad is not None:
            raise ValueError(f"{path} is damaged at {bad}: reinstall metarun")


def _unknown(name: str) -> str:
    found = difflib.get_close_matches(name, _known(), n=1)
    known = ", ".join(_known())
    return f"unknown data set {name}" + (
        f": did you mean {found[0]}?" if found else f": choose from {known}"
    )
