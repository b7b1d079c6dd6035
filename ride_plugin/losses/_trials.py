"""Calls of a copy of a criterion, which tell what it keeps and how it joins its samples."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ride_plugin._closeness import close
from ride_plugin._contexts import random_state_kept
from ride_plugin._tree import map_tensors, snapshot
from ride_plugin.losses._trial_copy import trial_copy


class Outcome(NamedTuple):
    """What came of a trial.

    Attributes:
        loss: of the last call.
        logits: the leaf from which it was computed.
        kept: the copies of the criterion and of its further arguments, after the calls.
    """

    loss: Tensor
    logits: Tensor
    kept: Any


def try_out(
    criterion: Callable[..., Any],
    logits: Tensor,
    target: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    times: int = 1,
) -> Outcome:
    """Call a copy of a criterion as often, with random numbers that are the same each time.

    Nothing is changed of the criterion, of its arguments and of any random state.

    Raises:
        TypeError: it cannot be copied.
        Exception: whatever the criterion raises.
    """
    apart, args, kwargs = trial_copy((criterion, *snapshot((tuple(args), dict(kwargs or {})))))
    for _ in range(times):
        leaf = snapshot(logits).requires_grad_()
        with random_state_kept(logits):
            # A copy, as a criterion may write (`logits += self.bias`), which no leaf allows.
            loss = apart(leaf.clone(), snapshot(target), *args, **kwargs)
    return Outcome(loss, leaf, (apart, args, kwargs))


def keeps_state(criterion: Callable[..., Any], *given: Any) -> bool:
    """Whether a criterion keeps something that each call advances, as far as can be seen.

    What is the same after one call and after a second one with the same arguments is no such
    state: a cache, a buffer that was moved to the device, the last loss for a log.

    Args:
        criterion: any.
        *given: logits ``[B, C]``, the target and the rest, as :func:`try_out` takes them.
    """
    try:
        once, twice = (try_out(criterion, *given, times=times).kept for times in (1, 2))
        return not _same(once, twice, set())
    except Exception:  # whatever it cannot do is told where it is called in earnest
        return False


def sums_samples(criterion: Callable[..., Any], logits: Tensor, *given: Any) -> bool:
    """Whether the loss of a batch that holds each sample twice is twice the loss.

    A sum that is no larger than a mean would be is none: of losses with weights that sum to one, or
    that is divided by a number of samples which the criterion was told.
    """

    def twice(value: Tensor) -> Tensor:
        return torch.cat([value, value]) if value.shape[:1] == logits.shape[:1] else value

    try:
        loss = try_out(criterion, logits, *given).loss.detach()
        doubled = try_out(criterion, *(map_tensors(twice, each) for each in (logits, *given))).loss
        rows, classes = logits.shape
        # The mean of a model that knows nothing is the logarithm, and the sum as many times it.
        large = loss.dim() == 0 and bool(loss.isfinite() & (loss > rows**0.5 * math.log(classes)))
        return large and close(doubled.detach(), 2 * loss, scale=0.0)
    except Exception:  # as above
        return False


def _same(a: Any, b: Any, seen: set[int]) -> bool:
    """Whether two copies of one thing hold the same, as far as it is known how they hold it."""
    if a is b or id(a) in seen:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, (bool, int, float, complex, str, bytes)):
        return bool(a == b) or a != a
    seen.add(id(a))
    ours, theirs = _held(a), _held(b)
    return len(ours) == len(theirs) and all(
        _same(one, other, seen) for one, other in zip(ours, theirs, strict=True)
    )


def _held(value: Any) -> list[Any]:
    """What is inside; nothing where that cannot be seen, as in a stream of random numbers."""
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, deque)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return [len(value)]  # their order is that of copies
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        enclosed = [cell.cell_contents for cell in value.__closure__ or ()]
        return [*enclosed, value.__globals__, value.__defaults__, value.__dict__]
    return [getattr(value, "__dict__", None)]
