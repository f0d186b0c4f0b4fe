"""`metarun data`: list data sets, download or import them, and verify their files."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from rich.table import Table

from metarun.config.catalogue import conf_dir, entries
from metarun.core.console import table_console
from metarun.data.storage import registry
from metarun.data.storage.cache import Store, open_store


def run(args: argparse.Namespace) -> int:
    """Run `metarun data [NAME] [--from PATH] [--root DIR] [--verify]`; return the exit code.

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
    if place == "file":
        return _check_file(name, args.source)
    if name in registry.PLACES and place == "store":
        return _provide(name, args.source, args.root, verify=args.verify)
    if args.source is not None:
        raise ValueError(f"{name} is {_STATES[place]}: type it without --from")
    if args.verify and place == "shipped":
        _verify_shipped()
    print(f"{name} is {_STATES[place]}: type `metarun data={name}`")
    return 0


_STATES = {
    "made": "generated, no files needed",
    "shipped": "shipped with metarun",
    "store": "made of the images of another data set",
}


def _known() -> dict[str, str]:
    """Return the shipped data sets with their descriptions; streams come last."""
    found = entries([conf_dir()], "data")
    return {name: found[name] for name in sorted(found, key=lambda n: (n.startswith("stream_"), n))}


def _list(root: str | None, *, verify: bool) -> int:
    """Print the table of data sets; return the exit code."""
    base = registry.resolve_root(root)
    table = Table(box=None, show_header=False, expand=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    # Long paths are folded, not cut, so that they can be copied.
    table.add_column(ratio=1, overflow="fold")
    for name, line in _known().items():
        table.add_row(name, line)
        table.add_row("", _state(name, base, root, verify=verify))
    table_console().print(table)
    return 0


def _state(name: str, base: Path, root: str | None, *, verify: bool) -> str:
    """Return where a data set is, or how to get it."""
    place = registry.place_of(name)
    if place in ("folder", "file"):
        return f"type data={name} data.{'root=PATH' if place == 'folder' else 'file=FILE'}"
    if place != "store":
        return _STATES[place]
    try:
        store = open_store(base / name.removeprefix("stream_"))
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
    store = open_store(base / name)
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


def _import(name: str, source: Path | None, base: Path) -> Store:
    if name == "miniimagenet":
        from metarun.data.storage.miniimagenet_files import FORMS, import_miniimagenet

        if source is None:
            raise ValueError(
                "miniimagenet cannot be downloaded, since its photographs belong to ImageNet: "
                f"import files you have with --from PATH; supported formats are {FORMS}"
            )
        return import_miniimagenet(source, base)
    from metarun.data.storage.omniglot_files import fetch_omniglot, import_omniglot

    return fetch_omniglot(base) if source is None else import_omniglot(source, base)


def _describe(store: Store) -> str:
    facts = store.facts
    counts = facts.get("counts")
    if counts is None:
        content = f"{facts['classes']} classes, {facts['images']} images"
    else:
        classes = "/".join(str(len(numbers)) for numbers in counts.values())
        images = sum(sum(numbers) for numbers in counts.values())
        content = f"{classes} train/val/test classes, {images} images"
    return f"{facts['name']} is in {store.folder}: {content}"


def _check_folder(root: str | None) -> int:
    """Read every image of a user's folder and print the number of classes in each split."""
    from metarun.data.folder import list_folder
    from metarun.data.image_files import check_readable

    if root is None:
        raise ValueError(
            "data=folder reads your own images: check them with `metarun data folder --from PATH`"
        )
    absent = registry.missing("folder", root)
    if absent is not None:
        raise ValueError(absent)
    splits = list_folder(Path(root).expanduser())
    check_readable([file for classes in splits.values() for f in classes.values() for file in f])
    for split, classes in splits.items():
        counts = [len(files) for files in classes.values()]
        print(f"{split}: {len(classes)} classes of {min(counts)} to {max(counts)} images")
    print(f"all images are readable: train with `metarun data=folder data.root={root}`")
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
