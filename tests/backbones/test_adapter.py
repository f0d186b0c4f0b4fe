"""Any module as a backbone: against torch's own layers in naive loops, and the refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.metric.protonet import ProtoNet
from metarun.algorithms.optimization.maml import MAML
from metarun.algorithms.outer_optimizer import update_running_statistics
from metarun.backbones.adapter import AnyBackbone, adapt
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.dropout import makes_noise
from metarun.backbones.layers.normalization import has_batch_norm, norm_parameters
from metarun.backbones.network import Network
from metarun.core.types import TaskBatch, TaskSpec
from metarun.execution.engine import Engine
from metarun.execution.vmap_check import reason_for_loop
from tests.helpers import image_batch, image_spec, make, moved

SHAPE = (1, 8, 8)


class Features(nn.Module):
    """A network as anybody writes it: batch norm, ReLU in place, maps as its output."""

    def __init__(self, width: int = 4, drop: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, stride=2)
        self.norm = nn.BatchNorm2d(width, **options)
        self.relu = nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.Sequential(nn.Dropout(drop), nn.BatchNorm1d(9 * width, eps=0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        mixed = self.mix(x)
        mixed += x
        normed: Tensor = self.norms(mixed.flatten(1))
        return normed.tanh().reshape(len(x), -1, 3, 3)


class WithContext(nn.Module):
    """A network with its own head whose `forward` takes the context, but not its layers."""

    def __init__(self, input_shape: tuple[int, ...], output_dim: int) -> None:
        super().__init__()
        assert input_shape == SHAPE
        self.body = Features()
        self.head = nn.Linear(36, output_dim)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        assert isinstance(ctx, ForwardContext)
        answers: Tensor = self.head(self.body(x).flatten(1))
        return answers


def any_backbone(
    kind: Callable[..., Any], without: str | None = None, **options: Any
) -> AnyBackbone:
    return AnyBackbone(f"my_net.{kind.__name__}", partial(kind, **options), without)


def of_torch(net: nn.Module, kind: type[nn.Module], *given: Any) -> nn.Module:
    """Return a module of torch's own layers with the weights and statistics of an adapted one."""
    theirs = kind(*given).double()
    theirs.load_state_dict(net.state_dict())
    return theirs


