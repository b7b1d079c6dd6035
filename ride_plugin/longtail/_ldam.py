"""Label-distribution-aware margin loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ride_plugin._checks import (
    NO_INDEX,
    ClassCounts,
    Numbers,
    are_probabilities,
    as_weight,
    check_class_counts,
    check_logits_target,
    check_number,
    has_values,
    setting,
    warn_of_probabilities,
)
from ride_plugin._devices import follow, keeping_values
from ride_plugin._errors import ArgumentError, warn_caller
from ride_plugin._numerics import float32_or_better

# Cosines computed in bfloat16 or TF32 exceed 1 by up to about 1 %; linear heads exceed it by far.
_COSINE_TOLERANCE = 2e-2
_MANY = 32  # logits of a fresh head with many features are often below one, but not all of so many


def ldam_loss(
    logits: Tensor, target: Tensor, margins: Tensor, *, scale: float, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy after the target's logit was lowered by ``scale * margins[target]``.

    Args:
        logits: ``[B, C]``, already multiplied by ``scale``.
        target: ``[B]`` int64.
        margins: ``[C]``, in units of the cosine.
        scale: what the cosines were multiplied by.
        weight: ``[C]`` class weights; the mean is then weighted, as in ``F.cross_entropy``.

    Returns:
        The mean over the batch, a scalar of float32 or better.

    Example:
        >>> ldam_loss(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(2), scale=30.0)
        tensor(0.6931)
    """
    logits = float32_or_better(logits)
    lowered = -scale * margins.to(logits.dtype)[target]
    shifted = logits.scatter_add(1, target[:, None], lowered[:, None])
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(shifted, target, weight, ignore_index=NO_INDEX)


