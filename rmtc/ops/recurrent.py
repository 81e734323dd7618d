"""Recurrent layers and cells of torch for a group of cells: each position is one batched product of all of them.

Shapes: G cells of the group, B batch, T positions, I width of inputs, H of hidden states, N = k * H of k gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gru_gates(given: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    """Return the next hidden state of `nn.GRUCell`.

    Args:
        given, kept: the linear maps of the input and of the hidden state, (..., 3 * H).
        hidden: the hidden state, (..., H).
    """
    (reset, update, new), (r, z, n) = given.chunk(3, -1), kept.chunk(3, -1)
    new = torch.tanh(new + n * torch.sigmoid(reset + r))
    return new + (hidden - new) * torch.sigmoid(update + z)


def lstm_gates(given: Tensor, kept: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next hidden state and cell state of `nn.LSTMCell`.

    Args:
        given, kept: the linear maps of the input and of the hidden state, (..., 4 * H).
        cell: the cell state, (..., H).
    """
    enter, forget, new, leave = (given + kept).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def tanh_gate(given: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    """Return the next hidden state of `nn.RNNCell`, from the linear maps of its input and of the hidden state."""
    return torch.tanh(given + kept)


def relu_gate(given: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    """Return the next hidden state of `nn.RNNCell` with ``nonlinearity="relu"``; see :func:`tanh_gate`."""
    return torch.relu(given + kept)


def recurrent_layers(
    gates: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    hidden: Tensor,
    weights: Sequence[Tensor],
    layers: int,
    both: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """Return what `nn.GRU` or `nn.RNN` returns without dropout, behind a group axis.

    Args:
        gates: of one position.
        x: (G, T, B, I), or (G, B, T, I) with ``batch_first``.
        hidden: (G, layers * directions, B, H).
        weights: those of each layer and direction: (G, N, I), (G, N, H), and two biases of (G, N) or none.
        layers: number of layers.
        both: whether each layer reads in both directions.
        batch_first: whether the batch comes before positions.

    Returns:
        The outputs, shaped as ``x`` with directions * H in place of I, and the last states, shaped as ``hidden``.
    """
    x = x.transpose(1, 2) if batch_first else x
    directions = 1 + both
    last: list[Tensor] = []  # as Inductor reads it
    each = len(weights) // (layers * directions)
    for layer in range(layers):
        outputs = []
        for number in range(layer * directions, (layer + 1) * directions):
            own, backward = weights[number * each : (number + 1) * each], number % directions == 1
            out = _positions(gates, x, hidden[:, number], own, backward)
            outputs.append(out)
            last.append(out[:, 0 if backward else -1])
        x = torch.cat(outputs, -1) if both else outputs[0]
    return x.transpose(1, 2) if batch_first else x, torch.stack(last, 1)


def _positions(
    gates: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    hidden: Tensor,
    weights: Sequence[Tensor],
    backward: bool,
) -> Tensor:
    """Return the hidden states of a layer in one direction, (G, T, B, H)."""
    of_input, of_hidden, *biases = weights
    first, second = (each.unsqueeze(1) for each in biases) if biases else (None, None)
    given = _mapped(x.flatten(1, 2), of_input, first).unflatten(1, x.shape[1:3])
    found: list[Tensor] = []
    for at in range(x.shape[1])[:: -1 if backward else 1]:
        hidden = gates(given[:, at], _mapped(hidden, of_hidden, second), hidden)
        found.append(hidden)
    return torch.stack(found[::-1] if backward else found, 1)


def _mapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias, x, weight.mT)
