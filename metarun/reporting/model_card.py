"""The model card beside an exported file: Markdown that says what it is and how to use it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metarun.core.streams import printable
from metarun.core.types import Record

_LOADED = {
    "safetensors": """from safetensors.torch import load_file

weights = load_file("{file}")  # names and shapes of the encoder's parameters""",
    "torch": """import torch  # alone

program = torch.export.load("{file}").module()
{outputs} = program(inputs)""",
    "onnx": """import onnxruntime  # alone, with numpy

session = onnxruntime.InferenceSession("{file}")
({outputs},) = session.run(None, {{"inputs": inputs}})""",
}
_PHOTOGRAPH = """import numpy as np
from PIL import Image, ImageOps


def prepared(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("{mode}")
    image = {resized}
    return np.asarray(image, dtype=np.float32){order} / 255"""
_DRAWING = """import numpy as np
from PIL import Image


def prepared(path):  # dark ink on light paper
    image = Image.open(path).convert("{mode}"{dither})
    image = image.resize(({side}, {side}), Image.Resampling.{filter})
    return 1 - np.asarray(image, dtype=np.float32)[None]{scale}"""


def model_card(
    *,
    file: str,
    kind: str,
    outputs: str,
    shape: Sequence[int],
    batch: bool,
    difference: float,
    versions: Mapping[str, str],
    config: Record,
    overrides: Sequence[str],
    results: Record | None,
    data: Record | None,
    classes: Sequence[str],
    support: int,
) -> str:
    """Return the text of the card.

    Args:
        file: Name of the exported file.
        kind: Its format.
        outputs: What it computes: `features`, `probabilities` or `values`.
        shape: Shape of one input.
        batch: Whether it takes any number of rows.
        difference: Largest difference to metarun's answers.
        versions: Versions of the packages that have written it.
        config: Configuration of the run.
        overrides: What was typed to train it.
        results: Results of the run; None if it is not finished.
        data: The run's record of its data, if any.
        classes: Classes of the support set, in the order of the outputs.
        support: Number of support rows; 0 for an encoder.
    """
    names = config["names"]
    what = "encoder" if not support else "predictor" if outputs == "values" else "classifier"
    rows = "N" if batch else "1"
    inputs = ", ".join(map(str, (rows, *shape)))
    parts = [
        f"# {what.capitalize()} of {names['algo']} on {names['data']}",
        f"`{file}` maps inputs ({inputs}) to {outputs}."
        + (f" It was adapted to {support} examples" if support else "")
        + (f" of {len(classes)} classes." if classes else "." if support else "")
        + f" Its answers equal metarun's to {max(difference, 1e-9):.0e}.",
    ]
    if classes:
        listed = "\n".join(f"{i}. `{printable(name)}`" for i, name in enumerate(classes))
        parts += ["Columns of the output, counted from 0:", listed]
    parts += ["## Result", _result(results), "## Data", _data(names["data"], data)]
    parts += ["## Recipe", _recipe(config, overrides, results)]
    parts += ["## How to load", _loading(file, kind, outputs, shape, data), "## License"]
    parts += [
        "Not stated: it is for those who trained the model to choose. The terms of the data apply"
        f"{_began_with(config, results)}. metarun itself is under the MIT license.",
        f"Written by {', '.join(f'{name} {v}' for name, v in versions.items())}.",
    ]
    return "\n\n".join(parts) + "\n"


def _began_with(config: Record, results: Record | None) -> str:
    """Return what else has terms: the weights that the run began with."""
    init = (results or {}).get("init") or {}
    weights = config["backbone"].get("weights")
    named = [f"`{text}`" for text in (init.get("path"), weights) if text]
    return f", and those of the weights that it began with ({', '.join(named)})" if named else ""


