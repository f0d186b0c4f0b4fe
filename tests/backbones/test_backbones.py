"""Shapes, parameter counts and refusals of the backbones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.backbones.conv4 import Conv4
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import BatchNorm, InstanceNorm, has_batch_norm
from metarun.backbones.mlp import MLP, Flat
from metarun.backbones.network import Network, set_mixed
from metarun.backbones.resnet12 import ResNet12
from tests.helpers import TINY_BACKBONES


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_the_sinusoid_network_has_the_parameters_of_1_40_40_1() -> None:
    assert count(MLP((1,), 1)) == (40 + 40) + (40 * 40 + 40) + (40 + 1)


def test_flat_is_the_inputs_themselves() -> None:
    images = torch.randn(2, 1, 3, 4)
    assert torch.equal(Flat((1, 3, 4), None)(images), images.reshape(2, 12))
    assert Flat((1, 3, 4), None).feature_dim == 12
    assert Flat((1, 3, 4), 5)(images).shape == (2, 5)


def test_conv4_64_has_the_published_number_of_parameters_and_features() -> None:
    net = Conv4((1, 28, 28), None)
    convolutions = (9 * 64 + 64) + 3 * (9 * 64 * 64 + 64)
    assert count(net) == convolutions + 4 * 2 * 64
    assert net.feature_dim == 64


def test_conv4_features_of_an_84_pixel_photograph_are_800_for_32_filters() -> None:
    assert Conv4((3, 84, 84), 5, filters=32).feature_dim == 800


def test_an_84_pixel_photograph_is_halved_up_to_6_pixels_as_in_reptiles_code() -> None:
    net = Conv4((3, 84, 84), 5, filters=32, downsample="max_pool_ceil")
    assert net.feature_dim == 32 * 6 * 6


def test_rounding_up_pools_an_odd_last_row_and_column_by_itself() -> None:
    net = Conv4((1, 5, 5), None, filters=1, blocks=1, norm="none", downsample="max_pool_ceil")
    with torch.no_grad():
        net.body.convs[0].weight.zero_()[0, 0, 1, 1] = 1.0
        net.body.convs[0].bias.zero_()
    pixels = torch.arange(25.0).view(1, 1, 5, 5)
    assert net(pixels).tolist() == [[6, 8, 9, 16, 18, 19, 21, 23, 24]]


def constants(net: Network) -> set[float]:
    return {part.eps for part in net.modules() if isinstance(part, BatchNorm | InstanceNorm)}


@pytest.mark.parametrize(
    "make",
    [
        partial(Conv4, (1, 16, 16), 2, filters=4),
        partial(Conv4, (1, 16, 16), 2, filters=4, norm="instance"),
        partial(MLP, (1, 16, 16), 2, batch_norm=True),
        partial(ResNet12, (1, 16, 16), 2, widths=[2, 3]),
    ],
)
def test_every_normalization_of_a_network_adds_the_given_constant(make: Any) -> None:
    assert constants(make()) == {1e-5}
    assert constants(make(norm_eps=1e-3)) == {1e-3}
    with pytest.raises(ValueError, match=r"backbone\.norm_eps=0\.0: expected a positive number"):
        make(norm_eps=0.0)


def test_a_block_of_maml_plus_plus_is_leaky_relu_after_batch_norm() -> None:
    net = Conv4((2, 9, 9), None, filters=3, blocks=1, activation="leaky_relu").double()
    x = torch.randn(4, 2, 9, 9).double()
    normed = nn.functional.batch_norm(net.body.convs[0](x), None, None, training=True)
    expected = nn.functional.max_pool2d(torch.where(normed > 0, normed, 0.01 * normed), 2)
    torch.testing.assert_close(net(x), expected.flatten(1))


def test_xavier_uniform_weights_fill_their_range_and_biases_are_zero() -> None:
    net = Conv4((3, 28, 28), 5, filters=16, init="xavier_uniform")
    fans = {"body.convs.0": 9 * (3 + 16), "body.convs.1": 9 * (16 + 16), "head": 16 + 5}
    for name, fan in fans.items():
        layer = net.get_submodule(name)
        assert layer.weight.abs().max() <= (6 / fan) ** 0.5
        assert layer.weight.abs().max() > 0.8 * (6 / fan) ** 0.5
        assert (layer.bias == 0).all()


def test_blocks_of_different_widths_are_counted_by_hand() -> None:
    net = Conv4((1, 48, 48), None, filters=[4, 8, 16], blocks=3, pool="mean")
    convolutions = (9 * 4 + 4) + (9 * 4 * 8 + 8) + (9 * 8 * 16 + 16)
    assert count(net) == convolutions + 2 * (4 + 8 + 16)
    assert net.feature_dim == 16
    assert (
        Conv4((1, 48, 48), None, filters=[4, 8, 16], blocks=3, context_dim=5).body.film_block == 1
    )
    with pytest.raises(ValueError, match=r"one for each"):
        Conv4((1, 48, 48), None, filters=[4, 8])


def test_a_context_costs_columns_of_the_first_layer_or_a_film_layer_and_else_nothing() -> None:
    assert count(MLP((1,), 1, context_dim=5)) == count(MLP((1,), 1)) + 5 * 40
    shape = (3, 84, 84)
    film = (100 + 1) * 2 * 32
    wide = Conv4(shape, 5, filters=32, context_dim=100)
    assert count(wide) == count(Conv4(shape, 5, filters=32)) + film
    assert wide.body.film_block == 2


def test_a_dense_network_at_a_context_of_zero_is_the_one_without() -> None:
    joined, bare = MLP((3,), 2, context_dim=4), MLP((3,), 2)
    state = joined.state_dict()
    state["body.linears.0.weight"] = state["body.linears.0.weight"][:, :3]
    bare.load_state_dict(state)
    x = torch.randn(5, 3)
    torch.testing.assert_close(joined(x), bare(x))
    torch.testing.assert_close(joined(x, ForwardContext(context=torch.zeros(4))), bare(x))
    assert not torch.allclose(joined(x, ForwardContext(context=torch.ones(4))), bare(x))


def test_the_strides_of_blocks_may_be_said_as_in_omls_network() -> None:
    """84 pixels are reduced to 3, as the official code's dense layer of 9 x 256 inputs expects."""
    options = {"filters": 16, "blocks": 6, "strides": [2, 1, 2, 1, 2, 2], "norm": "none"}
    net = Conv4((1, 84, 84), None, padding=0, **options)
    assert net.feature_dim == 3 * 3 * 16
    assert [conv.stride for conv in net.body.convs] == [(s, s) for s in options["strides"]]
    assert net(torch.zeros(2, 1, 84, 84), ForwardContext()).shape == (2, 144)
    for wrong, says in (
        ({"strides": [2, 1]}, r"backbone\.strides=\[2, 1\]: expected 6 positive numbers"),
        ({"padding": -1}, r"backbone\.padding=-1"),
        ({"padding": 0}, "images of 28x28 pixels are too small"),
    ):
        with pytest.raises(ValueError, match=says):
            Conv4((1, 28, 28), None, **{**options, **wrong})