def naive_maml_gradients(
    answers: Callable[[dict[str, Tensor], Tensor], Tensor],
    params: dict[str, Tensor],
    batch: TaskBatch,
    inner_lr: float,
) -> dict[str, Tensor]:
    """Return the gradient of the mean query loss after one inner step, by autograd in a loop."""
    losses = []
    for i in range(batch.num_tasks):
        loss = nn.functional.cross_entropy(answers(params, batch.support_x[i]), batch.support_y[i])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        after = {n: p - inner_lr * g for (n, p), g in zip(params.items(), grads, strict=True)}
        losses.append(
            nn.functional.cross_entropy(answers(after, batch.query_x[i]), batch.query_y[i])
        )
    found = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
    return dict(zip(params, found, strict=True))


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
@pytest.mark.parametrize("kind", [Features, WithContext])
def test_meta_gradients_of_a_strangers_network_are_those_of_torchs_layers_in_a_loop(
    kind: type[nn.Module], engine: str
) -> None:
    spec, batch = image_spec(), image_batch(image_spec(), tasks=3)
    learner = make(MAML, spec, any_backbone(kind), engine=engine, inner_lr=0.5)
    if kind is Features:
        body = of_torch(learner.net.body, Features)
        theirs: nn.Module = nn.Sequential()
        theirs.body, theirs.head = body, copy.deepcopy(learner.net.head)

        def answers(params: dict[str, Tensor], x: Tensor) -> Tensor:
            own = {n.removeprefix("body."): p for n, p in params.items() if n.startswith("body.")}
            features = functional_call(body, own, (x,)).flatten(1)
            return nn.functional.linear(features, params["head.weight"], params["head.bias"])
    else:
        theirs = of_torch(learner.net, WithContext, SHAPE, 3)

        def answers(params: dict[str, Tensor], x: Tensor) -> Tensor:
            outputs: Tensor = functional_call(theirs, params, (x, ForwardContext()))
            return outputs

    params = dict(theirs.named_parameters())
    assert {f"net.{name}" for name in params} == {n for n, _ in learner.named_parameters()}
    expected = naive_maml_gradients(answers, params, batch, 0.5)
    found = moved(learner, batch)
    for name, grad in expected.items():
        torch.testing.assert_close(found[f"net.{name}"], grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_a_replay_of_a_strangers_network_is_the_network_bit_for_bit(engine: str) -> None:
    spec, batch = image_spec(), image_batch(image_spec(), tasks=3)
    results = []
    for graph in ("none", "replay"):
        learner = make(MAML, spec, any_backbone(Features))
        learner.engine = Engine(engine, graph=graph)  # type: ignore[arg-type]
        # Replays begin with the third call.
        moves = [moved(learner, batch, step) for step in range(4)]
        results.append((moves, {n: b.clone() for n, b in learner.named_buffers()}))
        assert bool(learner.engine.graphs.replays) == (graph == "replay")
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.3, "eps": 0.01}, {"momentum": None}, {"affine": False}],
    ids=str,
)
def test_running_statistics_move_and_are_used_as_in_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = Features(**options).double()
    ours = adapt(copy.deepcopy(theirs))
    assert has_batch_norm(ours)
    for step in range(3):
        x = torch.randn(5, *SHAPE, dtype=torch.float64) + step
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        found = ours(x, ForwardContext(moments=moments))
        torch.testing.assert_close(found, theirs(x).flatten(1))
        update_running_statistics(
            ours, {name: (m[None], v[None]) for name, (m, v) in moments.items()}
        )
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours(x, ForwardContext(running=True)), theirs.eval()(x).flatten(1))
    names = {n for n, _ in ours.named_parameters() if "norm" in n}
    assert norm_parameters(ours) == names
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_batch_norm_without_running_statistics_takes_those_of_the_batch_as_in_torch() -> None:
    theirs = Features(track_running_stats=False).double()
    ours = adapt(copy.deepcopy(theirs))
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    expected = theirs.eval()(x).flatten(1)
    torch.testing.assert_close(ours(x, ForwardContext(running=True)), expected)
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    ours(x, ForwardContext(moments=moments))
    assert list(moments) == ["norms.1"]
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_sequences_and_several_processes_are_normalized_as_in_torch() -> None:
    x = torch.randn(4, 3, 7)
    for layer in (nn.BatchNorm1d(3), nn.SyncBatchNorm(3)):
        ours = adapt(nn.Sequential(layer, nn.Flatten()))
        expected = nn.functional.batch_norm(x, None, None, training=True).flatten(1)
        torch.testing.assert_close(ours(x), expected)


