"""What the router learns: targets and loss of stage two (paper, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin._numerics import float32_or_better
from ride_plugin._errors import ArgumentError
from ride_plugin._output import Output, expert_logits
from ride_plugin._checks import check_target


def routing_targets(expert_logits: Tensor, target: Tensor) -> Tensor:
    r"""Tell which samples would gain from one more expert.

    With $\hat y_i = \arg\max_c \sum_{j \le i} z_{jc}$ the prediction of the first $i + 1$ experts,

    $$y_i = [\hat y_i \ne y] \cdot [\exists\, k > i: \hat y_k = y], \qquad i = 0 \dots E-2.$$

    (Paper, section 3, "Routing": wrong so far, and right with more experts.)

    Args:
        expert_logits: ``[B, E, C]``.
        target: class indices ``[B]``, or probabilities ``[B, C]``, of which the most probable
            class counts.

    Returns:
        bool ``[B, E-1]``.

    Raises:
        ArgumentError: a shape does not fit, or (on the CPU only) an index is out of range.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0], [3.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> routing_targets(logits, torch.tensor([0, 0]))
        tensor([[ True],
                [False]])
    """
    classes = _class_indices(target, expert_logits)
    right = (
        float32_or_better(expert_logits.detach()).cumsum(dim=1).argmax(dim=2) == classes[:, None]
    )
    # cummax does not take booleans; from the back it says "right here or at some later expert".
    right_later = right.int().flip(1).cummax(dim=1).values.flip(1).bool()
    return ~right[:, :-1] & right_later[:, 1:]


def routing_loss(
    gate_logits: Tensor, targets: Tensor, pos_weight: float = 100.0, neg_weight: float = 1.0
) -> Tensor:
    r"""Weighted binary cross entropy of the gates, averaged over samples and gates.

    $$L = \frac{1}{B(E-1)} \sum_{b,i} -w_p\, y_{bi} \log\sigma(g_{bi})
    - w_n\, (1 - y_{bi}) \log(1 - \sigma(g_{bi})).$$

    (Paper, section 3, "Routing"; averaged over the gates, as in the authors' code.)

    Args:
        gate_logits: ``[B, E-1]``; half precision is computed in float32.
        targets: bool ``[B, E-1]``, from `routing_targets`.
        pos_weight: $w_p$, weight of samples that need one more expert.
        neg_weight: $w_n$, weight of the others.

    Returns:
        scalar, float32 or float64.

    Example:
        >>> routing_loss(torch.zeros(1, 2), torch.tensor([[True, False]]))
        tensor(35.0039)
    """
    if gate_logits.shape != targets.shape:
        raise ArgumentError(
            f"Expected argument `gate_logits` to have shape {list(targets.shape)} ([B, E-1]), but "
            f"got {list(gate_logits.shape)}. Pass the router's output for the same batch."
        )
    wide = float32_or_better(gate_logits)
    positive = -pos_weight * F.logsigmoid(wide)
    negative = -neg_weight * F.logsigmoid(-wide)
    return torch.where(targets, positive, negative).mean()


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
        >>> criterion = RoutingLoss()
        >>> gate_logits = torch.zeros(4, 2, requires_grad=True)
        >>> loss = criterion(gate_logits, torch.randn(4, 3, 10), torch.tensor([0, 1, 2, 3]))
        >>> loss.backward()
    """

    def __init__(self, pos_weight: float = 100.0, neg_weight: float = 1.0) -> None:
        super().__init__()
        for name, weight in (("pos_weight", pos_weight), ("neg_weight", neg_weight)):
            if not 0 <= weight < float("inf"):
                raise ArgumentError(
                    f"Expected argument `{name}` to be finite and not negative, but got {weight}."
                )
        self.pos_weight = pos_weight
        self.neg_weight = neg_weight

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


def _class_indices(target: Tensor, experts: Tensor) -> Tensor:
    if experts.dim() != 3 or experts.shape[1] < 2:
        raise ArgumentError(
            "Expected argument `expert_logits` to have shape [B, E, C] with at least two experts, "
            f"but got {list(experts.shape)}."
        )
    batch, _, num_classes = experts.shape
    check_target(target, batch, num_classes)
    if target.is_floating_point():
        return target.argmax(dim=1)
    # Reading the range on an accelerator would stall every step; there an index out of range
    # equals no prediction, so its sample counts as one that nothing helps.
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = target[(target < 0) | (target >= num_classes)]
        if outside.numel():
            raise ArgumentError(
                f"Expected argument `target` to hold class indices from 0 to {num_classes - 1}, "
                f"but got {int(outside[0])}. Check that the model was built with as many classes "
                "as the data have, and drop samples without a label."
            )
    return target
