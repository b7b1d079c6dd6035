"""What a classifier received, as one vector for each row: the features that a router reads."""

from __future__ import annotations

import torch
from torch import Tensor


def features_of(
    received: Tensor | None, returned: Tensor | None, logits: Tensor | None
) -> Tensor | None:
    """What a classifier received as ``[B, D]``: of those entries that became the logits.

    Where it classifies every token, the forward picks the result of one for each sample, or takes
    the mean. Which of them is seen by comparing: no value is read, so that it compiles. Of results
    that are equal, as those of a classifier of zeros, the first counts, and the mean before all.

    Args:
        received: by the classifier; None if it did not run.
        returned: by the classifier.
        logits: ``[B, C]``.
    """
    if (
        received is None
        or returned is None
        or logits is None
        or received.dim() < 3
        or received.shape[:-1] != returned.shape[:-1]
        or returned.shape[-1] != logits.shape[-1]
        or returned.shape[0] != logits.shape[0]
    ):
        return pooled(received)
    received, returned = _after_mean(received), _after_mean(returned.detach())
    distances = (returned.to(logits.dtype) - logits.detach()[:, None]).abs().amax(2)
    # Tokens of padding may be NaN.
    nearest = distances.nan_to_num(nan=torch.inf).argmin(1)
    index = nearest[:, None, None].expand(-1, 1, received.shape[2])
    return received.gather(1, index).squeeze(1)


def _after_mean(entries: Tensor) -> Tensor:
    """The entries of each row, ``[B, P, D]``, and their mean before them."""
    entries = entries.flatten(1, -2)
    return torch.cat([entries.mean(1, keepdim=True), entries], 1)


def pooled(features: Tensor | None) -> Tensor | None:
    """What a classifier received as ``[B, D]``: mean over positions (tokens, or a feature map)."""
    if features is None or features.dim() == 2:
        return features
    if features.dim() == 3:
        return features.mean(dim=1)
    return features.flatten(2).mean(dim=2)
