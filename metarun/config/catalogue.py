"""Names and descriptions of the files in conf/, read from the files without composing them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def conf_dir() -> Path:
    """Return the folder of YAML files: the repository's if there is one, else the package's."""
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
    """Return the names in a group, in alphabetical order, each with its description."""
    paths = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    # A data set selects its backbone through `for_<data>`; users do not type it.
    shown = [path for path in paths if not path.stem.startswith("for_")]
    return {path.stem: description(path) for path in sorted(shown, key=lambda path: path.stem)}


def description(path: Path) -> str:
    """Return the first comment line of a YAML file that is not a header for Hydra."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").rstrip()
        if line.strip() and not line.startswith("#"):
            break
    return ""


def method_name(algo: str) -> str:
    """Return the name and the paper of an algorithm: the start of its description."""
    return description(conf_dir() / "algo" / f"{algo}.yaml").partition(":")[0]
