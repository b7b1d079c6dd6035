"""Focal loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ride_plugin._checks import (
    Numbers,
    as_weight,
    check_logits_target,
    check_number,
    setting,
    warn_of_probabilities,
)
from ride_plugin._devices import follow, keeping_values
from ride_plugin._numerics import float32_or_better


def focal_loss(
    logits: Tensor, target: Tensor, *, gamma: float, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy times ``(1 - p) ** gamma``, the (weighted) mean over the batch.

    Args:
        logits: ``[B, C]``.
        target: ``[B]`` int64, or probabilities ``[B, C]``.
        gamma: how strongly easy samples are played down; 0 gives cross-entropy.
        weight: ``[C]`` class weights; the mean is divided by the sum of the weights used.

    Returns:
        A scalar of float32 or better.

    Example:
        >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=1.0)
        tensor(0.3466)
    """
    log_p = F.log_softmax(float32_or_better(logits), dim=1)
    if weight is None:
        weight = log_p.new_ones(log_p.shape[1])
    weight = weight.to(log_p.dtype)
    if target.is_floating_point():
        # A class of probability zero must not meet a masked logit: 0 * inf is NaN.
        log_p = log_p.masked_fill(target == 0, 0.0)
        share = weight * target.to(log_p.dtype)
    else:
        log_p = log_p.gather(1, target[:, None])
        share = weight[target][:, None]
    # The floor keeps the power's slope finite at p = 1, where gamma < 1 would give 0 * inf.
    doubt = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
    return (share * doubt.pow(gamma) * -log_p).sum() / share.sum()


class FocalLoss(nn.Module):
    r"""Focal loss: cross-entropy that plays down samples the model already gets right.

    $$L = -(1 - p_y)^\gamma \log p_y$$

    and for probabilities q as targets $-\sum_c q_c (1 - p_c)^\gamma \log p_c$.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 3.2, with the
    softmax in place of the sigmoid. With class weights, the mean is weighted as that of
    ``F.cross_entropy`` is, for probabilities by their expected weight (torch divides by the number
    of samples there); the authors' codes for LDAM and RIDE put the weight inside ``p`` as well,
    which this one does not.

    Attributes:
        gamma: the exponent, which may be set while training, once an epoch say.
        weight: ``[C]`` class weights or None. DeferredReweighting needs a tensor: pass ones.

    Example:
        >>> FocalLoss(gamma=2.0)(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))
        tensor(0.1733)
    """

    weight: Tensor | None

    gamma: float = setting("gamma", "How strongly easy samples are played down.", check_number, 0)

    averages_rows = True  # see experts_loss: one call for all experts

    def __init__(self, gamma: float = 2.0, *, weight: Numbers | None = None) -> None:
        """Store the exponent.

        Args:
            gamma: how strongly easy samples are played down (paper: 2; LDAM-DRW: 1).
            weight: ``[C]`` class weights; no weighting if None.

        Raises:
            ArgumentError: ``gamma`` is negative or ``weight`` is not a row of class weights.
        """
        super().__init__()
        self.gamma = gamma
        self.register_buffer(
            "weight", None if weight is None else as_weight(weight), persistent=False
        )
        self._looked = False

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar of float32 or better.

        Args:
            logits: ``[B, C]``.
            target: ``[B]`` int64, or probabilities ``[B, C]``.

        Raises:
            ArgumentError: shapes or labels do not fit.

        Warns:
            UserWarning: at the first call, the logits are probabilities, as far as can be told.
        """
        target = check_logits_target(
            logits, target, None if self.weight is None else len(self.weight)
        )
        if not (torch.compiler.is_compiling() or self._looked):
            self._looked = warn_of_probabilities(logits, "logits")
        if self.weight is not None:
            follow(self, self.weight, logits)
        return focal_loss(logits, target, gamma=self.gamma, weight=self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        keeping_values(self, lambda: super(FocalLoss, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"gamma={self.gamma}"
