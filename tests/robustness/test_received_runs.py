"""A run that comes from somebody else executes nothing, whatever its files hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metarun.cli.main import main
from metarun.config.composition import composer
from metarun.jobs.comparison import folder_name
from tests.robustness.hostile import ATTACKS

pytestmark = pytest.mark.slow

TINY = [
    "algo=protonet", "data=omniglot_small", "way=2", "query=2", "train.way=2", "train.query=2",
    "train.steps=2", "train.tasks_per_step=2", "train.eval_every=2", "eval.episodes=2",
    "eval.val_episodes=2", "device=cpu", "backbone.filters=4", "threads=1",
]  # fmt: skip

WORDS = {
    "test": ["test=."],
    "test in another setting": ["test=.", "experiment=snell2017_omniglot_5way_1shot"],
    "resume": ["resume=."],
    "table": ["table", "."],
    "report": ["report", "."],
    "compare": ["compare", "--table", "--dir", "..", *TINY],
    "predict": ["predict", ".", "--support", "../pictures", "--query", "../pictures"],
    "load": ["load", "."],
}
"""All words that read runs."""


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run, and one that was interrupted after two of three steps."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("received")
        patch.chdir(home)
        assert main([*TINY, "hydra.run.dir=finished"]) == 0
    shutil.copytree(home / "finished", home / "interrupted")
    for name in ("results.json", "episodes.npz"):
        (home / "interrupted" / name).unlink()
    (home / "interrupted/status.json").write_text('{"state": "interrupted", "step": 2}')
    text = (home / "interrupted/config.yaml").read_text()
    assert "  steps: 2\n" in text
    (home / "interrupted/config.yaml").write_text(text.replace("  steps: 2\n", "  steps: 3\n"))
    return home / "finished", home / "interrupted"


def name_in_a_comparison() -> str:
    with composer() as compose:
        return folder_name(compose.jobs(TINY, sweep=True)[0])


@pytest.fixture(scope="module")
def answers(
    received: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Any]:
    """What every word did with every attack, all in one process."""
    home = tmp_path_factory.mktemp("home")
    for kind in ("a", "b"):
        (home / "pictures" / kind).mkdir(parents=True)
        Image.new("L", (28, 28)).save(home / "pictures" / kind / "1.png")
    requests = {}
    own = name_in_a_comparison()
    for name in ("none", *ATTACKS):
        for word, argv in WORDS.items():
            place = home / name / word.replace(" ", "_")
            run, outside = place / own, place / "outside"
            shutil.copytree(received[word == "resume"], run)
            shutil.copytree(home / "pictures", place / "pictures")
            outside.mkdir()
            (outside / "mine").write_text("mine")
            if name != "none":
                ATTACKS[name](run, outside)
            caches = [str(home / "cache"), str(home / "temporary")]
            requests[name, word] = {
                "folder": str(run),
                "argv": argv,
                "allowed": [str(run), *caches],
            }
    (home / "temporary").mkdir()
    environment = {
        **os.environ, "SECRET": "a-secret", "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"), "MPLCONFIGDIR": str(home / "cache/matplotlib"),
        "TMPDIR": str(home / "temporary"), "TORCHINDUCTOR_CACHE_DIR": str(home / "cache/torch"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]),
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.robustness.watched"],
        input=json.dumps(list(requests.values())), env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        key: {**answer, "run": Path(request["folder"]), "place": Path(request["folder"]).parent}
        for (key, request), answer in zip(requests.items(), found, strict=True)
    }


@pytest.mark.parametrize("word", WORDS)
def test_a_run_without_hostile_content_is_read_by_every_word(word: str, answers: Any) -> None:
    answer = answers["none", word]
    differs = word == "test in another setting"
    assert answer["code"] == (2 if differs else 0), answer["text"]
    assert answer["events"] == []


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_content_executes_nothing_under_any_word(name: str, answers: Any) -> None:
    for word in WORDS:
        answer = answers[name, word]
        assert answer["events"] == [], (word, answer["text"])
        assert "Traceback" not in answer["text"], word
        assert "a-secret" not in answer["text"], word
        place = answer["place"]
        assert not list(place.rglob("PWNED")), (word, answer["text"])
        assert (place / "outside/mine").read_text() == "mine", word
        assert {p.name for p in (place / "outside").iterdir()} <= {"mine", "checkpoints"}, word
        for path in answer["run"].rglob("*"):
            if path.is_file() and not path.is_symlink() and ".git" not in path.parts:
                assert b"a-secret" not in path.read_bytes(), (word, path)


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("a_command_as_algorithm", "test", "type trust=pydoc if you trust it"),
        ("a_command_as_optimizer", "predict", "type trust=pydoc if you trust it"),
        ("a_command_as_optimizer", "load", "type trust=pydoc if you trust it"),
        ("a_command_as_tracker", "resume", "type trust=subprocess if you trust it"),
        ("a_tracker_of_another_machine", "resume", "the run would send its results there"),
        ("a_function_of_metarun", "test", "is not a subclass of metarun's OuterOptimizer"),
        ("a_nested_command", "test", "algo.learner=subprocess.Popen"),
        ("modules_in_the_folder", "test", "type trust=evil if you trust it"),
        ("a_measure_of_the_folder", "test", "eval.measures=evil.mine"),
        ("an_interpolation", "test", "'${oc.env:SECRET}' is an interpolation"),
        ("an_interpolation_in_the_words", "resume", "that is stored in a run is not resolved"),
        ("aliases_that_expand", "table", "it has an alias"),
        ("zips_that_expand", "table", "episodes.npz would unpack to 100.0 MB, more than 20 times"),
        ("zips_that_expand", "load", "last.pt would unpack to 100.0 MB, more than 20 times"),
        ("links_to_files_of_the_user", "test", "tests is a link"),
        ("links_to_files_of_the_user", "resume", "lock is a link"),
        ("a_link_in_place_of_the_checkpoints", "resume", "checkpoints is a link"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_cause(
    name: str, word: str, message: str, answers: Any
) -> None:
    lines = [line for line in answers[name, word]["text"].splitlines() if message in line]
    assert len(lines) == 1, answers[name, word]["text"]
    if (name, word) != ("an_interpolation_in_the_words", "resume"):
        assert answers[name, word]["code"] in (1, 2)


def test_a_page_of_a_hostile_run_holds_no_script_of_it(answers: Any) -> None:
    page = (answers["words_for_a_shell_and_a_browser", "report"]["run"] / "report.html").read_text()
    assert "<script>fetch" not in page
    assert "\ntouch PWNED" not in page
