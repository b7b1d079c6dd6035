"""Early exit: the rule by which a row goes on, and what a walk through the gates returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ride_plugin.routing._protocols import RoutableModel


class RoutingOutput(NamedTuple):
    """What ``RoutingInference(...)(x, return_routing=True)`` returns.

    Attributes:
        logits: ``[B, C]``, for each row the mean logits of the experts that it used.
        num_experts_used: int64 ``[B]``, from 1 to E.
    """

    logits: Tensor
    num_experts_used: Tensor


def goes_on(gate_logits: Tensor, limit: Tensor) -> Tensor:
    """Whether a row needs one more expert: the gate's logit exceeds ``logit(threshold)``.

    Probabilities saturate in float32 (a logit of 17 already gives 1.0), logits do not; so the
    comparison is made between logits. A threshold of 0 (limit -inf) lets every row go on, even one
    whose logit is -inf; a threshold of 1 (limit +inf) lets none.
    """
    return gate_logits.clamp(min=torch.finfo(gate_logits.dtype).min) > limit


def start(
    model: RoutableModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor, Tensor]:
    """Run trunk and expert 0, in one pass where the model can: state, logits and features."""
    if hasattr(model, "start"):
        result: tuple[Any, Tensor, Tensor] = model.start(*args, **kwargs)
        return result
    state = model.run_trunk(*args, **kwargs)
    return (state, *model.run_expert(0, state))
