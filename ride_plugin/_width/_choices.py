"""Outputs that are choices and no channels: those of a gate, one for each part that it can choose.

Their number says how many parts there are, so it may not become smaller. What tells them from
channels is that somebody reads which of them is the largest: a number, and not the value alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ride_plugin._tree import tensors_in

# Place of the argument `dim` among those of each operation, and its default.
_DIM: dict[str, tuple[int | None, int | None]] = {
    "argmax": (1, None),
    "argmin": (1, None),
    "argsort": (1, -1),
    "gumbel_softmax": (4, -1),
    "kthvalue": (2, -1),
    "max": (1, None),
    "median": (1, None),
    "min": (1, None),
    "mode": (1, -1),
    "multinomial": (None, -1),
    "nanmedian": (1, None),
    "sort": (1, -1),
    "topk": (2, -1),
}


class Choices:
    """Notes which tensors say which of some narrowed outputs were chosen."""

    def __init__(self) -> None:
        self._made_from: dict[int, Tensor] = {}

    def note(
        self, name: str, old: Sequence[int] | None, args: Any, kwargs: Any, result: Any
    ) -> None:
        """Note an operation's result if it chooses among outputs that are fewer than they were.

        Args:
            name: of the operation.
            old: shape of its first operand at full width.
            args: its arguments, of which the first tensor has the scores; it has to stay alive,
                and so has the result.
            kwargs: its keyword arguments.
            result: what it returned.
        """
        scores = next(tensors_in((args, kwargs)), None)
        if name not in _DIM or scores is None or old is None or len(old) != scores.dim():
            return
        place, default = _DIM[name]
        dim = kwargs.get("dim", kwargs.get("axis", default))
        if place is not None and len(args) > place:
            dim = args[place]
        dims = [dim % scores.dim()] if type(dim) is int and scores.dim() else range(scores.dim())
        if any(scores.shape[d] != old[d] for d in dims):
            for tensor in tensors_in(result):
                if name == "gumbel_softmax" or not tensor.is_floating_point():
                    self._made_from[id(tensor)] = scores

    def read_in(self, value: Any) -> Tensor | None:
        """Return the scores behind a choice that an operation reads, if it reads one."""
        read = (self._made_from.get(id(tensor)) for tensor in tensors_in(value))
        return next((scores for scores in read if scores is not None), None)
