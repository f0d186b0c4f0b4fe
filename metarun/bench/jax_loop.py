"""MAML's training on sinusoids in JAX: one program for many steps, `jit` of `scan` of `vmap`.

This is what a reader of JAX's documentation would write: draws, inner step, gradient and Adam are
compiled together. JAX and optax are imported when a function of this module is called.

Shapes: T tasks, S support rows, Q query rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from metarun.bench.implementations import Step
from metarun.bench.workloads import Workload
from metarun.core.types import TaskBatch


def training(workload: Workload, net: nn.Module) -> Step:
    """Return a call of `workload.updates` training steps, which go on where the last call ended."""
    import jax
    import optax

    adam = optax.adam(1e-3)

    def step(carried: Any, _: None) -> Any:
        weights, moments, key, total = carried
        key, own = jax.random.split(key)
        loss, grads = jax.value_and_grad(_outer_loss(workload))(weights, _draw(workload, own))
        changes, moments = adam.update(grads, moments)
        return (optax.apply_updates(weights, changes), moments, key, total + loss), None

    many = jax.jit(lambda carried: jax.lax.scan(step, carried, length=workload.updates)[0])
    weights = _weights(net)
    state = [(weights, adam.init(weights), jax.random.key(0), jax.numpy.zeros(()))]

    def call() -> None:
        state[0] = many(state[0])
        state[0][-1].block_until_ready()

    return call


def backward(net: nn.Module, workload: Workload, batch: TaskBatch) -> None:
    """Add the gradient of the mean loss over tasks, computed by JAX, to each parameter's `grad`."""
    import jax

    with jax.enable_x64(next(net.parameters()).dtype == torch.float64):
        rows = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
        arrays = tuple(jax.numpy.asarray(tensor.numpy()) for tensor in rows)
        grads = jax.jit(jax.grad(_outer_loss(workload)))(_weights(net), arrays)
        found = [np.array(grad) for pair in grads for grad in pair]
    for parameter, grad in zip(net.parameters(), found, strict=True):
        parameter.grad = torch.from_numpy(grad)


def _weights(net: nn.Module) -> Any:
    """Return the weight and the bias of each dense layer, as torch lays them out."""
    import jax

    arrays = [jax.numpy.asarray(p.detach().cpu().numpy()) for p in net.parameters()]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def _outer_loss(workload: Workload) -> Any:
    """Return the mean query loss over tasks after the inner steps, a function of the weights."""
    import jax

    def outputs(weights: Any, x: Any) -> Any:
        *hidden, (last, bias) = weights
        for weight, shift in hidden:
            x = jax.nn.relu(x @ weight.T + shift)
        return x @ last.T + bias

    def loss(weights: Any, x: Any, y: Any) -> Any:
        return ((outputs(weights, x) - y) ** 2).mean()

    def of_task(weights: Any, rows: Any) -> Any:
        support_x, support_y, query_x, query_y = rows
        for _ in range(workload.steps):
            grads = jax.grad(loss)(weights, support_x, support_y)
            weights = jax.tree.map(lambda w, g: w - workload.inner_lr * g, weights, grads)
        return loss(weights, query_x, query_y)

    return lambda weights, rows: jax.vmap(of_task, (None, 0))(weights, rows).mean()


def _draw(workload: Workload, key: Any) -> Any:
    """Draw the rows of T sinusoids from the ranges of Finn et al. (2017)."""
    import jax

    rows = workload.support_rows + workload.query_rows
    of_amplitude, of_phase, of_x = jax.random.split(key, 3)
    one = (workload.tasks, 1, 1)
    amplitude = jax.random.uniform(of_amplitude, one, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(of_phase, one, maxval=math.pi)
    x = jax.random.uniform(of_x, (workload.tasks, rows, 1), minval=-5.0, maxval=5.0)
    y, cut = amplitude * jax.numpy.sin(x - phase), workload.support_rows
    return x[:, :cut], y[:, :cut], x[:, cut:], y[:, cut:]
