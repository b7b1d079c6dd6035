"""RIDE as one would first write it, for one network: what ours is measured against.

`HandSplit` is a trunk and experts written out by hand from the very modules of a wrapped model, so
both sides run the same layers. `StraightforwardRouting` carries full batches and boolean masks.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import ExpertRouter, RIDEWrapper


class HandSplit(nn.Module):
    """The layers of a wrapped model, forked by hand: names of the trunk's and of an expert's."""

    def __init__(
        self,
        model: RIDEWrapper,
        trunk: tuple[str, ...],
        body: tuple[str, ...],
        classifier: str = "linear",
    ) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.trunk = nn.Sequential(*(getattr(model.trunk, name) for name in trunk))
        self.experts = nn.ModuleList(
            nn.Sequential(
                *(getattr(expert, name) for name in body),
                nn.Flatten(),
                getattr(expert, classifier),
            )
            for expert in model.experts
        )

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return torch.stack([expert(features) for expert in self.experts], dim=1)

    def expert(self, index: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and pooled features of one expert."""
        layers = self.experts[index]
        assert isinstance(layers, nn.Sequential)
        pooled = layers[:-1](features)
        return layers[-1](pooled), pooled


class Gates(Protocol):
    """What early exit asks of a router."""

    def gate(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """One logit for each row: positive to go on."""
        ...


class StraightforwardRouting(nn.Module):
    """Early exit with boolean masks; BatchNorm as it is, layout as it comes."""

    def __init__(self, split: HandSplit, router: Gates, limits: Tensor) -> None:
        super().__init__()
        self.split, self.router, self.limits = split, router, limits

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        features = self.split.trunk(x)
        total, pooled = self.split.expert(0, features)
        out = total.clone()
        active = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for i in range(1, len(self.split.experts)):
            go = self.router.gate(i - 1, (total / i)[active], pooled[active]) > self.limits[i - 1]
            active = active.clone().masked_scatter(active, go)
            if not active.any():
                break
            logits, some = self.split.expert(i, features[active])
            total[active] = total[active] + logits
            pooled = some.new_zeros(len(x), some.shape[1]).masked_scatter(active[:, None], some)
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


def router_step_by_expert(
    split: HandSplit,
    router: ExpertRouter,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    target: Tensor,
    pos_weight: float = 100.0,
) -> None:
    """One step of stage two: every expert, then each gate's target and loss by itself."""
    features = split.trunk(x)
    logits, pooled = zip(
        *(split.expert(i, features) for i in range(len(split.experts))), strict=True
    )
    loss = x.new_zeros(())
    for i in range(len(logits) - 1):
        mean = sum(logits[: i + 1]) / (i + 1)
        right_now = mean.argmax(dim=1) == target
        right_later = torch.zeros_like(right_now)
        for k in range(i + 1, len(logits)):
            right_later |= sum(logits[: k + 1]).argmax(dim=1) == target
        needed = (~right_now & right_later).float()
        weight = torch.where(needed > 0, pos_weight, 1.0)
        gate = router.gate(i, mean, pooled[i])
        loss = loss + F.binary_cross_entropy_with_logits(gate, needed, weight)
    optimizer.zero_grad()
    (loss / (len(logits) - 1)).backward()
    optimizer.step()
