"""Early exit by confidence alone: the baseline that a learned router has to beat."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ride_plugin._checks import check_choice, check_floating, check_predictions, is_finite, setting
from ride_plugin._numerics import float32_or_better

Kind = Literal["margin", "max_probability"]


class ConfidenceRouter(nn.Module):
    r"""A router without parameters: one more expert unless the prediction is confident.

    With $p$ the softmax of the mean logits so far and $p_{(1)} \ge p_{(2)}$ its two largest
    values, the confidence is $p_{(1)}$ (``"max_probability"``) or $p_{(1)} - p_{(2)}$
    (``"margin"``), and the gate's probability is $\sigma(g) = 1 - \text{confidence}$. So a
    threshold of 0.1 lets go whatever is at least 90 % sure. Not in the paper. The kind is not in
    the state dict: build the router with the one that its thresholds were calibrated for.

    Args:
        kind: ``"margin"`` or ``"max_probability"``. The margin was the better one on each of nine
            trained models, by 0.01 to 0.34 points at equal cost.

    Raises:
        ArgumentError: ``kind`` is neither.

    Example:
        >>> router = ConfidenceRouter("max_probability")
        >>> router.gate(0, torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.empty(2, 0)).sigmoid()
        tensor([0.0180, 0.5000])
    """

    kind: Kind = setting("kind", "What confidence is.", check_choice, get_args(Kind))

    def __init__(self, kind: Kind = "margin") -> None:
        super().__init__()
        self.kind = kind

    def gate(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """Logit of "not confident" for each row; same call as `ExpertRouter.gate`.

        Args:
            index: not used.
            mean_logits: ``[b, C]``, mean of the logits of the experts that have run.
            features: not used.

        Returns:
            ``[b]``, float32 or float64.

        Raises:
            ArgumentError: (on the CPU only) a row's logits hold NaN or +inf.
        """
        check_floating(mean_logits, "mean_logits", "b", "C")
        # log((1 - p) / p) from the logits themselves: 1 - p alone would lose all its digits
        # where p is close to one, which is where most samples are.
        log_p = float32_or_better(mean_logits).log_softmax(dim=1)
        best, where = log_p.max(dim=1, keepdim=True)
        others = log_p.scatter(1, where, -torch.inf)
        log_rest = others.logsumexp(dim=1)
        if self.kind == "max_probability":
            gate = log_rest - best.squeeze(1)
        else:
            second = others.amax(dim=1)
            margin = best.squeeze(1) + torch.log(-torch.expm1(second - best.squeeze(1)))
            gate = torch.logaddexp(log_rest, second) - margin
        if not is_finite(gate):  # NaN if a logit is no number, infinite if all or nothing is sure
            check_predictions(mean_logits, "`mean_logits`")
        return gate

    def extra_repr(self) -> str:
        """The kind, for ``repr``."""
        return repr(self.kind)
