"""What the router learns: targets and loss of stage two (paper, section 3)."""

from __future__ import annotations

from torch import Tensor, nn

from ride_plugin._checks import check_number
from ride_plugin._output import Output, expert_logits
from ride_plugin.functional import routing_loss, routing_targets


class RoutingLoss(nn.Module):
    """Loss of stage two: trains the router, given what the frozen experts said.

    The equation is that of `routing_loss`, with the targets of `routing_targets`.

    Args:
        pos_weight: weight of samples that need one more expert; the paper uses 100. The smaller,
            the fewer samples go on.
        neg_weight: weight of the others; the paper uses 1.

    Raises:
        ArgumentError: a weight is negative or not finite.

    Example:
        >>> import torch
        >>> criterion = RoutingLoss()
        >>> gate_logits = torch.zeros(4, 2, requires_grad=True)
        >>> loss = criterion(gate_logits, torch.randn(4, 3, 10), torch.tensor([0, 1, 2, 3]))
        >>> loss.backward()
    """

    def __init__(self, pos_weight: float = 100.0, neg_weight: float = 1.0) -> None:
        super().__init__()
        self.pos_weight = check_number(pos_weight, "pos_weight", 0)
        self.neg_weight = check_number(neg_weight, "neg_weight", 0)

    def forward(self, gate_logits: Tensor, output: Output, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            gate_logits: ``[B, E-1]``, what the router returned.
            output: the experts' logits in any form: ``router_inputs``' result, a wrapped model's
                output, or a tensor ``[B, E, C]``. No gradient flows into it.
            target: class indices ``[B]`` or probabilities ``[B, C]``.

        Raises:
            MissingExpertLogitsError: ``output`` is a bare ``[B, C]`` tensor.
            ArgumentError: a shape does not fit, or (on the CPU only) an index is out of range.
        """
        logits = expert_logits(output)
        targets = routing_targets(logits, target)
        return routing_loss(gate_logits, targets, self.pos_weight, self.neg_weight)

    def extra_repr(self) -> str:
        """The weights, for ``repr``."""
        return f"pos_weight={self.pos_weight}, neg_weight={self.neg_weight}"
