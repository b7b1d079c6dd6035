"""Class weights by effective numbers, and their deferred use (DRW)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ride_plugin._checks import (
    ClassCounts,
    Numbers,
    as_weight,
    check_class_counts,
    check_instance,
    check_no_shares,
    check_number,
    has_values,
)
from ride_plugin._errors import ArgumentError
from ride_plugin._schedule import Schedule


def effective_number_weights(class_counts: ClassCounts, beta: float = 0.9999) -> Tensor:
    r"""Class weights inverse to the effective number of samples, with mean 1.

    $$w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad
    \sum_c w_c = C$$

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
    section 4; normalised as in LDAM-DRW.

    Args:
        class_counts: training images per class, ``[C]``, positive: numbers, not shares.
        beta: 0 gives equal weights, towards 1 they approach ``1 / n_c`` (LDAM-DRW: 0.9999).

    Returns:
        ``[C]`` float32 on the CPU.

    Raises:
        ArgumentError: a count is not positive, all are below one, or ``beta`` is outside
            ``[0, 1)``.

    Example:
        >>> effective_number_weights([100, 10, 1])
        tensor([0.0272, 0.2704, 2.7025])
    """
    counts = check_no_shares(check_class_counts(class_counts))
    log_beta = counts.new_tensor(check_number(beta, "beta", 0, 1, open_high=True)).log()
    # expm1 keeps the digits that 1 - beta ** n loses where beta is close to 1.
    weights = -1 / torch.expm1(counts * log_beta)
    return (weights / weights.mean()).float()


class DeferredReweighting(Schedule):
    """Schedule that switches a criterion's class weights on at a late epoch.

    Before ``start_epoch`` the criterion keeps the weights it came with; from then on it has
    :func:`effective_number_weights`. The criterion's ``weight`` buffer is overwritten in place, so
    it stays on its device and compiled code stays valid.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019, algorithm 1 (epoch 160 of 200 on CIFAR).

    It behaves as a learning-rate scheduler does: ``last_epoch`` is 0 at construction, and
    ``step()`` is called once at the end of each epoch. A loop that never calls it is told so where
    :class:`RIDELoss` has the schedule; in a loop without one nobody counts what the criterion has
    seen. Its state dict holds the epoch; the criterion keeps its own.

    Attributes:
        last_epoch: the current epoch, counted from zero. It may be set, as may ``start_epoch`` and
            ``weight``: the criterion's weights follow at once.
        is_active: whether the class weights act in it.
        weight: ``[C]``, the class weights used from ``start_epoch`` on.

    Example:
        >>> criterion = torch.nn.CrossEntropyLoss(weight=torch.ones(2))
        >>> drw = DeferredReweighting(criterion, [90, 10], start_epoch=1)
        >>> drw.is_active
        False
        >>> drw.step()
        >>> criterion.weight
        tensor([0.2007, 1.7993])
    """

    criterion: nn.Module

    def __init__(
        self,
        criterion: nn.Module,
        class_counts: ClassCounts,
        *,
        start_epoch: int,
        beta: float = 0.9999,
    ) -> None:
        """Compute the weights and apply those of epoch 0.

        Args:
            criterion: a module with a ``weight`` tensor ``[C]``: LDAMLoss, or CrossEntropyLoss and
                FocalLoss built with ``weight=torch.ones(C)``.
            class_counts: training images per class, ``[C]``, positive.
            start_epoch: first epoch (from 0) with class weights.
            beta: see :func:`effective_number_weights`.

        Raises:
            ArgumentError: the criterion has no weights of this length, or a number is out of range.
        """
        super().__init__(start_epoch, check_class_counts(class_counts))
        self._weight = effective_number_weights(class_counts, beta)
        check_instance(criterion, "criterion", nn.Module, "a module that holds class weights")
        held = getattr(criterion, "weight", None)
        if not isinstance(held, Tensor) or held.shape != self.weight.shape:
            got = list(held.shape) if isinstance(held, Tensor) else held
            raise ArgumentError(
                f"Expected argument `criterion` to hold class weights [{len(self.weight)}] in "
                f"`criterion.weight`, but got {got!r} in {type(criterion).__name__}. Build it with "
                f"weight=torch.ones({len(self.weight)}): a weight that exists can be switched in "
                "place."
            )
        # Not as a submodule: the criterion is saved and moved by whoever owns it.
        self.__dict__["criterion"] = criterion
        if not isinstance(held, nn.Parameter):
            # nn.CrossEntropyLoss keeps the tensor that it was given, which others may have, too.
            criterion.weight = held.detach().clone()
        self._own = held.detach().clone()  # the criterion's weights before the start
        self._switched = False
        self._refresh()

    @property
    def weight(self) -> Tensor:
        """The class weights used from ``start_epoch`` on."""
        return self._weight

    @weight.setter
    def weight(self, value: Numbers) -> None:
        self._weight = as_weight(value, len(self._weight))
        self._refresh()

    def _has_effect(self) -> bool:
        return has_values(self._own) and not torch.allclose(
            self._own.to(self._weight), self._weight
        )

    def _refresh(self) -> None:
        super()._refresh()
        held = self.criterion.weight
        assert isinstance(held, Tensor)
        # A state that was loaded into the criterion may have brought these weights, too.
        switched = self._switched or (has_values(held) and torch.equal(held, self._weight.to(held)))
        with torch.no_grad():
            if self.is_active:
                if not switched:
                    self._own = held.detach().clone()  # the loop may have set others
                held.copy_(self._weight)
            elif switched:
                held.copy_(self._own)
        self._switched = self.is_active

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"start_epoch={self.start_epoch}, last_epoch={self.last_epoch}"
