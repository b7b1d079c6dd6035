"""Equal up to rounding: how what was computed in two ways is compared."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 0.05  # in half precision, many units of the last place would be everything


def close(
    a: Tensor | None,
    b: Tensor | None,
    units: float | None = None,
    *,
    scale: float = 1.0,
    allowed: float = 0.0,
    equal_nan: bool = False,
) -> bool:
    """Whether two results are of one shape and dtype and differ by no more than rounding.

    Args:
        a: one result; None is close to nothing.
        b: the other.
        units: how many units in the last place may be between two numbers, and as many of the
            largest number beside them. None lets half of the digits differ.
        scale: counts as the largest number if all of ``b`` is smaller.
        allowed: a difference that is rounding, for whatever reason.
        equal_nan: whether a NaN is close to a NaN.
    """
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    eps = torch.finfo(a.dtype).eps
    relative = min(eps**0.5 if units is None else units * eps, _LARGEST)
    largest = max(scale, float(b.abs().max()) if b.numel() else 0.0)
    atol = max(relative * largest, allowed, 1e-30)
    return torch.allclose(a, b, rtol=relative, atol=atol, equal_nan=equal_nan)
