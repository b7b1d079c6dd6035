"""Stage two of a finished run: train the router, choose its threshold, measure on the test set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cifar.data import Split, augment, normalise
from benchmarks.cifar.evaluate import accuracy, flops, mean_by_class
from benchmarks.resnets import CifarResNet
from ride_plugin import (
    ConfidenceRouter,
    ExpertRouter,
    RIDEWrapper,
    RoutingInference,
    RoutingLoss,
    cost_report,
)
from ride_plugin.longtail import ClassBalancedSampler
from ride_plugin.routing import RouterInputs, routing_report

PASSES = 3  # augmented passes over the training images; what the router reads is stored
EPOCHS = 10
BUDGET = 1.1  # of the plain backbone's FLOPs


def route(
    model: RIDEWrapper, train: Split, test: Split, class_counts: Tensor, seed: int, degrees: float
) -> dict[str, Any]:
    """Train a router and measure it beside the confidence exits.

    The threshold is chosen for the budget on augmented training images, drawn with equal shares of
    the classes, never on the test set: what it really costs there is in the table. The curves are
    measured on the test set, for the figure alone; nothing is chosen from them.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    router, criterion = ExpertRouter.for_model(model), RoutingLoss(class_counts=class_counts)
    inputs, target = stored_inputs(model, train, generator, degrees)
    train_router(router, criterion.to(target.device), inputs, target, seed)
    backbone = flops(CifarResNet(len(class_counts)))
    results: dict[str, Any] = {"routed": {}, "curves": {}}
    serve = RoutingInference(model, router)
    balanced = images(_balanced(train, seed), generator, degrees)
    chosen = serve.calibrate(balanced, max_flops=BUDGET * backbone)
    results["routed"][f"router at {BUDGET} x"] = _measure(serve, test, class_counts)
    serve.set_threshold(0.5)  # what the authors use
    results["routed"]["router at 0.5"] = _measure(serve, test, class_counts)
    for kind, curve in chosen.baselines.items():
        best = curve.best_within(max_flops=BUDGET * backbone)
        exits = RoutingInference(model, ConfidenceRouter(kind))  # type: ignore[arg-type]
        exits.set_threshold(float(curve.thresholds[best]))
        results["routed"][f"{kind} at {BUDGET} x"] = _measure(exits, test, class_counts)
    measured = serve.calibrate(images(test), max_experts=model.num_experts)
    for kind, curve in {"router": measured.curve, **measured.baselines}.items():
        kept = {"flops": curve.flops.tolist(), "accuracy": curve.accuracy.tolist()}
        results["curves"][kind] = kept
    return results


def stored_inputs(
    model: RIDEWrapper, split: Split, generator: torch.Generator, degrees: float
) -> tuple[RouterInputs, Tensor]:
    """What the router reads of several augmented passes over a split, and the labels."""
    stored, labels = [], []
    for _ in range(PASSES):
        for x, y in images(split, generator, degrees):
            stored.append(model.router_inputs(x))
            labels.append(y)
    logits, features = (torch.cat(part) for part in zip(*stored, strict=True))
    return RouterInputs(logits, features), torch.cat(labels)


def train_router(
    router: ExpertRouter, criterion: RoutingLoss, inputs: RouterInputs, target: Tensor, seed: int
) -> ExpertRouter:
    """Stage two on stored inputs: seconds."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(router.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(target), generator=generator).split(256):
            chosen = rows.to(target.device)
            batch = RouterInputs(inputs.expert_logits[chosen], inputs.expert_features[chosen])
            loss = criterion(router(batch), batch, target[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return router.eval()


def _balanced(split: Split, seed: int) -> Split:
    """As many images as ``split``, every class as often as any other."""
    rows = torch.tensor(list(ClassBalancedSampler(split.labels.cpu(), seed=seed)))
    rows = rows.to(split.labels.device)
    return Split(split.images[rows], split.labels[rows])


def images(
    split: Split, generator: torch.Generator | None = None, degrees: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches in order, augmented if there is a generator."""
    for batch, labels in zip(split.images.split(500), split.labels.split(500), strict=True):
        if generator is not None:
            batch = augment(batch, generator, degrees)
        yield normalise(batch), labels


def _measure(serve: RoutingInference, test: Split, class_counts: Tensor) -> dict[str, Any]:
    outputs = [serve(x, return_routing=True) for x, _ in images(test)]
    logits, used = (torch.cat(part) for part in zip(*outputs, strict=True))
    assert isinstance(serve.model, RIDEWrapper)
    num_experts = serve.model.num_experts
    report = routing_report(used, test.labels, class_counts, num_experts=num_experts)
    shares = torch.bincount(used, minlength=num_experts + 1)[1:] / len(used)
    router = serve.router if isinstance(serve.router, ExpertRouter) else None
    cost = cost_report(serve.model, router=router, shares=shares.tolist())
    return {
        **accuracy(logits, test.labels, class_counts),
        "flops": cost.routed_flops,
        "mean_experts": float(used.float().mean()),
        "thresholds": serve.threshold.tolist(),
        "shares": shares.tolist(),
        "experts_by_class": mean_by_class(used, test.labels, len(class_counts)),
        "report": str(report),
    }
