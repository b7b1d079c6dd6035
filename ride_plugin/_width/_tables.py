"""Tables that a constructor has computed: sines and cosines of positions, the basis of a transform.

Their columns belong together, so the first of them are not the table of a smaller size: a rotary
embedding that lost some is no rotation, and scores no longer hang on distances alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from ride_plugin._initialise import is_structured
from ride_plugin._tree import dotted

_COLUMNS = 256  # so many columns, and so many entries of each, are compared


def tables_of(expert: nn.Module) -> dict[str, frozenset[int]]:
    """Buffers of an expert that are such tables, by name, and along which dimensions.

    Dimensions count from the end. An earlier dimension may be cut, as that of one whole table for
    each head or channel, and so may one along which a kernel is only repeated.
    """
    found = {}
    for path, module in expert.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and (dims := _dims_of(buffer)):
                found[dotted(path, key)] = dims
    return found


def _dims_of(buffer: Tensor) -> frozenset[int]:
    if not buffer.is_floating_point() or sum(size > 1 for size in buffer.shape) < 2:
        return frozenset()
    dims = [dim for dim in (-1, -2) if bool((buffer != buffer.narrow(dim, 0, 1)).any())]
    # A mask, which has two values, says something of each unit by itself.
    if not dims or len(buffer.unique()) < 3:
        return frozenset()
    return frozenset(dims) if is_structured(buffer) or _has_equal_columns(buffer) else frozenset()


def _has_equal_columns(buffer: Tensor) -> bool:
    """Whether columns that are not constant come twice, as where two share an angle."""
    columns = buffer.movedim(-1, 0).flatten(1)[:_COLUMNS, :_COLUMNS]
    varied = columns[(columns != columns[:, :1]).any(1)]
    return len(varied.unique(dim=0)) < len(varied)
