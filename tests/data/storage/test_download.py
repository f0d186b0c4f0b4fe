"""Downloads from a local server that fails in the ways in which servers fail."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from metarun.data.storage.download import DownloadError, download
from metarun.data.storage.omniglot_files import PARTS, fetch_omniglot
from tests.data.sources import write_omniglot_zips
from tests.data.test_omniglot import TINY

CONTENT = np.random.default_rng(0).integers(0, 256, 600_000, dtype=np.uint8).tobytes()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Server of `files`; `manners` has one behavior per request, and the last one is repeated."""

    daemon_threads = True
    files: dict[str, bytes]
    manners: list[str]
    ranges: list[str | None]

    def handle_error(self, *args: Any) -> None:
        """Ignore errors, since connections are closed on purpose."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    pages: ClassVar[dict[str, tuple[str, bytes]]] = {
        "page": ("text/html; charset=utf-8", b"<p>Please log in</p>"),
        "hidden page": ("application/zip", b"\n <!DOCTYPE html><html>Please log in</html>"),
    }

    def do_GET(self) -> None:
        manner = self.server.manners[0]
        if len(self.server.manners) > 1:
            self.server.manners.pop(0)
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        self.close_connection = True
        body = self.server.files.get(self.path)
        if manner in self.pages:
            kind, page = self.pages[manner]
            self._answer(200, page, {"Content-Type": kind})
        elif manner.isdigit() or body is None:
            self._answer(int(manner) if manner.isdigit() else 404, b"no", {})
        elif manner == "hang up":
            self.connection.close()
        else:
            self._file(body, manner, asked)

    def _file(self, body: bytes, manner: str, asked: str | None) -> None:
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if manner == "ignores ranges":
            first = 0
        if first and first >= len(body):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            return
        head = {"Content-Length": str(len(body) - first)}
        if first:
            head["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        if manner == "no length":
            del head["Content-Length"]
        part = body[first : first + 200_000] if manner == "cuts" else body[first:]
        if manner == "wrong bytes":
            part = bytes(len(part))
        self._answer(206 if first else 200, part, head)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Log nothing, to keep the output of the tests clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.manners, server.ranges = {"/file.bin": CONTENT}, ["well"], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server: Server, target: Path, **options: Any) -> Path:
    return download(f"{server.url}/file.bin", target, **({"md5": MD5, "pause": 0.001} | options))


def test_a_file_arrives_whole_and_alone(server: Server, tmp_path: Path) -> None:
    target = fetch(server, tmp_path / "new" / "file.bin")
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_is_there_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    target = fetch(server, tmp_path / "file.bin")
    fetch(server, target)
    assert len(server.ranges) == 1
    target.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="move it away"):
        fetch(server, target)
    assert target.read_bytes() == b"mine"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    server: Server, tmp_path: Path
) -> None:
    server.manners = ["cuts"]
    assert fetch(server, tmp_path / "file.bin", attempts=1).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=200000-", "bytes=400000-"]


def test_a_later_call_continues(server: Server, tmp_path: Path) -> None:
    server.manners = ["cuts", "503"]
    with pytest.raises(DownloadError, match=r"HTTP 503 .*, 2 attempts\): try again later"):
        fetch(server, tmp_path / "file.bin", attempts=2)
    assert not (tmp_path / "file.bin").exists()
    server.manners = ["well"]
    assert fetch(server, tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=200000-"


def test_a_server_that_ignores_ranges_is_read_from_the_start(
    server: Server, tmp_path: Path
) -> None:
    server.manners = ["cuts", "ignores ranges"]
    assert fetch(server, tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_server_that_does_not_tell_the_length_is_believed_by_the_hash(
    server: Server, tmp_path: Path
) -> None:
    server.manners = ["no length"]
    assert fetch(server, tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_part_that_is_complete_needs_no_more_bytes(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("left", [CONTENT + b"more", b"another" * 1000])
def test_what_another_version_left_is_fetched_anew(
    server: Server, tmp_path: Path, left: bytes
) -> None:
    (tmp_path / "file.bin.part").write_bytes(left)
    assert fetch(server, tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("manner", ["page", "hidden page"])
def test_a_web_page_with_status_200_is_no_file(server: Server, tmp_path: Path, manner: str) -> None:
    server.manners = [manner]
    with pytest.raises(DownloadError, match="returns a web page instead of the file"):
        fetch(server, tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()
    server.manners = ["well"]
    assert fetch(server, tmp_path / "file.bin").read_bytes() == CONTENT


def test_wrong_bytes_are_named_by_both_hashes_and_thrown_away(
    server: Server, tmp_path: Path
) -> None:
    server.manners = ["wrong bytes"]
    wrong = hashlib.md5(bytes(len(CONTENT))).hexdigest()
    with pytest.raises(DownloadError, match=f"has md5 {wrong}, {MD5} is expected"):
        fetch(server, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.manners = ["404"]
    with pytest.raises(DownloadError, match=r"cannot be fetched \(HTTP 404 Not Found\): import"):
        fetch(server, tmp_path / "file.bin")
    assert len(server.ranges) == 1


def test_a_server_that_comes_back_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.manners = ["503", "hang up", "well"]
    assert fetch(server, tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_server_that_is_not_there_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot be fetched \(.*refused.*, 2 attempts\)"):
        download("http://127.0.0.1:9/file.bin", tmp_path / "f", md5=MD5, attempts=2, pause=0.001)


def test_without_a_network_the_user_does_not_wait(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r", 2 attempts\): .* import a copy with --from PATH"):
        download("http://no-such-host.invalid/file.bin", tmp_path / "f", md5=MD5, pause=0.001)


def test_space_is_checked_before_the_bytes_come(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match="has 1 MB free, 68 MB are needed"):
        fetch(server, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_omniglot_is_fetched_and_imported(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metarun.data.storage import omniglot_files
    from tests.data import sources

    for module in (omniglot_files, sources):
        monkeypatch.setattr(module, "characters", lambda: TINY)
    write_omniglot_zips(tmp_path / "zips")
    files = {part: (tmp_path / "zips" / f"{part}.zip").read_bytes() for part in PARTS}
    server.files = {f"/{part}.zip": data for part, data in files.items()}
    md5 = {part: hashlib.md5(data).hexdigest() for part, data in files.items()}
    store = fetch_omniglot(tmp_path / "root", prefix=server.url, md5=md5)
    assert store.facts["md5"] == md5
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["omniglot"]


def test_torchvision_still_knows_where_omniglot_is() -> None:
    from torchvision.datasets import Omniglot

    assert set(Omniglot.zips_md5) == set(PARTS)
    assert Omniglot.download_url_prefix.startswith("https://")
