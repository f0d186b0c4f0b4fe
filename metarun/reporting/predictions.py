"""One self-contained HTML page of predicted images, each with its nearest example."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

import metarun
from metarun.data.storage.image_files import on_paper, open_image, upright

_HERE = Path(__file__).parent
_SIDE = 96
"""Largest side of a picture on the page, in pixels."""


@dataclass(frozen=True)
class Line:
    """A query of the page.

    Attributes:
        path, file: Image of the query, and its name.
        label: Predicted class.
        share: Probability of that class, as it is shown.
        example_path, example: Nearest image of the support, and its name.
    """

    path: Path
    file: str
    label: str
    share: str
    example_path: Path
    example: str

    @property
    def picture(self) -> str:
        """The query, as the address of an image."""
        return _picture(self.path)

    @property
    def example_picture(self) -> str:
        """The example, as the address of an image."""
        return _picture(self.example_path)


def render(title: str, text: str, lines: Sequence[Line]) -> str:
    """Return the page as HTML.

    Args:
        title: First line of the page.
        text: Paragraph below it.
        lines: The queries, in the order shown.
    """
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True)
    return environment.get_template("predictions.html.jinja").render(
        title=title,
        text=text,
        lines=lines,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        version=metarun.__version__,
    )


@cache
def _picture(path: Path) -> str:
    image = on_paper(upright(open_image(path)), "RGB")
    image.thumbnail((_SIDE, _SIDE))
    image.save(file := io.BytesIO(), "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
