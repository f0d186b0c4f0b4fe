"""What conf/ has to choose from, and what its comments say; read, not composed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def conf_dir() -> Path:
    """The folder of YAML files: the repository's where there is one, else the package's."""
    package = Path(__file__).resolve().parents[1]
    repository = package.parent
    if (repository / "pyproject.toml").is_file() and (repository / "conf/config.yaml").is_file():
        return repository / "conf"
    return package / "conf"


GROUPS = {
    "algo": "algorithms",
    "data": "data sets",
    "backbone": "backbones",
    "experiment": "experiments",
    "paper": "tables of papers",
    "logger": "experiment trackers",
}


def entries(folders: Sequence[Path], group: str) -> dict[str, str]:
    """The words of a group in alphabetical order, with one line about each."""
    paths = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    # `for_<data>` is how a data set names its backbone; nobody types it.
    shown = [path for path in paths if not path.stem.startswith("for_")]
    return {path.stem: description(path) for path in sorted(shown, key=lambda path: path.stem)}


def description(path: Path) -> str:
    """The first comment line of a YAML file that is not one of Hydra's headers."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").rstrip()
        if line.strip() and not line.startswith("#"):
            break
    return ""


def method_name(algo: str) -> str:
    """The name and the paper of an algorithm, which open its description."""
    return description(conf_dir() / "algo" / f"{algo}.yaml").partition(":")[0]
