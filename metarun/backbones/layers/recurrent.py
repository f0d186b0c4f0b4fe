"""Recurrent cells written as matrix products, which `torch.vmap` supports.

Shapes: N rows, H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LSTMCell(nn.Module):
    """LSTM cell with the computation and the parameters of `nn.LSTMCell`.

    Args:
        inputs: Number of input features.
        hidden: Number of hidden units H.
        forget_bias: Constant added to the initial bias of the forget gate. With 1 a new cell
            mostly keeps its state (Jozefowicz et al. 2015), with 0 half of it.
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
        """Return the next (N, H) output and cell.

        Args:
            x: (N, inputs) inputs.
            hidden: (N, H) previous output.
            cell: (N, H) previous cell state.
        """
        gates = x @ self.weight_ih.T + self.bias_ih + hidden @ self.weight_hh.T + self.bias_hh
        enter, forget, candidate, leave = gates.chunk(4, 1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
        return leave.sigmoid() * cell.tanh(), cell
