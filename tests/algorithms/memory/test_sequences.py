"""Tests of MANN and SNAIL against step-by-step equations, and of which labels an output uses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.memory.mann import MANN, LeastRecentlyUsed, TuringMachine
from metarun.algorithms.memory.snail import SNAIL
from metarun.backbones.layers.recurrent import LSTMCell
from metarun.config.build import Experiment
from metarun.config.build import build_experiment as build_experiment
from metarun.core.types import Progress, TaskBatch
from metarun.evaluation.details import by_presentation
from metarun.evaluation.episodes import evaluate
from tests.helpers import composed

SMALL = [
    "data=omniglot_small", "backbone.filters=4", "way=3", "shot=4", "query=2",
    "precision=float64", "device=cpu", "engine=loop", "~recipe",
]  # fmt: skip
MEMORY = ["algo.controller=6", "algo.locations=5", "algo.cells=3", "algo.heads=2"]
ACCESS = [f"algo.access={access}" for access in ("lrua", "ntm", "none")]
LEARNERS = [["algo=snail", "algo.filters=5"], *(["algo=mann", *MEMORY, word] for word in ACCESS)]


def build(*words: str) -> Experiment:
    return build_experiment(composed(*SMALL, *words))


@pytest.fixture(params=LEARNERS, ids=lambda words: "-".join(words[::5]).replace("algo=", ""))
def made(request: Any) -> Experiment:
    torch.manual_seed(0)
    made = build(*request.param)
    # One update, so that no weight has its initial value.
    made.algorithm.update(made.source.batch("train", 0, 2), Progress(0, 10))
    return made


# Which labels a prediction may depend on.


@pytest.mark.parametrize("first", [0, 3, 7])
def test_labels_from_a_row_on_change_no_answer_up_to_that_row(made: Experiment, first: int) -> None:
    batch = made.source.batch("test", 0, 3)
    changed = batch.support_y.clone()
    changed[:, first:] = (changed[:, first:] + 1) % 3
    one, other = (
        made.algorithm.predict(batch.support_x, labels, batch.query_x)
        for labels in (batch.support_y, changed)
    )
    assert one.sequence is not None
    assert other.sequence is not None
    assert torch.equal(one.sequence[:, : first + 1], other.sequence[:, : first + 1])
    later = (one.sequence - other.sequence)[:, first + 1 :].abs().amax((1, 2))
    assert (later > 0).all()
    assert (one.outputs != other.outputs).any()


def test_rows_to_come_change_no_answer(made: Experiment) -> None:
    batch = made.source.batch("test", 0, 2)
    x, y = batch.support_x, batch.support_y
    whole = made.algorithm.predict(x, y, batch.query_x).sequence
    start = made.algorithm.predict(x[:, :5], y[:, :5], batch.query_x).sequence
    assert whole is not None
    assert start is not None
    torch.testing.assert_close(start, whole[:, :5], rtol=1e-10, atol=1e-12)


def test_a_query_is_the_row_that_follows_the_support(made: Experiment) -> None:
    batch = made.source.batch("test", 0, 2)
    x, y = batch.support_x, batch.support_y
    whole = made.algorithm.predict(x, y, batch.query_x).sequence
    asked = made.algorithm.predict(x[:, :7], y[:, :7], x[:, 7:9]).outputs
    assert whole is not None
    torch.testing.assert_close(asked[:, 0], whole[:, 7], rtol=1e-10, atol=1e-12)


def test_the_loss_is_of_the_answers_that_loss_of_names() -> None:
    for words in (["algo=snail", "algo.filters=5"], ["algo=mann", *MEMORY]):
        losses = {}
        for loss_of in ("sequence", "query"):
            torch.manual_seed(0)
            made = build(*words, f"algo.loss_of={loss_of}", "bn=running")
            batch = made.source.batch("train", 0, 2)
            net = made.algorithm.net
            how = made.algorithm.joint_context(batch.support_x.shape[1])  # type: ignore[operator]
            outputs, targets = zip(
                *(
                    made.algorithm.outputs_and_targets(  # type: ignore[operator]
                        net, dict(net.named_parameters()), *rows, 3, how
                    )
                    for rows in zip(
                        batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True
                    )
                ),
                strict=True,
            )
            losses[loss_of] = [len(one) for one in outputs]
            answer = made.algorithm.eval().predict(batch.support_x, batch.support_y, batch.query_x)
            assert answer.sequence is not None
            expected = answer.outputs
            if loss_of == "sequence":
                expected = torch.cat([answer.sequence, answer.outputs], 1)
            torch.testing.assert_close(torch.stack(outputs).detach(), expected)
            assert torch.equal(torch.stack(targets)[:, -6:], batch.query_y)
        assert losses == {"sequence": [18, 18], "query": [6, 6]}


@pytest.mark.parametrize("words", [["algo=mann", *MEMORY], ["algo=snail", "algo.filters=5"]])
def test_a_curriculum_learns_from_the_first_rows_and_later_from_all(words: list[str]) -> None:
    grown, config = (
        build(*words, "optim.method=sgd", *more)
        for more in (["algo.curriculum=[5,2,6]"], ["algo.curriculum=null"])
    )
    lengths = [grown.algorithm.rows_at(step, 12) for step in range(8)]
    assert lengths == [5, 5, 5, 6, 8, 10, 12, 12]
    config.algorithm.load_state_dict(grown.algorithm.state_dict())
    for step in range(8):
        batch, rows = grown.source.batch("train", 2 * step, 2), lengths[step]
        asked = batch.query_y.shape[1] if rows == 12 else 0
        cut = TaskBatch(
            batch.support_x[:, :rows],
            batch.support_y[:, :rows],
            batch.query_x[:, :asked],
            batch.query_y[:, :asked],
        )
        grown.algorithm.update(batch, Progress(step, 8))
        config.algorithm.update(cut, Progress(step, 8))
    one, other = (dict(a.algorithm.named_parameters()) for a in (grown, config))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_learning_from_queries_alone_needs_some() -> None:
    made = build("algo=snail", "algo.loss_of=query", "train.query=0")
    with pytest.raises(ValueError, match=r"use train\.query=1"):
        made.algorithm.update(made.source.batch("train", 0, 2), Progress(0, 10))


def test_tasks_run_together_unless_another_engine_is_asked_for() -> None:
    kinds = [build("algo=snail", f"engine={e}").run_info["engine"] for e in ("auto", "threads")]
    assert kinds == ["vmap", "threads"]


# Accuracy by presentation.


def test_presentations_are_counted_by_hand() -> None:
    labels = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    right = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 0]])
    outputs = nn.functional.one_hot(torch.where(right == 1, labels, 1 - labels), 2).double()
    # In the first task, first presentations are rows 0 and 1, second 2 and 3, third 4 and 5.
    expected = torch.tensor([[0.5, 0.5, 1.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    assert torch.equal(by_presentation(outputs, labels), expected)


def test_an_evaluation_has_them_for_every_episode() -> None:
    made = build("algo=mann", *MEMORY)
    measured = evaluate(made.algorithm, made.source, "test", 5, 2)
    assert measured.arrays["presentations"].shape == (5, 4)
    batch = made.source.batch("test", 0, 5)
    answer = made.algorithm.eval().predict(batch.support_x, batch.support_y, batch.query_x)
    assert answer.sequence is not None
    right = (answer.sequence.argmax(2) == batch.support_y).double().mean(1)
    np.testing.assert_allclose(measured.arrays["presentations"].mean(1), right.numpy())
    config = build("algo=protonet")
    assert "presentations" not in evaluate(config.algorithm, config.source, "test", 2, 2).arrays


# MANN.


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def softmax(x: Any) -> Any:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def softplus(x: Any) -> Any:
    return np.log1p(np.exp(x))


def linear(layer: nn.Linear, x: Any) -> Any:
    assert layer.bias is not None
    return layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()


def alike(key: Any, place: Any) -> Any:
    return key @ place / math.sqrt(key @ key * (place @ place) + 1e-12)


@pytest.mark.parametrize("gate", ["learned", "emitted"])
@pytest.mark.parametrize("written", ["keys", "vectors"])
@pytest.mark.parametrize("strength", ["none", "emitted"])
def test_least_recently_used_access_is_its_equations_step_by_step(
    gate: str, written: str, strength: str
) -> None:
    torch.manual_seed(0)
    heads, places, cells, steps = 2, 5, 3, 9
    access = LeastRecentlyUsed(4, places, cells, heads, 0.9, gate, written, strength).double()
    if access.alpha is not None:
        access.alpha.data.fill_(0.3)
    hidden = torch.randn(steps, 4, dtype=torch.float64)
    state = access.begin(hidden)
    memory = np.full((places, cells), 1e-6)
    reading = np.zeros((heads, places))
    usage = np.zeros(places)
    reading[:, 0] = usage[0] = 1.0
    for h in hidden:
        state = access(h[None], state)
        keys = np.tanh(linear(access.key, h.numpy())).reshape(heads, cells)
        vectors = keys
        if access.vector is not None:
            vectors = np.tanh(linear(access.vector, h.numpy())).reshape(heads, cells)
        gates = [0.3] * heads if access.gate is None else linear(access.gate, h.numpy())
        least = np.argsort(usage, kind="stable")[:heads]
        writing = np.zeros((heads, places))
        for head in range(heads):
            writing[head] = sigmoid(gates[head]) * reading[head]
            writing[head, least[head]] += 1.0 - sigmoid(gates[head])
        memory[least[0]] = 0.0
        for head in range(heads):
            memory += np.outer(writing[head], vectors[head])
        strengths = np.ones(heads)
        if access.strength is not None:
            strengths = np.log1p(np.exp(linear(access.strength, h.numpy())))
        for head in range(heads):
            similar = np.array([alike(keys[head], place) for place in memory])
            reading[head] = softmax(strengths[head] * similar)
        usage = 0.9 * usage + reading.sum(0) + writing.sum(0)
        read = (reading @ memory).ravel()
        for name, value in {"memory": memory, "usage": usage, "reading": reading}.items():
            np.testing.assert_allclose(state[name][0].detach().numpy(), value, atol=1e-12)
        np.testing.assert_allclose(state["read"][0].detach().numpy(), read, atol=1e-12)


def test_access_of_a_turing_machine_is_its_equations_step_by_step() -> None:
    torch.manual_seed(0)
    heads, places, cells, steps = 2, 5, 3, 6
    access = TuringMachine(4, places, cells, heads).double()
    hidden = 2.0 * torch.randn(steps, 4, dtype=torch.float64)
    state = access.begin(hidden)
    memory = np.full((places, cells), 1e-6)
    focus = np.zeros((heads + 1, places))
    focus[:, 0] = 1.0

    def focused(where: Any, before: Any) -> Any:
        key, (beta, g, *shift, gamma) = np.tanh(where[:cells]), where[cells:]
        content = softmax(softplus(beta) * np.array([alike(key, place) for place in memory]))
        gated = sigmoid(g) * content + (1.0 - sigmoid(g)) * before
        moves = softmax(np.array(shift))
        moved = np.zeros(places)
        for place in range(places):
            for move, share in zip((-1, 0, 1), moves, strict=True):
                moved[place] += share * gated[(place - move) % places]
        sharp = moved ** (1.0 + softplus(gamma))
        return sharp / sharp.sum()

    for h in hidden:
        state = access(h[None], state)
        where = linear(access.where, h.numpy()).reshape(heads + 1, cells + 6)
        what = linear(access.what, h.numpy())
        focus[heads] = focused(where[heads], focus[heads])
        memory *= 1.0 - np.outer(focus[heads], sigmoid(what[:cells]))
        memory += np.outer(focus[heads], np.tanh(what[cells:]))
        for head in range(heads):
            focus[head] = focused(where[head], focus[head])
        np.testing.assert_allclose(state["memory"][0].detach().numpy(), memory, atol=1e-10)
        np.testing.assert_allclose(state["focus"][0].detach().numpy(), focus, atol=1e-10)
        read = (focus[:heads] @ memory).ravel()
        np.testing.assert_allclose(state["read"][0].detach().numpy(), read, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_without_memory_it_is_torchs_lstm_with_labels_one_step_late(scale: float) -> None:
    words = ["algo.access=none", "algo.controller=6", f"algo.label_scale={scale}"]
    made = build("algo=mann", *words)
    algorithm = made.algorithm.eval()
    assert isinstance(algorithm, MANN)
    batch = made.source.batch("test", 0, 1)
    reader: Any = algorithm.net.reader
    lstm = nn.LSTM(reader.lstm.weight_ih.shape[1], 6).double()
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(lstm, f"{name}_l0").data.copy_(getattr(reader.lstm, name).data)
    rows = torch.cat([batch.support_x[0], batch.query_x[0, :1]])
    features = algorithm.net.features(rows, algorithm.joint_context(len(rows)))  # type: ignore[operator]
    labels = scale * nn.functional.one_hot(batch.support_y[0], 3).double()
    late = torch.cat([torch.zeros(1, 3, dtype=torch.float64), labels])
    outputs = reader.answer(lstm(torch.cat([features, late], 1))[0]).detach()
    answer = algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    assert answer.sequence is not None
    torch.testing.assert_close(answer.sequence[0], outputs[:-1])
    torch.testing.assert_close(answer.outputs[0, 0], outputs[-1])


def test_a_bias_of_the_forget_gate_is_added_to_where_it_would_start() -> None:
    torch.manual_seed(3)
    config = LSTMCell(4, 5)
    torch.manual_seed(3)
    biased = LSTMCell(4, 5, forget_bias=1.0)
    more = torch.tensor([0.0] * 5 + [1.0] * 5 + [0.0] * 10)
    assert torch.equal(biased.bias_ih, config.bias_ih + more)
    assert torch.equal(biased.bias_hh, config.bias_hh)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["algo=mann", "algo.access=all"], "algo.access=all: expected lrua, ntm or none"),
        (["algo=mann", "algo.heads=0"], "algo.heads=0: expected 1 or more"),
        (["algo=mann", "algo.locations=3"], "algo.heads=4: expected at most algo.locations=3"),
        (["algo=mann", "algo.usage_decay=2"], "algo.usage_decay=2.0: expected 0 to 1"),
        (["algo=mann", "algo.curriculum=[0,1,2]"], "algo.curriculum=[0, 1, 2]: expected [rows, "),
        (["algo=snail", "algo.curriculum=[5,3,2]"], "rows 1 or more and 0 <= from <= until"),
        (["algo=mann", "algo.curriculum=[5,2,3]", "algo.loss_of=query"], "no queries for the loss"),
        (["algo=mann", "algo.forget_bias=inf"], "algo.forget_bias=inf: expected a finite number"),
        (["algo=mann", "algo.curriculum=5"], "algo.curriculum=5: expected a list of 3"),
        (["algo=mann", "algo.label_scale=0"], "algo.label_scale=0.0: expected a positive number"),
        (["algo=snail", "algo.filters=0"], "algo.filters=0: expected 1 or more"),
        (["algo=snail", "algo.length=1"], "algo.length=1: expected 2 or more"),
        (["algo=snail", "algo.loss_of=rows"], "algo.loss_of=rows: expected sequence or query"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], part: str) -> None:
    with pytest.raises(ValueError, match="algo") as error:
        build(*words)
    assert part in str(error.value)


# SNAIL.


def plain_snail(reader: Any, rows: Tensor) -> Tensor:
    """Return the paper's network's output for the last of rows (S, C), with torch convolutions."""
    x = rows
    for layer in reader.layers:
        if hasattr(layer, "taps"):
            channels, filters, gap = x.shape[1], layer.taps.out_features // 2, layer.dilation
            conv = nn.Conv1d(channels, 2 * filters, 2, dilation=gap).double()
            conv.weight.data[:, :, 0] = layer.taps.weight[:, :channels]
            conv.weight.data[:, :, 1] = layer.taps.weight[:, channels:]
            conv.bias.data.copy_(layer.taps.bias)  # type: ignore[union-attr]
            both = conv(nn.functional.pad(x.T[None], (gap, 0)))[0].T
            x = torch.cat([x, both[:, :filters].tanh() * both[:, filters:].sigmoid()], 1)
        else:
            read = nn.functional.scaled_dot_product_attention(
                layer.query(x)[None], layer.key(x)[None], layer.value(x)[None], is_causal=True
            )
            x = torch.cat([x, read[0]], 1)
    return reader.answer(x)[-1]  # type: ignore[no-any-return]


def test_every_answer_is_that_of_the_papers_network_to_a_sequence_that_ends_there() -> None:
    torch.manual_seed(0)
    made = build("algo=snail", "algo.filters=5")
    algorithm = made.algorithm.eval()
    assert isinstance(algorithm, SNAIL)
    batch = made.source.batch("test", 0, 1)
    rows = torch.cat([batch.support_x[0], batch.query_x[0]])
    features = algorithm.net.features(rows, algorithm.joint_context(len(rows)))  # type: ignore[operator]
    labels = nn.functional.one_hot(batch.support_y[0], 3).double()
    answer = algorithm.predict(batch.support_x, batch.support_y, batch.query_x)
    assert answer.sequence is not None
    for row in range(len(rows)):
        before = min(row, len(labels))
        x = torch.cat([features[:before], features[row : row + 1]])
        y = torch.cat([labels[:before], torch.zeros(1, 3, dtype=torch.float64)])
        expected = plain_snail(algorithm.net.reader, torch.cat([x, y], 1)).detach()
        mine = answer.sequence[0, row] if row < len(labels) else answer.outputs[0, row - before]
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)


def test_a_test_with_other_shots_is_of_the_network_that_was_trained() -> None:
    trained, other = (build("algo=snail", "algo.filters=2", f"train.shot={n}") for n in (1, 4))
    state = trained.algorithm.state_dict()
    with pytest.raises((RuntimeError, ValueError)):
        other.algorithm.load_state_dict(state)
    other.algorithm.match_shapes(state)
    other.algorithm.load_state_dict(state)
    batch = trained.source.batch("test", 0, 2)
    one, two = (
        made.algorithm.eval().predict(batch.support_x, batch.support_y, batch.query_x).outputs
        for made in (trained, other)
    )
    assert torch.equal(one, two)


def test_its_depth_follows_the_length_of_a_training_sequence() -> None:
    def dilations(*words: str) -> list[int]:
        net: Any = build("algo=snail", "algo.filters=2", *words).algorithm.net
        return [layer.dilation for layer in net.reader.layers if hasattr(layer, "dilation")]

    assert dilations() == [2, 4, 8, 16] * 2  # 3 x 4 rows and one: log2(13) = 3.7
    assert dilations("train.shot=1") == [2, 4] * 2
    assert dilations("algo.length=32") == [2, 4, 8, 16, 32] * 2