class LDAMLoss(nn.Module):
    r"""Label-distribution-aware margin loss: rare classes must win by a larger margin.

    With $z = s \cos\theta$ the logits of a cosine classifier and $n_c$ the training
    images of class c,

    $$L = -\log \frac{e^{z_y - s m_y}}{e^{z_y - s m_y} + \sum_{c \ne y} e^{z_c}}, \qquad
    m_c = m_{\max} \frac{n_c^{-1/4}}{\max_k n_k^{-1/4}}$$

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019, section 3.2. Differs from the LDAM authors' code: that one multiplies cosines
    by ``scale`` inside the loss. Here, as in the RIDE authors' code, the head does it, so **the
    logits arrive already multiplied by** ``scale``.

    A margin of ``0.5 * 30`` only makes sense for a cosine head, whose logits lie within
    ``[-scale, scale]``. Logits beyond that range (by more than 2 %, the rounding of bfloat16)
    raise. On the CPU every batch is checked; on an accelerator only the first, since reading
    values stops the queue; never where there are none to read (``torch.compile``, ``torch.func``,
    fake tensors).

    Attributes:
        weight: ``[C]`` class weights, ones unless given; changed in place by DeferredReweighting.
        margins: ``[C]`` float32, in units of the cosine.
        max_margin: the largest of them, which may be set while training, once an epoch say, as may
            ``scale``.

    Example:
        >>> criterion = LDAMLoss([500, 50, 5])
        >>> criterion.margins
        tensor([0.1581, 0.2812, 0.5000])
        >>> cosines = torch.tensor([[0.9, 0.1, -0.2]])
        >>> criterion(30 * cosines, torch.tensor([2])).item() > 30
        True
    """

    margins: Tensor
    weight: Tensor

    scale: float = setting(
        "scale", "What the head multiplies cosines by.", check_number, 0, open_low=True
    )

    averages_rows = True  # see experts_loss: one call for all experts

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        weight: Numbers | None = None,
    ) -> None:
        """Compute the margins.

        Args:
            class_counts: training images per class, ``[C]``, positive.
            max_margin: margin of the rarest class, in units of the cosine (paper: 0.5).
            scale: what the head multiplies cosines by (LDAM and RIDE code: 30).
            weight: ``[C]`` class weights; ones if None.

        Raises:
            ArgumentError: a count is not positive, ``weight`` does not fit, or ``max_margin`` is
                negative, or ``scale`` is not positive.
        """
        super().__init__()
        counts = check_class_counts(class_counts)
        self.scale = scale
        rarity = counts.pow(-0.25)
        # In float64 and no buffer: it outlives every cast, and other margins are made of it.
        self._rarity = rarity / rarity.max()
        ones = torch.ones_like(self._rarity, dtype=torch.float32)
        # Not persistent: a schedule rebuilds the weights, so checkpoints need no loss in them.
        self.register_buffer("margins", ones.clone(), persistent=False)
        self.register_buffer(
            "weight", ones if weight is None else as_weight(weight, len(counts)), persistent=False
        )
        self.max_margin = max_margin
        self._checked = False

    @property
    def max_margin(self) -> float:
        """Margin of the rarest class."""
        return self._max_margin

    @max_margin.setter
    def max_margin(self, value: float) -> None:
        self._max_margin = check_number(value, "max_margin", 0)
        self._refresh()

    def _refresh(self) -> None:
        # In place: a compiled loss keeps the buffer that it has seen.
        self.margins.copy_(self._max_margin * self._rarity)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        keeping_values(self, lambda: super(LDAMLoss, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        self._refresh()  # with the digits of another dtype
        return self

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar of float32 or better.

        Args:
            logits: ``[B, C]``, a cosine head's output times ``scale``.
            target: ``[B]`` int64.

        Raises:
            ArgumentError: shapes or labels do not fit, or the logits are no cosines times
                ``scale``.

        Warns:
            UserWarning: at the first call, the logits are plain cosines, not multiplied by
                ``scale``, or probabilities, as far as can be told.
        """
        target = check_logits_target(logits, target, len(self.margins), soft=False)
        follow(self, self.margins, logits)
        wanted = not torch.compiler.is_compiling() and (logits.is_cpu or not self._checked)
        if wanted and has_values(logits):
            if not self._checked:
                warn_of_probabilities(logits, "logits")
            self._check_cosine(logits)
            self._checked = True
        return ldam_loss(logits, target, self.margins, scale=self.scale, weight=self.weight)

    def _check_cosine(self, logits: Tensor) -> None:
        logits = logits.detach()
        low, high = logits.aminmax()  # one pass; the check was a fifth of the loss as several
        if bool(low.isneginf()):  # classes that are masked out
            low = logits.masked_fill(logits.isneginf(), 0).amin()
        largest = torch.maximum(-low, high)
        if bool(largest > self.scale * (1 + _COSINE_TOLERANCE)):
            raise ArgumentError(
                f"Expected argument `logits` to be cosines times scale, within +-{self.scale:g}, "
                f"but got {largest.item():g}. A margin needs a normalised head: build the model "
                f'with classifier="cosine" and scale={self.scale:g}, or pass the head\'s own scale '
                "to LDAMLoss, or use BalancedSoftmaxLoss with a linear head."
            )
        if not self._checked:
            self._look_for_plain_cosines(logits, largest)

    def _look_for_plain_cosines(self, logits: Tensor, largest: Tensor) -> None:
        """Warn if nobody multiplied by ``scale``; a few small logits may as well be chance."""
        small = bool((largest > 0) & (largest <= 1 + _COSINE_TOLERANCE))
        many = logits.numel() >= _MANY
        if small and many and self.scale > 2 and not are_probabilities(logits):
            warn_caller(
                f"All of argument `logits` lie within +-1, like cosines, but LDAMLoss expects "
                f"cosines times scale, within +-{self.scale:g}; its margins are that much too "
                f"large for plain ones. Multiply them by {self.scale:g} in the head, as "
                "CosineClassifier does: other implementations do so in the loss."
            )

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"num_classes={len(self.margins)}, max_margin={self.max_margin}, scale={self.scale}"
