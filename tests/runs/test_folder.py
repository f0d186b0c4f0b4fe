"""Run folders after kills, with damaged files and with several processes."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metarun.core.files import check_space, write_atomically
from metarun.runs import lock
from metarun.runs.checkpoints import read_checkpoint
from metarun.runs.folder import RunFolder
from metarun.runs.formats import FORMAT


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "algo: x\n", ["algo=x", "data.root='a: b'", "a=[1]"])


def checkpoint(step: int) -> dict[str, object]:
    return {"step": step, "best": None, "state": {"weight": torch.arange(100.0) + step}}


def test_a_new_run_holds_its_configuration_and_what_was_typed(run: RunFolder) -> None:
    again = RunFolder.open(run.path)
    assert again.config_text() == "algo: x\n"
    assert again.overrides() == ["algo=x", "data.root='a: b'", "a=[1]"]
    assert again.status()["state"] == "running"
    assert again.load_last() is None
    assert again.load_learned() is None


@pytest.mark.parametrize("text", ["{a: [", "algo: x\n", "names: ${nothing}\n"])
def test_a_configuration_that_is_none_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    run = RunFolder.create(tmp_path / "run", text)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged: ") as error:
        run.configuration()
    assert "\n" not in str(error.value)
    whole = RunFolder.create(tmp_path / "whole", "names: {algo: x}\nway: 5\n")
    assert whole.configuration() == {"names": {"algo": "x"}, "way": 5}


def test_a_run_without_words_has_no_overrides(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path / "run", "").overrides() == []


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "a: 1\n")
    with pytest.raises(ValueError, match="is not empty"):
        RunFolder.create(tmp_path, "a: 2\n")
    assert RunFolder.open(tmp_path).config_text() == "a: 1\n"


@pytest.mark.parametrize("path", ["nothing_here", "."])
def test_what_is_no_run_is_named_so_in_one_line(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such folder|is not a run folder") as error:
        RunFolder.open(tmp_path / path)
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_status_is_written_on_a_full_disk(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    run.set_status("failed", why="no space")
    assert run.status()["why"] == "no space"


def test_the_checkpoint_before_stays(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.save_last(checkpoint(step))
    folder = run.path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "previous.pt"]
    assert read_checkpoint(folder / "last.pt")["step"] == 3
    assert read_checkpoint(folder / "previous.pt")["step"] == 2


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    # Inside the weights: the archive stays readable, and only a checksum shows the damage.
    position = data.index(torch.arange(50.0, 60.0).numpy().tobytes())
    return data[:position] + b"\xff" + data[position + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda _: b"", lambda _: b"no zip at all"])
def test_a_broken_checkpoint_falls_back_to_the_one_before(
    damage: object, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    run.save_last(checkpoint(1))
    run.save_last(checkpoint(2))
    last = run.path / "checkpoints" / "last.pt"
    last.write_bytes(damage(last.read_bytes()))  # type: ignore[operator]
    loaded = run.load_last()
    assert loaded is not None
    assert loaded["step"] == 1
    assert "continuing from previous.pt" in caplog.text


def test_a_kill_between_the_two_moves_leaves_the_checkpoint_before(run: RunFolder) -> None:
    run.save_last(checkpoint(1))
    folder = run.path / "checkpoints"
    (folder / "last.pt").rename(folder / "previous.pt")
    loaded = run.load_last()
    assert loaded is not None
    assert loaded["step"] == 1


def test_two_broken_checkpoints_are_an_error_in_one_line(run: RunFolder) -> None:
    run.save_last(checkpoint(1))
    (run.path / "checkpoints" / "last.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged, and there is no other"):
        run.load_last()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch owned",)


def test_a_checkpoint_never_runs_what_it_contains(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "step": Evil()}, run.path / "checkpoints" / "last.pt")
    with pytest.raises(ValueError, match="is damaged"):
        run.load_last()
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_a_newer_format_is_refused(run: RunFolder) -> None:
    path = run.path / "checkpoints" / "best.pt"
    torch.save({"format": FORMAT + 1}, path)
    with pytest.raises(ValueError, match="newer metarun"):
        read_checkpoint(path)


def test_records_without_a_format_are_refused_in_one_line(run: RunFolder) -> None:
    path = run.path / "checkpoints" / "best.pt"
    torch.save({"step": 3}, path)
    with pytest.raises(ValueError, match=r"best\.pt has no format: .* run it again"):
        read_checkpoint(path)
    run.write_json("results.json", {"metric": "mse"})
    with pytest.raises(ValueError, match=r"results\.json has no format: .* run it again"):
        run.read_results()
    run.write_json("results.json", {"format": FORMAT, "metric": "mse"})
    assert run.read_results()["metric"] == "mse"


def test_results_of_a_newer_format_are_refused(run: RunFolder) -> None:
    run.write_json("results.json", {"format": FORMAT + 1})
    with pytest.raises(ValueError, match="newer metarun"):
        run.read_results()


def test_a_broken_best_is_taken_from_the_last(run: RunFolder) -> None:
    run.save_last({**checkpoint(9), "best": checkpoint(5)})
    (run.path / "checkpoints" / "best.pt").write_bytes(b"")
    learned = run.load_learned()
    assert learned is not None
    assert learned[0] == "best"
    assert learned[1]["step"] == 5


def test_growing_files_are_cut_to_what_a_checkpoint_knew(run: RunFolder) -> None:
    run.append("metrics.jsonl", {"step": 1, "train/loss": 0.1})
    lengths = run.lengths()
    run.append("metrics.jsonl", {"step": 2, "train/loss": math.nan})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tra')
    text = (run.path / "metrics.jsonl").read_text()
    assert text.splitlines()[1] == '{"step": 2, "train/loss": null}'
    run.cut(lengths, 1)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 0.1}\n'
    run.cut({}, 0)
    assert (run.path / "metrics.jsonl").read_text() == ""


def test_lines_that_are_none_are_left_out_and_counted_once(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": None}]
    texts = [json.dumps(whole[0]), "5", '{"step": "1"}', '{"a": 1}', '{"step": 3, "b": "c"}']
    texts += ["[" * 9999, "\x00", "{", "", json.dumps(whole[1]), '{"step": 4, "tra']
    (run.path / "metrics.jsonl").write_text("\n".join(texts))
    assert run.read_lines("metrics.jsonl") == run.read_lines("metrics.jsonl") == whole
    assert [record.getMessage() for record in caplog.records] == [
        f"{run.path / 'metrics.jsonl'}: 7 damaged lines left out"
    ]
    # The last line is being written, unless the run has ended.
    run.set_status("failed", step=2)
    run.read_lines("metrics.jsonl")
    assert "8 damaged lines" in caplog.text


def test_records_are_strict_json(run: RunFolder) -> None:
    run.write_json("results.json", {"a": [math.inf, 1.5], "b": {"c": math.nan}})
    text = (run.path / "results.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == {
        "a": [None, 1.5],
        "b": {"c": None},
    }


def test_a_damaged_record_is_named(run: RunFolder) -> None:
    (run.path / "status.json").write_text("{")
    with pytest.raises(ValueError, match=r"status\.json is damaged"):
        run.status()


def test_a_second_process_is_kept_out(run: RunFolder) -> None:
    with run.locked():
        asked = lock_elsewhere(run.path)
    assert asked.returncode == 1
    assert f"is in use by process {os.getpid()}" in asked.stderr
    assert not (run.path / "lock").exists()
    assert lock_elsewhere(run.path).returncode == 0


def lock_elsewhere(path: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from metarun.runs.folder import RunFolder\n"
        "with RunFolder.open(sys.argv[1]).locked(): pass"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )


def test_the_lock_of_a_dead_process_is_taken_over_and_its_litter_removed(run: RunFolder) -> None:
    program = (
        "import os, sys; from metarun.runs.folder import RunFolder\n"
        "with RunFolder.open(sys.argv[1]).locked(): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(run.path)], check=False)
    assert killed.returncode == -9
    assert (run.path / "lock").exists()
    (run.path / "checkpoints" / ".last.pt.123.tmp").write_bytes(b"half")
    with run.locked():
        assert not (run.path / "checkpoints" / ".last.pt.123.tmp").exists()
    assert not (run.path / "lock").exists()


@pytest.mark.parametrize(("owner", "free"), [("{host} {dead}", True), ("{host} 1", False),
                                            ("elsewhere 1", False), ("", True)])  # fmt: skip
def test_without_kernel_locks_the_process_in_the_file_decides(
    owner: str, free: bool, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = owner.format(host=lock.socket.gethostname(), dead=gone.pid)
    (run.path / "lock").write_text(owner)
    if free:
        with run.locked():
            pass
    else:
        with pytest.raises(ValueError, match="is in use"), run.locked():
            pass
        assert (run.path / "lock").read_text() == owner


def test_what_is_logged_is_in_the_log(run: RunFolder) -> None:
    with run.logging():
        logging.getLogger("metarun.data.episodes").warning("lower %s", "query")
    logging.getLogger("metarun").info("too late")
    text = (run.path / "metarun.log").read_text()
    assert "WARNING lower query" in text
    assert "too late" not in text


def test_tests_never_share_a_folder(run: RunFolder) -> None:
    names = [run.test_folder("shot=5").name for _ in range(3)]
    assert names == ["shot=5", "shot=5-2", "shot=5-3"]


def test_space_is_checked_where_the_folder_will_be(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(ValueError, match=r"has .* free and the run needs about 1000000000\.0 GB"):
        check_space(tmp_path / "not" / "there", 10**18)
    assert list(tmp_path.iterdir()) == []


def test_reading_a_run_does_not_import_torch(run: RunFolder) -> None:
    program = (
        "import sys; from metarun.runs.folder import RunFolder\n"
        "RunFolder.open(sys.argv[1]).overrides(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(run.path)], check=True)


def test_a_folder_that_cannot_be_begun_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "status.json")

    monkeypatch.setattr(RunFolder, "set_status", full)
    with pytest.raises(OSError, match="No space left"):
        RunFolder.create(tmp_path / "run", config="")
    assert not (tmp_path / "run").exists()
