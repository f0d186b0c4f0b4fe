"""Download of a file over HTTP that is either complete or absent afterwards.

Bytes are streamed to `NAME.part`, which a later call resumes. The file gets its final name once its
hash is correct.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from metarun.core.files import free_space

_CHUNK = 1 << 18
_SPARE = 64 << 20
_AGENT = "metarun (https://pypi.org/project/metarun)"


class DownloadError(ValueError):
    """A file could not be downloaded. The message says why and what to do."""


def download(
    url: str,
    target: Path,
    *,
    md5: str,
    attempts: int = 6,
    timeout: float = 30.0,
    pause: float = 1.0,
) -> Path:
    """Download `url` to `target` with a progress bar, and return `target`.

    An interrupted download is resumed, also by a later call.

    Args:
        url: Address of the file.
        target: Path of the result. An existing file with the correct hash is kept.
        md5: Expected hash, in hexadecimal digits.
        attempts: Number of connections to try; those that brought new bytes do not count.
        timeout: Seconds to wait for a response.
        pause: Seconds before the second attempt, doubled before each later one.

    Raises:
        DownloadError: The server does not send the file, or sends another one.
        OSError: The disk has no space.
    """
    if target.exists():
        if file_hash(target, "md5") == md5:
            return target
        raise DownloadError(
            f"{target} exists but is not the file at {url}: move it away, then try again"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    _fetch_all(url, part, attempts, timeout, pause)
    if file_hash(part, "md5") != md5 and resumed:
        # The part from an earlier call may belong to another version of the file.
        part.unlink()
        _fetch_all(url, part, attempts, timeout, pause)
    found = file_hash(part, "md5")
    if found != md5:
        part.unlink()
        raise DownloadError(
            f"{url} has md5 {found}, {md5} is expected: the file was changed, or damaged in "
            "transfer; try again, or import a copy with --from PATH"
        )
    return part.replace(target)


def file_hash(path: Path, name: str) -> str:
    """Return the hash of a file in hexadecimal digits; `name` is hashlib's name of the method."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, name).hexdigest()


def need_space(folder: Path, num_bytes: int) -> None:
    """Raise `OSError` if the disk of a folder has less than `num_bytes` free."""
    folder, free = free_space(folder)
    if free < num_bytes:
        raise OSError(
            f"the disk of {folder} has {free / 1e6:.0f} MB free, {num_bytes / 1e6:.0f} MB are "
            "needed: free some space, or choose another folder with --root DIR"
        )


def _fetch_all(url: str, part: Path, attempts: int, timeout: float, pause: float) -> None:
    """Connect until the file is complete; connections that bring new bytes do not count."""
    fruitless = 0
    while True:
        before = _size(part)
        try:
            if _fetch(url, part, timeout):
                return
            reason = "the connection was lost"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                raise DownloadError(
                    f"{url} cannot be fetched (HTTP {error.code} {error.reason}): "
                    "import a copy with --from PATH"
                ) from None
            reason = f"HTTP {error.code} {error.reason}"
        except (http.client.HTTPException, urllib.error.URLError, OSError) as error:
            if not _is_network(error):
                raise
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            if isinstance(getattr(error, "reason", error), socket.gaierror):
                # Without a network, further attempts only take time.
                attempts = min(attempts, 2)
        if _size(part) > before:
            fruitless = 0
            continue
        fruitless += 1
        if fruitless >= attempts:
            raise DownloadError(
                f"{url} cannot be fetched ({reason}, {attempts} attempts): try again later to "
                "resume the download, or import a copy with --from PATH"
            )
        time.sleep(pause * 2 ** (fruitless - 1))


def _is_network(error: Exception) -> bool:
    """Return whether an error is of the network; a full disk is an `OSError`, too."""
    kinds = (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError)
    return isinstance(error, kinds)


def _fetch(url: str, part: Path, timeout: float) -> bool:
    """Append the bytes of one connection to `part`; return whether the file is complete."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": _AGENT})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            # No bytes follow: the part is complete or of another version; the hash decides.
            total = _total(error.headers.get("Content-Range"))
            error.close()
            if total == have:
                return True
            part.unlink()
            return False
        raise
    with response:
        _refuse_page(url, response.headers.get("Content-Type", ""), b"")
        if response.status != 206 or _start(response.headers.get("Content-Range")) != have:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if total is not None:
            need_space(part.parent, total - have + _SPARE)
        with part.open("ab" if have else "wb") as file:
            _copy(url, response, file, have, total)
            file.flush()
            os.fsync(file.fileno())
    return total is None or _size(part) == total


def _copy(url: str, response: IO[bytes], file: IO[bytes], have: int, total: int | None) -> None:
    name = url.rsplit("/", 1)[-1]
    with tqdm(desc=name, initial=have, total=total, unit="B", unit_scale=True) as bar:
        first = have == 0
        while chunk := _read(response):
            if first:
                _refuse_page(url, "", chunk)
                first = False
            file.write(chunk)
            bar.update(len(chunk))


def _read(response: Any) -> bytes:
    """Read at most one chunk; bytes received before a lost connection are kept."""
    try:
        return bytes(response.read1(_CHUNK))
    except http.client.IncompleteRead as error:
        return bytes(error.partial)


def _refuse_page(url: str, content_type: str, start: bytes) -> None:
    """Raise an error for a web page: login and error pages may come with status 200."""
    head = start[:256].lstrip().lower()
    if content_type.startswith("text/html") or head.startswith((b"<!doctype html", b"<html")):
        raise DownloadError(
            f"{url} returns a web page instead of the file: open it in a browser to see why, "
            "then import the file with --from PATH"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _start(content_range: str | None) -> int | None:
    """Return the first position of `bytes FIRST-LAST/TOTAL`."""
    if not content_range or not content_range.startswith("bytes "):
        return None
    first = content_range.removeprefix("bytes ").split("-")[0]
    return int(first) if first.isdigit() else None


def _total(content_range: str | None) -> int | None:
    """Return the length in `bytes */TOTAL`."""
    last = (content_range or "").rsplit("/", 1)[-1]
    return int(last) if last.isdigit() else None
