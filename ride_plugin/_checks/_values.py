"""What can be seen in a tensor without stalling an accelerator or breaking a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._guards import detect_fake_mode

from ride_plugin._numerics import float32_or_better

_LOOKED_AT = 1000  # rows, to tell probabilities from logits


def may_read(tensor: Tensor) -> bool:
    """Whether the values are at hand: not on an accelerator, in a graph, faked or under vmap."""
    return tensor.device.type == "cpu" and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Whether there are values, be it on an accelerator: not in a graph, faked or under vmap."""
    return (
        not torch.compiler.is_compiling()
        and not tensor.is_meta
        and detect_fake_mode(tensor) is None
        and not is_functorch_wrapped_tensor(tensor)
    )


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor was changed in place; None where nobody counts."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite; True where looking would stall a device or break a graph."""
    return not may_read(values) or bool(values.isfinite().all())


def rows_sum_to_one(values: Tensor, within: float = 0.02) -> bool:
    """Whether each row ``[..., C]`` does, as probabilities do; in bfloat16 as well, if not near."""
    return bool(((values.detach().double().sum(dim=-1) - 1).abs() < within).all())


def are_probabilities(logits: Tensor) -> bool:
    """Whether rows ``[..., C]`` look like those of a softmax.

    A single row may come near to one by chance, so it has to come nearer. Nothing but zeros and
    ones are answers that somebody made: a softmax has no zeros. Of many rows the first ones tell.
    """
    classes = logits.shape[-1]
    if classes < 2 or not logits.numel():
        return False
    first = logits[:_LOOKED_AT] if logits.dim() > 1 else logits
    logits = float32_or_better(first.detach())
    low, high = (float(bound) for bound in logits.aminmax())
    if not 0 <= low <= high < 1.02:
        return False
    within = 0.02 if logits.numel() > classes else 1e-4
    return rows_sum_to_one(logits, within) and bool(((logits != 0) & (logits != 1)).any())
