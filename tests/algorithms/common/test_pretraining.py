"""Tests of supervised pre-training against a plain torch loop, and of its heads by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.baselines.baseline import Baseline
from metarun.algorithms.common.pretraining import Head
from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.core.types import Progress
from metarun.training.state import load_parameters
from tests.helpers import TINY_BACKBONES, image_spec, make, moved
from tests.helpers import labeled_batch as batch_of
from tests.helpers import labeled_spec as spec_of

CONV = TINY_BACKBONES["conv4 max-pool"]


class Classifier(nn.Module):
    """The tiny max-pool Conv4 of the helpers in torch's own layers, with the same parameters."""

    def __init__(self, algorithm: Baseline) -> None:
        super().__init__()
        body: Any = algorithm.net.body
        blocks: list[nn.Module] = []
        for conv, norm in zip(body.convs, body.norms, strict=True):
            channels = conv.weight.shape[1]
            ours = [nn.Conv2d(channels, 3, 3, padding=1).double(), nn.BatchNorm2d(3).double()]
            ours[0].load_state_dict(conv.state_dict())
            ours[1].load_state_dict(norm.state_dict(), strict=False)
            blocks += [*ours, nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(12, 7).double()
        self.head.load_state_dict(algorithm.classifier.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.body(x))
        return answer


@pytest.mark.parametrize("engine", ["loop", "vmap", "threads"])
def test_it_is_an_ordinary_torch_loop_over_all_classes(engine: str) -> None:
    optim = partial(OuterOptimizer, method="sgd", lr=0.2, momentum=0.9)
    algorithm = make(Baseline, spec_of(), CONV, engine=engine, optim=optim)
    model = Classifier(algorithm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(5):
        batch = batch_of(tasks=4, seed=step)
        images, labels = [], []
        for task in range(4):
            for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
                images += list(x[task])
                labels += [int(batch.class_ids[task, label]) for label in y[task]]
        scores, target = model(torch.stack(images)), torch.tensor(labels)
        loss = nn.functional.cross_entropy(scores, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics = algorithm.update(batch, Progress(step, 5))
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-9, atol=1e-9)
        right = (scores.argmax(1) == target).double().mean()
        torch.testing.assert_close(metrics["accuracy"], right)
    ours = Classifier(algorithm).state_dict()
    for name, value in model.state_dict().items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(value, ours[name], rtol=1e-9, atol=1e-9)


def test_running_statistics_are_those_of_the_one_pass_over_all_rows() -> None:
    algorithm = make(Baseline, spec_of(), CONV)
    batch = batch_of()
    rows = torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1)
    first = algorithm.net.body.convs[0](rows).transpose(0, 1).flatten(1).detach()
    algorithm.update(batch, Progress(0, 1))
    norm = algorithm.net.body.norms[0]
    torch.testing.assert_close(norm.running_mean, 0.1 * first.mean(1))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * first.var(1))


def test_a_batch_is_the_same_mini_batch_however_it_is_cut_into_tasks() -> None:
    spec, batch = spec_of(), batch_of(tasks=1)
    split = replace(
        batch, support_x=torch.cat([batch.support_x, batch.query_x], 1),
        support_y=torch.cat([batch.support_y, batch.query_y], 1),
        query_x=batch.query_x[:, :0], query_y=batch.query_y[:, :0],
    )  # fmt: skip
    one, other = (moved(make(Baseline, spec, CONV), cut) for cut in (batch, split))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value)


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_the_engines_agree(backbone: str, head: str) -> None:
    made = [
        make(Baseline, spec_of(), TINY_BACKBONES[backbone], engine=engine, head=head)
        for engine in ("loop", "vmap", "threads")
    ]
    batch = batch_of()
    expected, *others = [moved(algorithm, batch) for algorithm in made]
    for gradient in others:
        for name, value in expected.items():
            torch.testing.assert_close(gradient[name], value, rtol=1e-10, atol=1e-10)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    expected, *answers = [algorithm.predict(*rows).outputs for algorithm in made]
    for outputs in answers:
        torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)


def test_the_cosine_head_is_the_weight_normalized_one_of_the_code() -> None:
    layer = nn.Linear(6, 4, bias=False).double()
    normal = nn.utils.parametrizations.weight_norm(layer, dim=0)
    length, direction = (p.detach() for p in normal.parameters())
    length = length * torch.tensor([[1.0], [0.5], [2.0], [3.0]])
    with torch.no_grad():
        normal.parametrizations.weight.original0.copy_(length)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = 2.0 * normal(x / (x.norm(dim=1, keepdim=True) + 1e-5)).detach()
    scores = Head("cosine").scores({"direction": direction, "length": length}, x)
    torch.testing.assert_close(scores, expected)


def test_the_cosine_head_begins_at_the_scaled_length_times_the_cosine() -> None:
    head = Head("cosine", 5.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    weights = head.start(3, 6, 4, x)
    cosine = nn.functional.cosine_similarity(x[:, None], weights["direction"][None], dim=-1)
    expected = 5.0 * cosine * weights["direction"].norm(dim=1)
    torch.testing.assert_close(head.scores(weights, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("outputs", "scale"), [(5, 2.0), (200, 2.0), (201, 10.0)])
def test_the_scale_of_a_cosine_is_ten_beyond_200_classes(outputs: int, scale: float) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    weights = Head("cosine").start(0, 6, outputs, x)
    given = Head("cosine", scale).scores(weights, x)
    assert torch.equal(Head("cosine").scores(weights, x), given)


def test_heads_begin_as_linear_layers_do() -> None:
    weights = Head().start(0, 16, 2000, torch.zeros((), dtype=torch.float64))
    for values in weights.values():
        assert values.abs().max() <= 0.25
        assert float(values.std()) == pytest.approx(0.25 / 3**0.5, rel=0.03)
    assert not torch.equal(weights["weight"], Head().start(1, 16, 2000, values)["weight"])


def test_data_that_do_not_count_their_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TaskSpec\.num_train_classes"):
        make(Baseline, image_spec(), CONV)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"head": "cosine", "scale": 0.0}, "algo.scale=0.0")],
)
def test_options_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(Baseline, spec_of(), CONV, **options)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_what_was_learned_on_other_data_with_more_classes_can_be_tested(
    head: str, tmp_path: Path
) -> None:
    batch = batch_of()
    trained = make(Baseline, spec_of(), CONV, head=head)
    trained.update(batch, Progress(0, 1))
    other = make(Baseline, replace(spec_of(), num_train_classes=4), CONV, head=head)
    checkpoint = {"algo": "baseline", "state": trained.state_dict()}
    load_parameters(other, checkpoint, {"algo": "baseline"}, tmp_path)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    assert torch.equal(other.predict(*rows).outputs, trained.predict(*rows).outputs)


def test_a_body_of_another_shape_is_still_refused(tmp_path: Path) -> None:
    trained = make(Baseline, spec_of(), CONV)
    other = make(Baseline, spec_of(), TINY_BACKBONES["conv4 stride"])
    checkpoint = {"algo": "baseline", "state": trained.state_dict()}
    with pytest.raises(ValueError, match=r"classifier\.weight is"):
        load_parameters(other, checkpoint, {"algo": "baseline"}, tmp_path)