class Masks(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.drop = layer
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        # The same layer twice, as is usual.
        dropped: Tensor = torch.stack([self.drop(x), self.drop(x)], 1)
        return dropped * self.weight


@pytest.mark.parametrize(("kind", "dims"), [(nn.Dropout, 4), (nn.Dropout1d, 2), (nn.Dropout2d, 2)])
def test_dropout_drops_the_asked_share_by_masks_of_the_key_alone(
    kind: type[nn.Dropout], dims: int
) -> None:
    net = adapt(Masks(kind(0.25)))
    assert makes_noise(net)
    x = torch.ones(*((40, 50, 3, 3) if dims != 2 or kind is nn.Dropout2d else (40, 50, 9)))

    def masks(key: int) -> Tensor:
        outputs: Tensor = net(x, ForwardContext(noise=torch.tensor(key)))
        return outputs.reshape(40, 2, 50, *x.shape[2:])

    first = masks(3)
    assert torch.equal(first, masks(3))
    assert not torch.equal(first, masks(4))
    assert not torch.equal(first[:, 0], first[:, 1])
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 0.2 < (first == 0).double().mean() < 0.3
    if dims == 2:
        assert (first == first[:, :, :, :1].expand_as(first)).all()
    assert torch.equal(net(x), torch.stack([x, x], 1).flatten(1))
    assert not makes_noise(adapt(Masks(nn.Dropout(0.0))))


def test_dropping_everything_gives_zeros_and_no_gradient() -> None:
    net = adapt(Masks(nn.Dropout(1.0)))
    outputs = net(torch.ones(2, 3), ForwardContext(noise=torch.tensor(1)))
    assert (outputs == 0).all()
    assert torch.autograd.grad(outputs.sum(), net.weight)[0] == 0


@pytest.mark.parametrize("engine", ["vmap", "threads"])
def test_masks_are_those_of_the_loop_in_every_engine(engine: str) -> None:
    spec, batch = image_spec(), image_batch(image_spec(), tasks=4)
    first, second = (
        moved(make(MAML, spec, any_backbone(Features, drop=0.4), engine=kind), batch)
        for kind in (engine, "loop")
    )
    bare = moved(make(MAML, spec, any_backbone(Features), engine="loop"), batch)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(first["net.body.conv.weight"], bare["net.body.conv.weight"])


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        if len(x) == 3:
            raise RuntimeError("three rows")
        return normed


def test_nothing_of_a_context_is_left_after_a_pass_even_one_that_fails() -> None:
    net = adapt(Fails())
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    with pytest.raises(RuntimeError, match="three rows"):
        net(torch.randn(3, 3), ForwardContext(running=True, moments=moments))
    assert net._running.ctx == ForwardContext()
    x = torch.randn(4, 3)
    torch.testing.assert_close(net(x), nn.functional.batch_norm(x, None, None, training=True))
    assert not moments
    # A copy has a pass of its own.
    other = copy.deepcopy(net)
    assert other._running is other.norm._running
    assert other._running is not net._running


# Tests for `torch.vmap`.


class Layer(nn.Module):
    """Two dense layers with any function between them."""

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.second(torch.tanh(self.layer(self.first(x))))
        return outputs


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


def batch_statistics(x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, torch.ones(6).to(x), training=True)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Identity(), None),
        (nn.BatchNorm1d(6), None),
        (nn.Dropout(0.5), None),
        (nn.GroupNorm(2, 6), None),
        (lambda x: x if x.sum() > 0 else -x, "torch.vmap cannot run it (vmap: It looks like"),
        (partial(nn.functional.dropout, p=0.5), "torch.vmap cannot run it (vmap: called random"),
        (OwnNorm(6), "torch.vmap cannot run it ("),
        # Silently wrong second derivatives in torch 2.14.
        (nn.LayerNorm(6), "its results under torch.vmap differ by"),
    ],
)
def test_a_network_that_vmap_gets_wrong_is_found(layer: Any, reason: str | None) -> None:
    torch.manual_seed(0)
    net = any_backbone(Layer, layer=layer)(input_shape=(4,), output_dim=3)
    before, draws = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = reason_for_loop(net, (4,))
    assert found is None if reason is None else found is not None and found.startswith(reason)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_network_with_frozen_parameters_alone_is_tested_by_its_outputs() -> None:
    net = any_backbone(Layer, layer=nn.Identity())(input_shape=(4,), output_dim=3)
    assert reason_for_loop(net.requires_grad_(False), (4,)) is None


# Construction.


class OwnHead(nn.Module):
    def __init__(self, output_dim: int | None, width: int = 5) -> None:
        super().__init__()
        self.body = nn.Linear(64, width)
        self.head = nn.Identity() if output_dim is None else nn.Linear(width, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x.flatten(1)))
        return outputs


def passes_on(**options: Any) -> nn.Module:
    return OwnHead(**options)


def takes_nothing(width: int = 4, **options: Any) -> nn.Module:
    return Features(width, **options)


def swallows(**options: Any) -> nn.Module:
    assert set(options) == {"input_shape", "output_dim"}
    return Features()


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.LazyBatchNorm1d())

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layers(x)
        return outputs


@pytest.mark.parametrize(
    ("make_net", "features", "own_head"),
    [
        (any_backbone(Features), 36, False),
        (any_backbone(takes_nothing, width=2), 18, False),
        (any_backbone(swallows), 36, False),
        (any_backbone(Lazy), 5, False),
        (any_backbone(OwnHead), 5, True),
        (any_backbone(passes_on), 5, True),
        (any_backbone(Features, without="norms"), 36, False),
        (any_backbone(Features, without="norms.0"), 36, False),
        # The user's own value of the keyword.
        (any_backbone(OwnHead, output_dim=7), 7, False),
    ],
)
def test_a_module_that_is_not_told_its_outputs_computes_features(
    make_net: AnyBackbone, features: int, own_head: bool
) -> None:
    net = make_net(input_shape=SHAPE, output_dim=3)
    assert net(torch.randn(2, *SHAPE), ForwardContext()).shape == (2, 3)
    assert isinstance(net, Network) is not own_head
    assert {n.split(".")[0] for n, _ in net.named_parameters()} == {"body", "head"}
    headless = make_net(input_shape=SHAPE, output_dim=None)
    assert headless.feature_dim == features
    assert headless(torch.randn(2, *SHAPE), ForwardContext()).shape == (2, features)


