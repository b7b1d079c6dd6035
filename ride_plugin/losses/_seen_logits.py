"""The logits that a criterion's softmax sees, which need not be those that it is given.

A criterion for long tails may add the logarithm of the class prior to the logits. On the plain ones
experts can then part at no cost to their criterion, by favouring rare classes on frequent classes'
images, so a term that rewards them for parting has to compare what the criteria see.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin._contexts import random_state_kept
from ride_plugin._numerics import float32_or_better

_RATIO = 1.5  # of two probabilities that should be the same
_LARGEST = 2**26  # bytes


def seen_logits(criteria: Sequence[Any], experts: Tensor) -> Tensor:
    """Expert logits ``[B, E, C]`` as their criteria see them.

    A criterion that changes logits says so by a method ``with_prior(logits)``.

    Args:
        criteria: one for all experts, or one for each.
        experts: ``[B, E, C]``.
    """
    if not any(hasattr(criterion, "with_prior") for criterion in criteria):
        return experts
    if len(criteria) == 1:
        seen: Tensor = criteria[0].with_prior(experts)
        return seen
    each = zip(criteria, float32_or_better(experts).unbind(1), strict=True)
    return torch.stack(
        [c.with_prior(logits) if hasattr(c, "with_prior") else logits for c, logits in each], dim=1
    )


def adds_a_prior(
    criterion: Callable[..., Any],
    logits: Tensor,
    target: object,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> bool:
    """Whether a criterion adds something to the logits of some classes, as far as can be told.

    The gradient of cross entropy at equal logits is, for the classes that are not the sample's, the
    probability that the softmax gives them: the same for all, unless something was added to their
    logits. Margins and weights leave it the same, and so do smoothed labels; torch's own cross
    entropy, where weights and smoothed labels together do not, adds nothing and is left out.

    Args:
        criterion: of ``(logits, target, *args, **kwargs)``; what a module keeps and draws stays as
            it is.
        logits: ``[B, C]``, of whatever values.
        target: as the criterion takes it; only class indices ``[B]`` can be told from.
        args: handed on.
        kwargs: handed on.
    """
    if not isinstance(target, Tensor) or target.dim() != 1 or target.is_floating_point():
        return False
    function = criterion.func if isinstance(criterion, partial) else criterion
    if function is F.cross_entropy or type(function) is nn.CrossEntropyLoss:
        return False
    equal = torch.zeros_like(logits, requires_grad=True)
    try:
        apart = _apart(criterion)
        if apart is None:
            return False
        with random_state_kept(equal):
            loss = apart(equal, target, *args, **(kwargs or {}))
        (gradient,) = torch.autograd.grad(loss.sum(), equal)
        others = gradient.scatter(1, target.long()[:, None], torch.nan)
        largest = others.nan_to_num(-torch.inf).amax(1)
        smallest = others.nan_to_num(torch.inf).amin(1)
        return bool(((smallest > 0) & (largest > _RATIO * smallest)).any())
    except Exception:  # whatever it cannot do is told where it is called in earnest
        return False


def _apart(criterion: Callable[..., Any]) -> Callable[..., Any] | None:
    """A criterion to try out; None if trying might change something or copy a whole network."""
    if isinstance(criterion, FunctionType):
        return criterion
    if isinstance(criterion, partial):
        inside = _apart(criterion.func)
        return inside and partial(inside, *criterion.args, **criterion.keywords)
    if not isinstance(criterion, nn.Module):
        return None
    held = sum(tensor.nbytes for tensor in (*criterion.parameters(), *criterion.buffers()))
    return copy.deepcopy(criterion) if held <= _LARGEST else None
