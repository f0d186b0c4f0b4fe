"""Test of a network whose layers are not ours: whether `torch.vmap` computes it correctly.

Shapes: T tasks, S support rows, N inputs.
"""

from __future__ import annotations

import copy
import textwrap
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metarun.backbones.layers.context import ForwardContext
from metarun.core.errors import one_line
from metarun.execution.engine import Engine, Kind, Params

_TASKS, _ROWS = 2, 3

# Length of the inner step. Gradients of untrained networks have any size, and after a long step
# the meta-gradient would amplify rounding errors.
_STEP = 0.01

# Largest relative difference of equal results in float64. Some networks amplify rounding errors;
# theirs may differ by several times what inputs changed by the last bit do to the loop's.
_TOLERANCE, _LAST_BIT, _AMPLIFIED = 1e-9, 1e-15, 10.0


def reason_for_loop(
    net: nn.Module, input_shape: tuple[int, ...], *, adapts: bool = True
) -> str | None:
    """Return why a network has to run in a loop over tasks; None if `torch.vmap` is correct.

    Compares the meta-gradient of MAML and predictions on two tasks of six random inputs, in
    float64. Neither the network nor torch's generator changes. A network that the loop cannot
    differentiate twice is tested for plain gradients.

    Args:
        net: Network that maps (N, *input_shape) and a `ForwardContext` to (N, F).
        input_shape: Shape of one input.
        adapts: Whether tasks adapt the parameters; otherwise plain gradients are tested.
    """
    draw = torch.Generator().manual_seed(0)
    shape = (_TASKS, 2 * _ROWS, *input_shape)
    rows = torch.randn(shape, generator=draw, dtype=torch.float64), torch.arange(_TASKS)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = partial(_results, _meta_loss if adapts else _plain_loss, net)
        try:
            expected = results(rows, "loop")
        except Exception:  # Any layer may lack a second derivative.
            results = partial(_results, _plain_loss, net)
            expected = results(rows, "loop")
        try:
            found = results(rows, "vmap")
        # Whatever fails under vmap may work without it.
        except Exception as error:
            return f"torch.vmap cannot run it ({textwrap.shorten(one_line(error), 120)})"
        if (difference := _difference(found, expected)) <= _TOLERANCE:
            return None
        noise = torch.randn(shape, generator=draw, dtype=torch.float64)
        nearly = rows[0] * (1.0 + _LAST_BIT * noise)
        amplified = _difference(results((nearly, rows[1]), "loop"), expected)
    if difference <= _AMPLIFIED * amplified:
        return None
    return f"its results under torch.vmap differ by {difference:.1g} of their size"


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _results(
    task: Callable[..., Any], net: nn.Module, rows: tuple[Tensor, Tensor], kind: Kind
) -> Tensor:
    """Return the gradient of a loss over tasks, in training mode, and the outputs in evaluation."""
    # The trials may change what the network holds besides its parameters.
    net = copy.deepcopy(net).cpu().double().train()
    params: Params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    engine = Engine(kind, graph="none")
    grads, losses = engine.gradients(task, net, params, rows) if params else ({}, rows[0])
    outputs = engine.map(_outputs, net.eval(), params, rows)
    return torch.cat([part.flatten() for part in (*grads.values(), losses, outputs)])


def _loss(net: nn.Module, params: Params, x: Tensor, ctx: ForwardContext) -> Tensor:
    outputs: Tensor = torch.func.functional_call(net, params, (x, ctx))
    return (outputs - 1.0).square().mean()


def _meta_loss(net: nn.Module, params: Params, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss after one step on the first rows, as in MAML."""
    ctx = ForwardContext(noise=noise, double_backward=True)
    grads = torch.func.grad(lambda p: _loss(net, p, x[:_ROWS], ctx))(params)
    length = torch.stack([grad.detach().square().sum() for grad in grads.values()]).sum().sqrt()
    adapted = {n: param - _STEP / length * grads[n] for n, param in params.items()}
    return _plain_loss(net, adapted, x[_ROWS:], noise)


def _plain_loss(net: nn.Module, params: Params, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    loss = _loss(net, params, x, ForwardContext(noise=noise))
    return loss, loss


def _outputs(net: nn.Module, params: Params, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG001
    outputs: Tensor = torch.func.functional_call(net, params, (x, ForwardContext(running=True)))
    return outputs