def _result(results: Record | None) -> str:
    if results is None:
        return "The run is not finished: there is no figure yet."
    test = results["test"]
    percent = results["metric"] == "accuracy"
    scale, unit = (100.0, " %") if percent else (1.0, "")
    size = f"{results['way']}-way {results['shot']}-shot" if percent else f"{results['shot']} rows"
    return (
        f"{results['metric']} {scale * test['mean']:.4g} ± {scale * test['ci95']:.2g}{unit} on new "
        f"tasks ({size}; mean and 95 % interval over {test['episodes']} test episodes, batch norm: "
        f"{results['bn_statistics']})."
    )


def _data(name: str, data: Record | None) -> str:
    if data is None:
        return f"`data={name}`."
    found = [f"`data={name}`, {data['kind']}, fingerprint `{data['fingerprint']}`."]
    if data.get("classes"):
        counts = {split: len(own) for split, own in data["classes"].items()}
        found.append(f"Classes: {', '.join(f'{n} {split}' for split, n in counts.items())}.")
    return " ".join(found)


def _recipe(config: Record, overrides: Sequence[str], results: Record | None) -> str:
    steps = config["train"]["steps"] if results is None else results["steps"]
    typed = " ".join(overrides) or "experiment=quick_start"
    return (
        f"`metarun {typed}`: {steps} steps of {config['train']['tasks_per_step']} tasks, seed "
        f"{config['seed']}, backbone {config['names']['backbone']}."
    )


def _loading(file: str, kind: str, outputs: str, shape: Sequence[int], data: Record | None) -> str:
    code = [_LOADED[kind].format(file=file, outputs=outputs)]
    preparation = (data or {}).get("preparation")
    if isinstance(preparation, dict) and preparation["kind"] == "table":
        says = "\n".join(
            ["Inputs are rows of these features:", "", *_columns(preparation["inputs"])]
        )
    elif isinstance(preparation, dict):
        code.append(_preparing(preparation, shape[-1]))
        says = (
            "Inputs are float images in [0, 1], of shape " + json.dumps(list(shape)) + "; what the "
            "network needs beyond that, such as normalization, is part of the file."
        )
        if kind == "safetensors":
            says = (
                f"The network's inputs are images in [0, 1], normalized by mean "
                f"{preparation['mean'] or 0} and standard deviation {preparation['std'] or 1}. Its "
                f"settings are in the metadata of the file; `metarun init={file}` starts from it."
            )
    else:
        says = f"Inputs are rows of shape {json.dumps(list(shape))}, as in the data set."
    return "\n\n".join(["```python\n" + "\n\n\n".join(code) + "\n```", says])


def _preparing(preparation: Mapping[str, Any], side: int) -> str:
    """Return code that makes an input of an image file."""
    if preparation["kind"] == "photograph":
        gray = bool(preparation["grayscale"])
        size = f"({side}, {side}), Image.Resampling.LANCZOS)"
        return _PHOTOGRAPH.format(
            mode="L" if gray else "RGB",
            resized=f"ImageOps.fit(image, {size}"
            if preparation["crop"]
            else f"image.resize({size}",
            order="[None]" if gray else ".transpose(2, 0, 1)",
        )
    gray = preparation["resize"] == "antialias"
    return _DRAWING.format(
        mode="L" if gray else "1",
        dither="" if gray else ", dither=Image.Dither.NONE",
        side=side,
        filter="LANCZOS" if gray else "NEAREST",
        scale=" / 255" if gray else "",
    )


def _columns(inputs: Sequence[Record]) -> Iterator[str]:
    """Yield how each column of a table becomes features."""
    for one in inputs:
        name = printable(one["name"])
        if "categories" in one:
            values = ", ".join(printable(value) or "(missing)" for value in one["categories"])
            rest = ", and one for all others" if one["others"] else ""
            yield f"- `{name}`: a 1 for its category and 0 for the rest, of {values}{rest}"
        else:
            yield (
                f"- `{name}`: (x - {one['mean']:.9g}) / {one['std']:.9g}; a missing x is "
                f"{one['median']:.9g}"
            )
