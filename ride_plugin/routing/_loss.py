"""What the router learns: targets and loss of stage two (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ride_plugin._checks import ClassCounts, check_class_counts, check_number, setting
from ride_plugin._devices import follow, keeping_values
from ride_plugin._errors import ArgumentError
from ride_plugin._output import Output, expert_logits
from ride_plugin.functional import routing_loss, routing_targets


class RoutingLoss(nn.Module):
    """Loss of stage two: trains the router, given what the frozen experts said.

    The equation is that of `routing_loss`, with the targets of `routing_targets`.

    Args:
        pos_weight: weight of samples that need one more expert; the paper uses 100. The smaller,
            the fewer samples go on at one threshold; the order of samples hardly changes.
        neg_weight: weight of the others; the paper uses 1.
        class_counts: ``[C]``, training samples of each class: samples are weighted by one over
            their class's count, at most 20 times the mean of these weights over the training
            samples, all divided by what makes their mean one again, for a router that serves
            balanced data. None weights all alike, as the paper.

    Raises:
        ArgumentError: a weight is negative or not finite, or a count is not positive.

    Example:
        >>> import torch
        >>> criterion = RoutingLoss(class_counts=[500, 50, 20, 5])
        >>> gate_logits = torch.zeros(4, 2, requires_grad=True)
        >>> loss = criterion(gate_logits, torch.randn(4, 3, 4), torch.tensor([0, 1, 2, 3]))
        >>> loss.backward()
    """

    pos_weight: float = setting(
        "pos_weight", "Weight of samples that need one more expert.", check_number, 0
    )
    neg_weight: float = setting("neg_weight", "Weight of the others.", check_number, 0)

    class_weights: Tensor | None

    def __init__(
        self,
        pos_weight: float = 100.0,
        neg_weight: float = 1.0,
        *,
        class_counts: ClassCounts | None = None,
    ) -> None:
        super().__init__()
        self.pos_weight = pos_weight
        self.neg_weight = neg_weight
        weights = None if class_counts is None else _class_weights(check_class_counts(class_counts))
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, gate_logits: Tensor, output: Output, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            gate_logits: ``[B, E-1]``, what the router returned.
            output: the experts' logits in any form: ``router_inputs``' result, a wrapped model's
                output, or a tensor ``[B, E, C]``. No gradient flows into it.
            target: class indices ``[B]`` or probabilities ``[B, C]``.

        Raises:
            MissingExpertLogitsError: ``output`` is a bare ``[B, C]`` tensor.
            ArgumentError: a shape does not fit, (on the CPU only) an index is out of range, or
                ``gate_logits`` are what a sigmoid has returned.
        """
        compiling = torch.compiler.is_compiling()  # no tensor has a graph there
        if not compiling and "Sigmoid" in str(getattr(gate_logits, "grad_fn", None)):
            raise ArgumentError(
                "Expected argument `gate_logits` to be what the router returned, but by its graph "
                "it is the result of a sigmoid, which this loss and RoutingInference apply "
                "themselves. Pass the router's output as it is, and end a router of your own "
                "before its sigmoid."
            )
        logits = expert_logits(output)
        targets = routing_targets(logits, target)
        weight = None
        if self.class_weights is not None:
            follow(self, self.class_weights, logits)
            weight = _of_samples(self.class_weights, target, logits.shape[2])
        return routing_loss(gate_logits, targets, self.pos_weight, self.neg_weight, weight=weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        keeping_values(self, lambda: super(RoutingLoss, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """The weights, for ``repr``."""
        return f"pos_weight={self.pos_weight}, neg_weight={self.neg_weight}"


def _class_weights(counts: Tensor) -> Tensor:
    """One over each count, capped, with a mean of one over the training samples."""
    weights = 1 / counts
    mean = len(counts) / counts.sum()  # of the weights, over the samples
    weights = weights.clamp(max=20 * mean)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def _of_samples(class_weights: Tensor, target: Tensor, num_classes: int) -> Tensor:
    if len(class_weights) != num_classes:
        raise ArgumentError(
            f"Expected the experts' logits to have {len(class_weights)} classes, as `class_counts` "
            f"has, but got {num_classes}."
        )
    if target.is_floating_point():  # mixed labels: the mean weight of what is mixed
        return (target * class_weights).sum(dim=1)  # autocast would lower a matrix product
    return class_weights.gather(0, target.long())  # negative indices raise, they do not wrap
