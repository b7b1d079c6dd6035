"""Logit adjustment: in the loss, where balanced softmax is the case tau = 1, and after training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ride_plugin._checks import (
    NO_INDEX,
    ClassCounts,
    check_class_counts,
    check_floating,
    check_logits_target,
    check_number,
    warn_of_probabilities,
)
from ride_plugin._devices import follow
from ride_plugin._numerics import float32_or_better
from ride_plugin._output import ExpertOutput, without_experts


def adjust_logits(
    logits: Tensor | ExpertOutput, class_counts: ClassCounts, tau: float = 1.0
) -> Tensor:
    r"""Move a trained model's decisions towards rare classes, or back to frequent ones.

    $$\tilde z_c = z_c - \tau \log \pi_c, \qquad \pi_c = \frac{n_c}{\sum_k n_k}$$

    Source: Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, the post-hoc
    adjustment. Nothing is trained. A model trained with plain cross entropy becomes one for a
    balanced test set at tau = 1. One trained with balanced softmax, or several experts adjusted
    around it, gives many-shot classes back what they lost at a *negative* tau, at the expense of
    few-shot ones; choose it on held-out data.

    Args:
        logits: ``[..., C]``: the model's output, that of routed inference, or expert logits; of an
            ``ExpertOutput`` the ensemble's.
        class_counts: training images per class, ``[C]``, positive.
        tau: strength; 0 changes nothing.

    Returns:
        ``[..., C]``, float32 or better.

    Raises:
        ArgumentError: a count is not positive, ``tau`` is not finite, or ``logits`` are not
            floating point with one value for each count.

    Warns:
        UserWarning: ``logits`` are probabilities, as far as can be told (on the CPU).

    Example:
        >>> import torch
        >>> adjust_logits(torch.zeros(1, 2), [75, 25])
        tensor([[0.2877, 1.3863]])
    """
    adjustment = check_number(tau, "tau", advice="The paper takes 1.") * _log_prior(class_counts)
    logits = check_floating(
        without_experts(logits),
        "logits",
        "...",
        len(adjustment),
        advice="Pass the model's output, not predicted classes, for as many classes as counted.",
    )
    warn_of_probabilities(logits, "logits")
    precise = float32_or_better(logits)
    return precise - adjustment.to(precise)


def _log_prior(class_counts: ClassCounts) -> Tensor:
    counts = check_class_counts(class_counts)
    return (counts / counts.sum()).log()


def logit_adjusted_loss(logits: Tensor, target: Tensor, adjustment: Tensor) -> Tensor:
    """Cross-entropy of ``logits + adjustment``, the mean over the batch.

    Args:
        logits: ``[B, C]``.
        target: ``[B]`` int64, or probabilities ``[B, C]``.
        adjustment: ``[C]``, added to every row while training.

    Returns:
        A scalar of float32 or better.

    Example:
        >>> import torch
        >>> prior = torch.tensor([0.75, 0.25])
        >>> logit_adjusted_loss(torch.zeros(1, 2), torch.tensor([1]), prior.log())
        tensor(1.3863)
    """
    logits = float32_or_better(logits)
    adjusted = logits + adjustment.to(logits.dtype)
    if not target.is_floating_point():
        return F.cross_entropy(adjusted, target, ignore_index=NO_INDEX)
    # A class of probability zero must not meet a masked logit: 0 * inf is NaN.
    log_p = F.log_softmax(adjusted, dim=1).masked_fill(target == 0, 0.0)
    return -(target.to(log_p.dtype) * log_p).sum(1).mean()


class LogitAdjustedLoss(nn.Module):
    r"""Cross-entropy with the class prior added to the logits, so that the model learns without it.

    $$L = -\log \frac{e^{z_y + \tau \log \pi_y}}{\sum_c e^{z_c + \tau \log \pi_c}}, \qquad
    \pi_c = \frac{n_c}{\sum_k n_k}$$

    Source: Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, section 5.
    Test with the plain logits: the adjustment is for training only. Experts with
    different tau (0, 1, 2) specialise on the head, a balanced set and the tail.

    Attributes:
        tau: the strength, which may be set while training, once an epoch say.
        adjustment: ``[C]`` float32, $\tau \log \pi_c$.

    Example:
        >>> import torch
        >>> criterion = LogitAdjustedLoss([75, 25], tau=1.0)
        >>> criterion(torch.zeros(1, 2), torch.tensor([1]))
        tensor(1.3863)
    """

    adjustment: Tensor

    averages_rows = True  # see experts_loss: one call for all experts

    def __init__(self, class_counts: ClassCounts, tau: float = 1.0) -> None:
        """Compute the adjustment.

        Args:
            class_counts: training images per class, ``[C]``, positive.
            tau: strength (paper: 1); 0 gives cross-entropy, negative favours the head.

        Raises:
            ArgumentError: a count is not positive or ``tau`` is not finite.
        """
        super().__init__()
        # In float64 and no buffer: it outlives every cast, and another tau is made of it.
        self._log_prior = _log_prior(class_counts)
        self.register_buffer("adjustment", self._log_prior.float(), persistent=False)
        self.tau = tau
        self._looked = False

    @property
    def tau(self) -> float:
        """Strength of the adjustment."""
        return self._tau

    @tau.setter
    def tau(self, value: float) -> None:
        self._tau = check_number(value, "tau", advice="The paper takes 1.")
        self._refresh()

    def _refresh(self) -> None:
        # In place: a compiled loss keeps the buffer that it has seen.
        self.adjustment.copy_(self._tau * self._log_prior)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.adjustment = float32_or_better(self.adjustment)
        self._refresh()  # a cast to half precision rounds, and `to_empty` leaves no values
        return self

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
        target = check_logits_target(logits, target, len(self.adjustment))
        if not (torch.compiler.is_compiling() or self._looked):
            self._looked = warn_of_probabilities(logits, "logits")
        follow(self, self.adjustment, logits)
        return logit_adjusted_loss(logits, target, self.adjustment)

    def with_prior(self, logits: Tensor) -> Tensor:
        """The logits that the softmax of this loss sees, which is what experts are compared by.

        Args:
            logits: ``[..., C]``, for example ``expert_logits(out)``.

        Returns:
            ``logits + adjustment``, float32 or better.

        Raises:
            ArgumentError: ``logits`` are not floating point with one value for each class.

        Example:
            >>> import torch
            >>> LogitAdjustedLoss([75, 25]).with_prior(torch.zeros(1, 2)).exp()
            tensor([[0.7500, 0.2500]])
        """
        check_floating(logits, "logits", "...", len(self.adjustment))
        follow(self, self.adjustment, logits)
        logits = float32_or_better(logits)
        return logits + self.adjustment.to(logits.dtype)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"num_classes={len(self.adjustment)}, tau={self.tau}"


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    r"""Balanced softmax: the softmax whose classes are weighted by their training counts.

    $$L = -\log \frac{n_y e^{z_y}}{\sum_c n_c e^{z_c}}$$

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020,
    theorem 1. It is logit adjustment with tau = 1: dividing every count by their sum changes
    nothing in the fraction.

    Example:
        >>> import torch
        >>> BalancedSoftmaxLoss([75, 25])(torch.zeros(1, 2), torch.tensor([1]))
        tensor(1.3863)
    """

    averages_rows = True

    def __init__(self, class_counts: ClassCounts) -> None:
        """Store the prior.

        Args:
            class_counts: training images per class, ``[C]``, positive.

        Raises:
            ArgumentError: a count is not positive.
        """
        super().__init__(class_counts, tau=1.0)