def test_stride_2_rounds_up_and_the_mean_leaves_one_feature_per_filter() -> None:
    assert Conv4((1, 28, 28), 5, downsample="stride").feature_dim == 2 * 2 * 64
    assert Conv4((1, 28, 28), 5, downsample="stride", pool="mean").feature_dim == 64


def test_resnet12_has_its_twelve_convolutions_and_four_shortcuts() -> None:
    net = ResNet12((3, 84, 84), None)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 16
    assert net.feature_dim == 640
    assert count(net) == 12_424_320


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 17, 31)])
def test_any_image_size_and_number_of_channels_will_do(shape: tuple[int, ...]) -> None:
    for net in (Conv4(shape, 7, filters=4), ResNet12(shape, 7, widths=[2, 2, 2, 2])):
        assert net(torch.zeros(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize("name", TINY_BACKBONES)
def test_parameter_names_say_body_or_head(name: str) -> None:
    net = TINY_BACKBONES[name](input_shape=(1, 8, 8), output_dim=3)
    names = [n for n, _ in net.named_parameters()]
    assert {n.split(".")[0] for n in names} == {"body", "head"}
    headless = TINY_BACKBONES[name](input_shape=(1, 8, 8), output_dim=None)
    assert {n.split(".")[0] for n, _ in headless.named_parameters()} == {"body"}


def test_resnet12_makes_noise_only_with_a_key() -> None:
    net = TINY_BACKBONES["resnet12"](input_shape=(1, 8, 8), output_dim=3)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(net(x), net(x))
    assert not torch.equal(net(x), net(x, ForwardContext(noise=torch.tensor(1))))


def test_truncated_normal_weights_are_within_two_deviations_and_biases_zero() -> None:
    net = MLP((1,), 1, init="truncated_normal")
    for name, param in net.named_parameters():
        limit = 0.02 if name.endswith("weight") else 0.0
        assert param.abs().max() <= limit


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Conv4((1,), 1), "needs images"),
        (lambda: Conv4((1, 8, 8), 5), "16 pixels"),
        (lambda: MLP((1,), 1, hidden=[]), "backbone.hidden"),
        (lambda: MLP((1,), 1, batch_norm=True, context_dim=2), "batch_norm=false"),
        (lambda: ResNet12((1, 28, 28), 5, drop_rate=1.0), "drop_rate=1.0"),
    ],
)
def test_a_misfit_is_refused_with_what_would_do(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("make", [Conv4, ResNet12])
def test_a_mixed_network_differs_by_bfloat16_alone_and_learns_in_float32(
    make: type[Network],
) -> None:
    torch.manual_seed(0)
    net = make((1, 16, 16), 3)
    x, y = torch.rand(20, 1, 16, 16), torch.arange(20) % 3

    def answers_and_gradients() -> tuple[Tensor, list[Tensor]]:
        outputs = net(x)
        loss = nn.functional.cross_entropy(outputs, y)
        return outputs, list(torch.autograd.grad(loss, list(net.parameters())))

    exact, gradients = answers_and_gradients()
    assert set_mixed(nn.ModuleList([net])) == 1
    mixed, rounded = answers_and_gradients()
    assert all(tensor.dtype is torch.float32 for tensor in [mixed, *rounded])
    assert not torch.equal(mixed, exact)
    # bfloat16 has 8 significant bits, and a dozen layers lose a few of them.
    torch.testing.assert_close(mixed, exact, rtol=0, atol=0.05 * exact.detach().abs().max().item())
    one, other = (torch.cat([g.flatten() for g in each]) for each in (gradients, rounded))
    assert nn.functional.cosine_similarity(one, other, dim=0) > 0.95


def test_a_mixed_network_computes_under_vmap_what_it_computes_alone() -> None:
    torch.manual_seed(0)
    net = Conv4((1, 16, 16), 3, filters=8)
    set_mixed(net)
    x = torch.rand(2, 6, 1, 16, 16)
    weight = "head.weight"
    own = torch.stack([dict(net.named_parameters())[weight] * scale for scale in (1.0, 2.0)])

    def answers(weights: Tensor, rows: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(net, {weight: weights}, (rows,))
        return outputs

    alone = torch.stack([answers(*pair) for pair in zip(own, x, strict=True)])
    # The same roundings, but sums in another order.
    torch.testing.assert_close(torch.vmap(answers)(own, x), alone, rtol=0, atol=0.02)
    assert not torch.allclose(alone[0], net(x[1]))


def test_a_conv4_without_batch_norm_answers_each_row_alone() -> None:
    x = torch.rand(5, 1, 20, 20)
    for norm, per_block in (("instance", 2), ("none", 0)):
        net = Conv4((1, 20, 20), 3, filters=4, blocks=2, norm=norm)  # type: ignore[arg-type]
        torch.testing.assert_close(net(x)[2:3], net(x[2:3]))
        norms = [name for name, _ in net.named_parameters() if ".norms." in name]
        assert len(norms) == 2 * per_block
        assert not has_batch_norm(net)


@pytest.mark.parametrize("running", [False, True])
def test_pooling_first_is_batch_norm_relu_and_pooling_with_weights_of_either_sign(
    running: bool,
) -> None:
    torch.manual_seed(0)
    net = Conv4((1, 9, 9), 3, filters=4, blocks=2).double()
    layers: list[nn.Module] = []
    for conv, norm in zip(net.body.convs, net.body.norms, strict=True):
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.5, -0.7, -1.2, 0.4]))
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
        theirs = nn.BatchNorm2d(4).double()
        theirs.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
        assert (norm.weight < 0).any()
        assert (norm.weight > 0).any()
        layers += [conv, theirs.train(not running), nn.ReLU(), nn.MaxPool2d(2)]
    reference = nn.Sequential(*layers, nn.Flatten(), net.head)
    x = torch.randn(5, 1, 9, 9, dtype=torch.float64, requires_grad=True)

    def derivatives(outputs: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(outputs.square().sum(), x, create_graph=True)
        return outputs, first, *torch.autograd.grad(first.square().sum(), x)

    ours = derivatives(net(x, ForwardContext(running=running)))
    for mine, theirs_ in zip(ours, derivatives(reference(x)), strict=True):
        torch.testing.assert_close(mine, theirs_, rtol=1e-10, atol=1e-10)


def test_moments_of_a_block_that_pools_first_are_those_of_its_convolution() -> None:
    net = Conv4((1, 8, 8), 3, filters=4, blocks=1)
    with torch.no_grad():
        net.body.norms[0].weight.copy_(torch.tensor([1.0, -1.0, 2.0, -0.5]))
    x = torch.randn(6, 1, 8, 8)
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    net(x, ForwardContext(moments=moments))
    var, mean = torch.var_mean(net.body.convs[0](x), (0, 2, 3))
    torch.testing.assert_close(moments["norms.0"][0], mean)
    torch.testing.assert_close(moments["norms.0"][1], var)