def test_a_part_that_is_left_out_passes_its_inputs() -> None:
    net = any_backbone(Features, without="norms.1")(input_shape=SHAPE, output_dim=None)
    assert [name for name, _ in net.named_parameters() if "norms" in name] == []
    for name in ("norm.3", ""):
        with pytest.raises(ValueError, match=r"no such part; its parts are conv, norm, relu, mix"):
            any_backbone(Features, without=name)(input_shape=SHAPE, output_dim=None)


def test_the_first_pass_leaves_statistics_and_mode_as_they_were() -> None:
    net = any_backbone(Features)(input_shape=SHAPE, output_dim=3)
    assert all(part.training for part in net.modules())
    for name, buffer in net.named_buffers():
        start = 1.0 if name.endswith("running_var") else 0.0
        assert (buffer == start).all()


def needs(depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Flatten() for _ in range(depth)))


def no_module() -> dict[str, int]:
    return {}


class LikeMobileNet(nn.Module):
    """A network with a part `features`, whose constructor takes any keyword."""

    def __init__(self, **options: Any) -> None:  # noqa: ARG002
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.rest = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rest(self.features(x))
        return out


def test_features_of_a_network_are_its_outputs_also_if_a_part_has_this_name() -> None:
    learner = make(ProtoNet, image_spec(), any_backbone(LikeMobileNet))
    x = torch.randn(6, *image_spec().input_shape, dtype=learner.dtype)
    params, ctx = dict(learner.net.named_parameters()), ForwardContext()
    found = learner.features(learner.net, params, x, ctx)
    assert found.shape == (6, 3)
    torch.testing.assert_close(found, learner.net(x, ctx).flatten(1))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Wide(nn.Module):
    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.size = output_dim

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize(
    ("make_net", "words"),
    [
        (any_backbone(needs), "missing 1 required positional argument: 'depth': expected a torch"),
        (any_backbone(Features, depth=3), "unexpected keyword argument 'depth'"),
        (any_backbone(no_module), "returns a dict: expected a torch.nn.Module with forward(x)"),
        (any_backbone(Pair), "its output for 2 inputs is tuple: expected a tensor"),
        (any_backbone(Wide), "has 64 outputs where output_dim=3: leave output_dim out"),
        (
            any_backbone(nn.Linear, in_features=7, out_features=2),
            "in a pass of inputs of shape [1, 8, 8]",
        ),
    ],
)
def test_a_misfit_is_one_line_that_names_the_class(make_net: AnyBackbone, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_net(input_shape=SHAPE, output_dim=3)
    message = str(caught.value)
    assert message.startswith("backbone._target_=my_net.")
    assert words in message
    assert "\n" not in message


# torchvision.

VISION: dict[str, dict[str, Any]] = {
    "resnet18": {"num_classes": 16},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    # Its classifier starts at zero.
    "vit_b_16": {"image_size": 32, "without": "heads"},
}


def of_torchvision(name: str) -> AnyBackbone:
    models = pytest.importorskip("torchvision.models")
    return any_backbone(getattr(models, name), weights=None, **VISION[name])


def color_batch(tasks: int = 2) -> TaskBatch:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tasks, 8, 3, 32, 32, generator=draw, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1]).expand(tasks, -1)
    return TaskBatch(x[:, :4], y, x[:, 4:], y)


def vision_moves(
    kind: type[ProtoNet | MAML], name: str, engine: str, batch: TaskBatch
) -> dict[str, Tensor]:
    spec = TaskSpec("classification", (3, 32, 32), 2, 2)
    found = moved(make(kind, spec, of_torchvision(name), engine=engine), batch)
    assert any((move != 0).any() for move in found.values())
    return found


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Tensor:
    norms = [
        torch.stack([part.square().sum() for part in parts]).sum().sqrt()
        for parts in ([found[n] - expected[n] for n in expected], expected.values())
    ]
    return norms[0] / norms[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", VISION)
def test_networks_of_torchvision_train_under_protonet_as_in_the_loop(name: str) -> None:
    batch = color_batch()
    expected = vision_moves(ProtoNet, name, "loop", batch)
    assert relative_difference(vision_moves(ProtoNet, name, "vmap", batch), expected) < 1e-9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_resnet18_trains_under_second_order_maml_as_in_the_loop() -> None:
    batch = color_batch()
    expected = vision_moves(MAML, "resnet18", "loop", batch)
    assert relative_difference(vision_moves(MAML, "resnet18", "vmap", batch), expected) < 1e-9
