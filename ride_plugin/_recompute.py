"""Activation checkpointing of experts: memory for time, with the same gradients and statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def checkpointed(compute: Callable[[], Tensor], expert: nn.Module) -> Tensor:
    """Run ``compute`` without keeping what its backward needs; that is computed again then.

    The second computation sees the same random state, and leaves the running statistics of the
    expert's normalisation layers alone: they have been updated once already.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(expert)

    result: Tensor = checkpoint(compute, use_reentrant=False, context_fn=contexts)
    return result


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let normalisation layers normalise by the batch, as in training, without counting it."""
    kept: list[tuple[_NormBase, Any, Any]] = []
    for layer in module.modules():
        if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats:
            kept.append((layer, layer.momentum, layer.num_batches_tracked))
            layer.momentum = 0.0  # new = (1 - 0) * old + 0 * batch, which is old to the bit
            layer.num_batches_tracked = None
    try:
        yield
    finally:
        for layer, momentum, count in kept:
            layer.momentum = momentum
            layer.num_batches_tracked = count
