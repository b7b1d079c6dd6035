"""Recurrent layers and cells: their gates stand in one weight, which is cut gate by gate."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
CELLS = {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}


class Recurrent(NamedTuple):
    """The sizes of a recurrent layer or cell.

    Attributes:
        gates: how many blocks of ``hidden`` rows each weight consists of.
        inputs: width of what comes in.
        hidden: width of the state.
        directions: 2 where states of both directions stand side by side in the output.
    """

    gates: int
    inputs: int
    hidden: int
    directions: int

    def resized(
        self, module: nn.Module, inputs: int, hidden: int
    ) -> list[tuple[str, dict[int, int], float]]:
        """The new sizes of each parameter, and the ratio of old to new fan-in.

        What comes out of one layer goes into the next one, and the state into both weights.
        """
        found = []
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            sizes, before, now = {0: self.gates * hidden}, self.hidden, hidden
            if key.startswith("weight_ih"):
                first = key.removesuffix("_reverse") in ("weight_ih", "weight_ih_l0")
                before = parameter.shape[1]
                sizes[1] = now = inputs if first else hidden * self.directions
            elif key.startswith("weight_hh"):
                sizes[1] = hidden
            found.append((key, sizes, before / now))
        return found


def recurrent_of(module: nn.Module) -> Recurrent | None:
    """The sizes of a recurrent layer of torch; None of others, and of one that projects states."""
    if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return None
    layer: Any = module
    if getattr(layer, "proj_size", 0):
        return None
    of_state = next(p for n, p in module.named_parameters() if n.startswith("weight_hh"))
    directions = 2 if getattr(layer, "bidirectional", False) else 1
    gates = of_state.shape[0] // layer.hidden_size
    return Recurrent(gates, layer.input_size, layer.hidden_size, directions)
