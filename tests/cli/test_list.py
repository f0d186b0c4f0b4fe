"""`metarun list GROUP NAME`: one choice with its keys, as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Command


def test_a_choice_is_shown_with_its_paper_its_keys_its_recipes_and_a_command(
    metarun: Command,
) -> None:
    answer = metarun("list", "algo", "anil")
    assert answer.code == 0, answer.err
    assert "ANIL (Raghu 2020)" in answer.out
    assert "https://arxiv.org/abs/1909.09157" in answer.out
    # Its own key, and one of what it builds on.
    assert " algo.adapt = head\n" in answer.out
    assert " algo.inner_lr = 0.01\n" in answer.out
    assert "recipes: linear, omniglot, omniglot_small, sinusoid" in answer.out
    assert answer.out.rstrip().endswith("try: metarun algo=anil data=omniglot_small")
    assert all(len(line) <= 80 for line in answer.out.splitlines())


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("data", "sinusoid"), "data.amplitude = [0.1, 5.0]"),
        (("backbone", "conv4"), "backbone.filters = "),
        (("optim", "sgd"), "optim.method = sgd"),
        (("logger", "wandb"), "logger.wandb.project = metarun"),
        (("experiment", "quick_start"), "try: metarun experiment=quick_start"),
        (("paper", "finn2017_omniglot"), "try: metarun paper=finn2017_omniglot"),
    ],
)
def test_every_group_has_choices_to_show(
    words: tuple[str, str], shown: str, metarun: Command
) -> None:
    answer = metarun("list", *words)
    assert answer.code == 0, answer.err
    assert shown in answer.out


def test_an_unknown_choice_is_one_line_with_the_nearest(metarun: Command) -> None:
    answer = metarun("list", "algo", "malm")
    assert answer.code == 2
    assert answer.err == "error: list algo malm: there is no algo=malm: did you mean maml?\n"


def test_the_command_to_try_can_be_composed(metarun: Command, tmp_path: Path) -> None:
    for words in (("algo", "r2d2"), ("algo", "oml"), ("data", "stream_sinusoid")):
        line = metarun("list", *words).out.rstrip().splitlines()[-1]
        typed = line.removeprefix("try: metarun ").split()
        assert metarun(*typed, "--cfg", "job").code == 0
    assert list(tmp_path.iterdir()) == []
