"""RIDE as one would first write it, for one network: what ours is measured against.

`HandSplit` is a trunk and experts written out by hand from the very modules of a wrapped model, so
both sides run the same layers. `StraightforwardRouting` carries full batches and boolean masks.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import ExpertRouter, RIDEWrapper


class HandSplit(nn.Module):
    """ResNet-32 forked after ``layer1``, by hand."""

    def __init__(self, model: RIDEWrapper) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        trunk = model.trunk
        self.trunk = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.layer1)
        self.experts = nn.ModuleList(
            nn.Sequential(e.layer2, e.layer3, e.pool, nn.Flatten(), e.linear) for e in model.experts
        )

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return torch.stack([expert(features) for expert in self.experts], dim=1)

    def expert(self, index: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and pooled features of one expert."""
        body, head = self.experts[index][:4], self.experts[index][4]
        pooled = body(features)
        return head(pooled), pooled


class StraightforwardRouting(nn.Module):
    """Early exit with boolean masks; BatchNorm as it is, layout as it comes."""

    def __init__(self, split: HandSplit, router: ExpertRouter, limits: Tensor) -> None:
        super().__init__()
        self.split, self.router, self.limits = split, router, limits

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        features = self.split.trunk(x)
        total, pooled = self.split.expert(0, features)
        out = total.clone()
        active = torch.ones(len(x), dtype=torch.bool)
        for i in range(1, len(self.split.experts)):
            go = self.router.gate(i - 1, (total / i)[active], pooled[active]) > self.limits[i - 1]
            active = active.clone().masked_scatter(active, go)
            if not active.any():
                break
            logits, some = self.split.expert(i, features[active])
            total[active] = total[active] + logits
            pooled = torch.zeros(len(x), pooled.shape[1]).masked_scatter(active[:, None], some)
            out[active] = total[active] / (i + 1)
        return out


def expert_by_expert_loss(
    experts: Tensor, target: Tensor, temperature: Tensor, weight: float
) -> Tensor:
    """Cross entropy and the official diversity term, one softmax and one call for each expert."""
    mean = experts.mean(dim=1)
    loss = experts.new_zeros(())
    for i in range(experts.shape[1]):
        logits = experts[:, i]
        loss = loss + F.cross_entropy(logits, target)
        reference = F.softmax((mean / temperature).detach(), dim=1)
        own = F.log_softmax(logits / temperature, dim=1)
        kl = F.kl_div(own, reference, reduction="batchmean")
        loss = loss - weight * temperature.mean() ** 2 * kl
    return loss


def pair_loop(experts: Tensor, temperature: Tensor, weight: float) -> Tensor:
    """The paper's diversity term, one pair after the other, other experts held constant."""
    num_experts, total = experts.shape[1], experts.new_zeros(())
    for i in range(num_experts):
        for j in range(num_experts):
            if i != j:
                own = F.log_softmax(experts[:, i] / temperature[:, None], dim=1)
                other = F.log_softmax(experts[:, j].detach() / temperature[:, None], dim=1)
                total = total + (own.exp() * (own - other)).sum(dim=1).mean()
    return -weight / (num_experts - 1) * total
