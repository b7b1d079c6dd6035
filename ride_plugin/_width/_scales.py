"""Factors that a constructor has computed from a size: its root, or one over its root."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

# Numbers that may equal a root by chance: a share of 0.25 is no root of 16.
_OTHERS = ("drop", "prob", "rate", "ratio", "eps", "momentum", "slope")


def rescaled(module: nn.Module, old: int, new: int) -> Iterator[tuple[str, float]]:
    """Yield attributes of a module that are the root of ``old``, with that of ``new``."""
    if old < 2 or isinstance(module, nn.modules.dropout._DropoutNd):
        return
    for key, value in vars(module).items():
        if type(value) is not float or key == "p" or any(part in key for part in _OTHERS):
            continue
        for power in (0.5, -0.5):
            if math.isclose(value, old**power, rel_tol=1e-6):
                yield key, new**power
