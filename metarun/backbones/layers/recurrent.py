"""Recurrent cells as plain products, which `torch.vmap` bears.

Shapes: N rows, H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LSTMCell(nn.Module):
    """The step of `nn.LSTMCell`; the same parameters.

    Args:
        inputs: Features of an input.
        hidden: H, hidden units.
        forget_bias: Added to the bias of the forget gate at the start: with 1 a cell keeps at
            first what it has (Jozefowicz et al. 2015), with 0 half of it.
    """

    def __init__(self, inputs: int, hidden: int, forget_bias: float = 0.0) -> None:
        super().__init__()
        bound = hidden**-0.5
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, inputs).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden).uniform_(-bound, bound))
        self.bias_ih = nn.Parameter(torch.empty(4 * hidden).uniform_(-bound, bound))
        self.bias_hh = nn.Parameter(torch.empty(4 * hidden).uniform_(-bound, bound))
        with torch.no_grad():
            self.bias_ih[hidden : 2 * hidden] += forget_bias

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """The next (N, H) output and cell from (N, inputs), (N, H) and (N, H)."""
        gates = x @ self.weight_ih.T + self.bias_ih + hidden @ self.weight_hh.T + self.bias_hh
        enter, forget, candidate, leave = gates.chunk(4, 1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
        return leave.sigmoid() * cell.tanh(), cell
