"""Files of weights: formats, prefixes of names, and what does not fit."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from metarun.core.weights import hash_of_file, load_into, match, read_weights


def net(width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))


STATE = {name: torch.full_like(value, 7) for name, value in net().state_dict().items()}


def save(path: Path, content: Any) -> Path:
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"epoch": 3, "optimizer": {}, "model": STATE},
        {"params": {f"encoder.{name}": value for name, value in STATE.items()}},
        {"anything": STATE},
    ],
    ids=["bare", "lightning", "model", "params", "unknown"],
)
def test_a_state_dict_is_found_in_a_checkpoint(content: Any, tmp_path: Path) -> None:
    module = net()
    weights = read_weights("init=a.pth", save(tmp_path / "a.pth", content))
    load_into(module, weights, "init=a.pth", strict=True)
    assert all((value == 7).all() for value in module.state_dict().values())


def test_safetensors_and_torchs_older_format_are_read(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", STATE)
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "old.pth"):
        read = read_weights(name, tmp_path / name)
        assert read.keys() == STATE.keys()
        assert all(read[name].equal(STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "backbone.", "encoder.", "module.encoder_q.", "net.features.body."],
)
@pytest.mark.parametrize("own", ["", "backbone."])
def test_prefixes_on_either_side_are_no_obstacle(prefix: str, own: str) -> None:
    weights = {f"{prefix}{name}": value for name, value in STATE.items()}
    weights |= {"head.weight": torch.zeros(5, 2), f"{prefix}fc.weight": torch.zeros(3, 2)}
    found = match(weights, {f"{own}{name}": value for name, value in STATE.items()})
    assert set(found.fits) == {f"{own}{name}" for name in STATE}
    assert set(found.left_out) == {"head.weight", f"{prefix}fc.weight"}
    assert not found.complaints


def test_a_deeper_network_does_not_fit_although_all_names_are_there() -> None:
    weights = torchvision.models.resnet34(weights=None).state_dict()
    own = torchvision.models.resnet18(weights=None)
    own.fc = nn.Identity()
    with pytest.raises(ValueError, match=r"the network lacks \d+ tensors \(layer1\.2\.conv1"):
        load_into(own, weights, "init=x", strict=True)
    found = load_into(own, weights, "init=x", strict=False)
    assert found.left_out == ["fc.weight", "fc.bias"]
    assert own.layer1[0].conv1.weight.equal(weights["layer1.0.conv1.weight"])


def test_what_does_not_fit_is_named_and_nothing_changes() -> None:
    module = net(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"0\.weight is \(2, 1, 3, 3\) there and \(3, 1, 3, 3\) h"):
        load_into(module, STATE, "init=x", strict=True)
    with pytest.raises(ValueError, match="does not fit"):
        load_into(module, {"0.weight": STATE["0.weight"]}, "init=x", strict=False)
    with pytest.raises(ValueError, match=r"none of its names \(fc\) is one of the network's"):
        load_into(module, {"fc": torch.zeros(1)}, "init=x", strict=False)
    partly = {"0.weight": torch.ones(3, 1, 3, 3), "1.weight": torch.ones(9)}
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
    assert set(load_into(module, partly, "init=x", strict=False).fits) == {"0.weight"}
    assert (module[0].weight == 1).all()


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch RUN",)


def test_files_of_the_wrong_kind_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("a.safetensors"), STATE)
    Path("a.safetensors").rename("a.pth")
    save(Path("b.pt"), STATE)
    Path("b.pt").rename("b.safetensors")
    Path("c.pth").write_text("hello")
    Path("d.onnx").write_bytes(b"x")
    Path("e.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": Evil()}, "f.pth")
    save(Path("g.pth"), {"epoch": 3})
    whole = save(Path("h.pth"), STATE).read_bytes()
    Path("h.pth").write_bytes(whole[: len(whole) // 2])
    whole = save(Path("i.safetensors"), STATE).read_bytes()
    Path("i.safetensors").write_bytes(whole[:-8])
    expected = {
        "a.pth": "by its name it is a file of torch, but its content is one of safetensors",
        "b.safetensors": "by its name it is a file of safetensors, but its content is one of torch",
        "c.pth": "but its content is neither safetensors nor torch",
        "d.onnx": "expected a file *.safetensors or *.pt",
        "e.pth": "holds more than tensors and plain values",
        "f.pth": "holds more than tensors and plain values",
        "g.pth": "it holds no tensors by name",
        "h.pth": "is damaged",
        "i.safetensors": "is damaged",
        "none.pth": "there is no such file",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError) as error:
            read_weights(f"init={name}", Path(name))
        assert message in str(error.value), name
        assert "\n" not in str(error.value)
    assert not Path("RUN").exists()


def test_the_hash_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert hash_of_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")
