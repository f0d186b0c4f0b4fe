"""Networks from elsewhere by their names: weights, preprocessing, frozen parts, refusals."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from metarun.algorithms.outer_optimizer import update_running_statistics
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.image_input import ImageInput
from metarun.backbones.layers.normalization import has_batch_norm
from metarun.backbones.module import Module
from metarun.backbones.torchvision import Torchvision
from metarun.core.types import BackboneSetup

RUNNING = ForwardContext(running=True)
SHAPE = (3, 40, 40)
STORED = BackboneSetup(fresh=False)


def pictures(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(*(shape or (2, *SHAPE)), generator=draw)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The folder of torch.hub with a file in the place of torchvision's weights of ResNet-18."""
    torch.manual_seed(1)
    net = torchvision.models.resnet18(weights=None)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(OrderedDict(net.state_dict()), tmp_path / "hub/checkpoints" / Path(url).name)
    net.fc = nn.Identity()
    return net.eval()


def test_torchvisions_weights_come_with_their_own_preprocessing(hub: nn.Module) -> None:
    """Features of a normalized image equal torchvision's, with torchvision's transforms."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    pixels = pictures()
    entry = torchvision.models.ResNet18_Weights.DEFAULT
    with torch.no_grad():
        expected = hub(entry.transforms(antialias=True)(pixels))
        net = Torchvision(SHAPE, None, BackboneSetup((mean, std)), weights="DEFAULT")
        rows = transforms.normalize(pixels, mean, std)
        torch.testing.assert_close(net(rows, RUNNING), expected, rtol=1e-4, atol=1e-4)
    assert net.resolved_options["input_size"] == 224
    assert net.resolved_options["mean"] == [0.485, 0.456, 0.406]
    assert net.feature_dim == 512


def test_a_file_of_weights_is_that_of_the_network_and_of_no_other(
    hub: nn.Module, tmp_path: Path
) -> None:
    state = hub.state_dict()
    safetensors.torch.save_file(state, tmp_path / "own.safetensors")
    net = Torchvision(SHAPE, 5, weights=str(tmp_path / "own.safetensors"))
    assert net.body.layer4[1].conv2.weight.equal(state["layer4.1.conv2.weight"])
    with torch.no_grad():
        features = hub(pictures())
        torch.testing.assert_close(net(pictures(), RUNNING), net.head(features))
    with pytest.raises(ValueError, match=r"backbone\.weights=\S+ does not fit the network: layer1"):
        Torchvision(SHAPE, 5, name="resnet50", weights=str(tmp_path / "own.safetensors"))
    with pytest.raises(ValueError, match=r"there is no such file"):
        Torchvision(SHAPE, 5, weights="none.pth")
    with pytest.raises(ValueError, match=r"DEFUALT: expected null, IMAGENET1K_V1, DEFAULT, or a"):
        Torchvision(SHAPE, 5, weights="DEFUALT")


def test_a_stored_run_reads_and_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("metarun.backbones.torchvision.read_weights", refuse)
    monkeypatch.setattr("metarun.backbones.torchvision._fetched", refuse)
    Torchvision(SHAPE, 5, STORED, weights="gone.pth")
    assert Torchvision(SHAPE, 5, STORED, weights="DEFAULT").front.shape == (3, 224, 224)
    seen: list[dict[str, Any]] = []

    def make(**options: Any) -> nn.Module:
        seen.append(options)
        return nn.Conv2d(3, 2, 3)

    Module(SHAPE, 2, STORED, target=make, options={"pretrained": True, "weights": "x"})
    assert {"pretrained": False, "weights": None}.items() <= seen[-1].items()


def test_a_download_that_fails_is_one_line_with_the_place_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(ValueError) as error:
        Torchvision(SHAPE, 5, weights="DEFAULT")
    text = str(error.value)
    assert "\n" not in text
    assert "cannot be had (<urlopen error no network>)" in text
    assert f"put that file at {tmp_path}/hub/checkpoints/resnet18-f37072fd.pth" in text


@pytest.mark.parametrize(
    ("name", "features"),
    [("alexnet", 4096), ("squeezenet1_1", 512), ("mobilenet_v3_small", 1024)],
)
def test_the_classifier_is_left_out_whatever_it_is_called(name: str, features: int) -> None:
    net = Torchvision((1, 64, 64), None, name=name)
    assert net.feature_dim == features
    assert net(pictures(2, 1, 64, 64), RUNNING).shape == (2, features)


def test_a_misspelled_name_gets_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name=resnet81: .* did you mean resnet18\?"):
        Torchvision(SHAPE, 5, name="resnet81")
    with pytest.raises(ValueError, match=r"no such network for images: expected one such as alex"):
        Torchvision(SHAPE, 5, name="zzz")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop"), [(20, 1.0), (64, 1.0), (32, 0.875), (28, 0.5)])
def test_images_are_resized_and_cut_as_by_torchvision(
    interpolation: Any, size: int, crop: float
) -> None:
    x = pictures()
    front = ImageInput(SHAPE, size=size, crop=crop, interpolation=interpolation)
    whole = transforms.resize(x, [round(size / crop)] * 2, InterpolationMode(interpolation))
    torch.testing.assert_close(
        front(x), transforms.center_crop(whole, [size, size]), rtol=1e-4, atol=1e-5
    )
    assert not front.state_dict()


def test_one_channel_becomes_three_each_with_its_own_moments() -> None:
    own = ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    front = ImageInput((1, 4, 4), channels=3, data=((0.5,), (0.25,)), own=own)
    x = pictures(2, 1, 4, 4)
    expected = torch.cat([(x - m) / s for m, s in zip(*own, strict=True)], 1)
    torch.testing.assert_close(front((x - 0.5) / 0.25), expected)
    with pytest.raises(ValueError, match="takes images of 3 channels, these have 2"):
        ImageInput((2, 4, 4), channels=3)
    with pytest.raises(
        ValueError, match=r"takes images, and this data set has inputs of shape \(5"
    ):
        ImageInput((5,), size=8)


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Dropout(0.5))
        self.act = nn.ReLU()
        self.tail = nn.Sequential(nn.Conv2d(width, 2, 3), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.act(self.stem(x))).mean((2, 3))


def learning(net: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("freeze", "left"),
    [
        (None, {"body.stem.0", "body.stem.1", "body.tail.0", "body.tail.1", "head"}),
        (1, {"body.tail.0", "body.tail.1", "head"}),
        (2, {"head"}),
        ("body", {"head"}),
        ("all", set()),
    ],
)
def test_what_is_frozen_neither_learns_nor_counts_nor_drops(freeze: Any, left: set[str]) -> None:
    torch.manual_seed(0)
    net = Module(SHAPE, 3, target=Net, freeze=freeze)
    assert learning(net) == left
    assert has_batch_norm(net) == any(".1" in name for name in left)
    if freeze not in (1, None):
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        noisy = net(pictures(), ForwardContext(moments=moments, noise=torch.tensor(3)))
        assert not moments
        # As torch's own network in evaluation.
        own = Net()
        own.load_state_dict(net.body.state_dict())
        torch.testing.assert_close(noisy, net.head(own.eval()(pictures())))
        update_running_statistics(net, {})


def test_a_module_takes_its_size_and_moments_from_the_settings() -> None:
    net = Module(SHAPE, None, target=Net, input_size=20, mean=[0.5], std=[2.0])
    x = pictures()
    resized = transforms.resize(x, [20, 20])
    expected = net.body((resized - 0.5) / 2.0, RUNNING)
    torch.testing.assert_close(net(x, RUNNING), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None}, r"backbone\.target=null: expected the class or function"),
        ({"target": dict}, r"backbone\.target=builtins\.dict returns a dict: expected a torch"),
        ({"options": {"widht": 3}}, r"unexpected keyword argument 'widht'"),
        ({"freeze": 3}, r"backbone\.freeze=3: expected all, body, or 1 to 2: .* stem, tail"),
        ({"without": "fc"}, r"backbone\.without=fc: the module has no such part; its parts are"),
        ({"mean": [0.5]}, r"backbone\.mean and backbone\.std go together"),
        ({"mean": [0.5], "std": [0.0]}, r"backbone\.std=0\.0: expected a positive number"),
        ({"input_size": 0}, r"backbone\.input_size=0: expected 1 to 4096"),
        ({"input_size": 3}, r"in a pass of inputs of shape \[3, 3, 3\]"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Module(SHAPE, 2, **{"target": Net, **options})
    assert "\n" not in str(error.value)
