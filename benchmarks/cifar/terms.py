"""Terms of the loss that were tried beside the library's own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ride_plugin import DiversityLoss
from ride_plugin.functional import sample_temperatures


class BoundedDiversity(DiversityLoss):
    """The paper's term, with the reward of a pair capped: beyond `cap` nats there is no gradient.

    minus lambda / B * sum_b 1 / (E - 1) * sum_i sum_{j != i} min(KL(p_i || p_j), cap), the others
    held constant as in the paper's form of `DiversityLoss`.
    """

    cap = 1.0

    def __init__(self, class_counts: list[int], **options: Any) -> None:
        super().__init__(class_counts, form="paper", **options)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Map expert logits ``[B, E, C]`` and targets to the weighted batch mean."""
        output, (batch, num_experts, _) = output.float(), output.shape
        temperature = self.schedule.temperature
        temperature = sample_temperatures(temperature, target)[:, None, None]
        log_p = F.log_softmax(output / temperature, dim=-1)
        p = log_p.exp()
        entropy = (p * log_p).sum(-1)[:, :, None]
        divergence = entropy - p @ log_p.detach().transpose(1, 2)  # [B, i, j]; zero for i = j
        reward = divergence.clamp(max=self.cap).sum() / (num_experts - 1)
        return -self.weight / batch * reward


def consistency(weak: Tensor, strong: Tensor, target: Tensor) -> Tensor:
    """MDCS's self-distillation (arXiv 2308.09922): the weak view teaches the strong one.

    sum_i 1 / |R_i| * sum_{b in R_i} KL(softmax(weak_bi) || softmax(strong_bi)), where R_i are the
    samples that expert i predicts rightly in the weak view, which is held constant.

    Args:
        weak: expert logits ``[B, E, C]`` of the weak view, as the criterion sees them.
        strong: those of the strong view.
        target: class indices ``[B]``.
    """
    teacher = weak.detach().float().log_softmax(-1)
    right = (teacher.argmax(-1) == target[:, None]).float()
    student = strong.float().log_softmax(-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return ((divergence * right).sum(0) / right.sum(0).clamp(min=1)).sum()
