"""Tests of images that are larger than they look."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metarun.data.storage.image_files import open_image


@pytest.mark.parametrize("side", [101, 150])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_an_image_beyond_pillows_limit_is_refused_with_its_name(
    action: Any, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings.simplefilter(action)
    Image.new("L", (side, side)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").size == (side, side)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image \(.*pixels") as error:
        open_image(tmp_path / "x.png")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "x.png").size == (side, side)
