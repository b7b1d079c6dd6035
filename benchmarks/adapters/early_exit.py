"""Early exits of a trained model: thresholds chosen on held-out sentences, measured on the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ride_plugin import (
    ConfidenceRouter,
    ExpertRouter,
    RIDEWrapper,
    RoutingInference,
    RoutingLoss,
)
from ride_plugin.longtail import shot_report
from ride_plugin.routing import RouterInputs

if TYPE_CHECKING:
    from benchmarks.adapters.train import Stored

BUDGET = 1.5  # experts per sentence, on average
EPOCHS = 30


def measure_exits(
    model: RIDEWrapper, stored: Stored, class_counts: list[int], cost: Any, seed: int
) -> dict[str, Any]:
    """Accuracy and cost of leaving early by margin and by a router, each at its own threshold."""
    torch.manual_seed(seed)
    results: dict[str, Any] = {}
    router = _router(model, stored)
    for name, gate in (("margin", ConfidenceRouter("margin")), ("router", router)):
        serve = RoutingInference(model, gate)
        serve.calibrate(_batches(stored.held_out), max_experts=BUDGET)
        outputs = [serve(state, return_routing=True) for state, _ in _batches(stored.test)]
        logits, used = (torch.cat(part) for part in zip(*outputs, strict=True))
        labels = torch.cat([labels for _, labels in _batches(stored.test)])
        report = shot_report(logits, labels, class_counts, many=50, few=10)
        shares = torch.bincount(used, minlength=model.num_experts + 1)[1:] / len(used)
        flops = [cost.trunk_flops + sum(cost.expert_flops[: k + 1]) for k in range(len(shares))]
        results[name] = {
            "accuracy": {
                k: float(getattr(report, k)) for k in ("overall", "many", "medium", "few")
            },
            "mean_experts": float(used.float().mean()),
            "shares": shares.tolist(),
            "flops": float((shares * torch.tensor(flops, dtype=torch.float32)).sum()),
        }
    return results


def _router(model: RIDEWrapper, stored: Stored) -> ExpertRouter:
    """Trained on the long-tailed training sentences, as stage two prescribes."""
    inputs, labels = [], []
    for state, target in _batches(stored.train):
        inputs.append(model.router_inputs(state))
        labels.append(target)
    logits, features = (torch.cat(part) for part in zip(*inputs, strict=True))
    target = torch.cat(labels)
    router = ExpertRouter.for_model(model)
    criterion, optimizer = RoutingLoss(), torch.optim.Adam(router.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(target)).split(256):
            read = RouterInputs(logits[rows], features[rows])
            loss = criterion(router(read), read.expert_logits, target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return router


def _batches(groups: list[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    return [
        (state.select(rows), labels[rows])
        for state, labels in groups
        for rows in torch.arange(len(labels)).split(256)
    ]
