"""Naive recomputations that share nothing with the library: loops, float64, autograd."""

import torch
from torch import Tensor


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) for each row of logits ``[..., C]``."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def pairwise_kl(logits: Tensor, temperature: Tensor, detach_others: bool) -> Tensor:
    num_experts = logits.shape[1]
    experts = [logits[:, i] / temperature[:, None] for i in range(num_experts)]
    total = torch.zeros(len(logits), dtype=logits.dtype)
    for i, own in enumerate(experts):
        for j, other in enumerate(experts):
            if i != j:
                total = total + kl(own, other.detach() if detach_others else other)
    return total / (num_experts - 1)


def kl_from_mean(logits: Tensor, temperature: Tensor) -> Tensor:
    mean = logits.mean(1).detach() / temperature
    total = torch.zeros(len(logits), dtype=logits.dtype)
    for i in range(logits.shape[1]):
        total = total + kl(mean, logits[:, i] / temperature)
    return temperature.mean() ** 2 * total


def ldam(logits: Tensor, target: Tensor, counts: Tensor, weight: Tensor | None = None) -> Tensor:
    """LDAM with max_m 0.5 and scale 30, the classification loss of the reference numbers."""
    margins = counts.double() ** -0.25
    margins = margins * 0.5 / margins.max()
    shifted = logits.clone()
    for row, label in enumerate(target.tolist()):
        shifted[row, label] -= 30 * margins[label]
    return torch.nn.functional.cross_entropy(shifted, target, weight=weight)
