"""What a backbone returns in training beside its logits, and a loss may be made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ride_plugin._split._logits import LogitsReader, depends, spelled
from ride_plugin._tree import places_in


def losses_beside(reader: LogitsReader, output: Any) -> list[str]:
    """Where an output in training holds more than its logits that a loss may be made of.

    That is what gradients flow through: a number, as an auxiliary loss is, or a matrix like the
    logits that is neither made of them, as probabilities are, nor they of it, as of features. An
    entry named `loss` is the caller's own criterion, and a function may have made the logits of any
    matrix.

    Args:
        reader: takes the logits out of it.
        output: what the backbone returned, with its graph.

    Returns:
        Each place as code reads it: ``output[1]``.
    """
    logits = reader.entry_of(output)

    def second_classifier(tensor: Tensor) -> bool:
        alike = tensor.shape == logits.shape and not callable(reader.choice)
        return alike and not (depends(tensor, logits) or depends(logits, tensor))

    return [
        spelled(path)
        for path, tensor in places_in(output)
        if tensor.requires_grad
        and path[-1:] != ("loss",)
        and (tensor.dim() == 0 or second_classifier(tensor))
    ]
