"""What conf/ says of itself, read from its comments."""

from __future__ import annotations

from pathlib import Path

import pytest

from metarun.config.catalogue import Key, conf_dir, header, keys, recipes
from metarun.config.composition import composer

CHOICES = [
    path
    for group in ("algo", "data", "backbone", "optim", "logger")
    for path in sorted((conf_dir() / group).glob("*.yaml"))
]


def test_a_key_has_the_comment_above_it_or_at_the_end_of_its_line(tmp_path: Path) -> None:
    folder = tmp_path / "algo"
    folder.mkdir()
    (folder / "base.yaml").write_text(
        "# Base: what is built on\n# https://example.org\n_target_: a.B\n"
        "# Rate of the\n# steps.\nrate: 0.5\nsizes: [1, 2]  # Widths.\nbare: null\n"
    )
    (folder / "child.yaml").write_text(
        "# Child: builds on base\n\n# Values not set here are those of base.yaml.\n"
        "defaults:\n  - base\n  - _self_\n# Another rate.\nrate: 2.0\n"
    )
    assert header(folder / "base.yaml") == ["Base: what is built on", "https://example.org"]
    assert keys(folder / "base.yaml") == [
        Key("algo.rate", "0.5", "Rate of the steps."),
        Key("algo.sizes", "[1, 2]", "Widths."),
        Key("algo.bare", "null", ""),
    ]
    assert keys(folder / "child.yaml")[0] == Key("algo.rate", "2.0", "Another rate.")
    assert keys(folder / "child.yaml")[1].name == "algo.sizes"


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_key_explains_itself(path: Path) -> None:
    assert all(key.comment for key in keys(path))


@pytest.mark.parametrize(
    "choice",
    [
        "algo/reptile",
        "algo/baselinepp",
        "data/omniglot_small",
        "backbone/mlp_omniglot",
        "optim/sgd",
    ],
)
def test_keys_are_named_as_they_are_typed(choice: str) -> None:
    group, name = choice.split("/")
    with composer() as compose:
        config = compose.job([f"{group}={name}"]).config
    for key in keys(conf_dir() / f"{choice}.yaml"):
        node = config
        for part in key.name.split("."):
            assert part in node, f"{choice}: {key.name}"
            node = node[part]


def test_recipes_are_those_of_a_pair() -> None:
    folders = [conf_dir()]
    assert "omniglot_small" in recipes(folders, "algo", "maml")
    assert "maml" in recipes(folders, "data", "sinusoid")
    assert recipes(folders, "algo", "mam") == []
