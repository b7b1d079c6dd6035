"""Test-set figures of a trained model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar.data import Split, normalise
from ride_plugin import RIDEWrapper, count_flops
from ride_plugin.longtail import adjust_logits, analyze, shot_report
from ride_plugin.routing import RouterInputs

SHOTS = ("overall", "many", "medium", "few")
TAUS = (-0.6, -0.4, -0.2, 0.0, 0.25, 0.5, 0.75, 1.0)


def evaluate(model: nn.Module, split: Split, class_counts: Tensor) -> dict[str, Any]:
    """Accuracy overall, by shot and by class, of the mean and of each expert; FLOPs per image."""
    experts, labels, counts = predict(model, split).cpu(), split.labels.cpu(), class_counts.tolist()
    analysis = analyze(experts, labels, counts)
    result = {
        **accuracy(experts.mean(1), labels, class_counts),
        "by_tau": by_tau(experts.mean(1), labels, counts),
        "flops": flops(model),
        "calibration_error": vars(analysis.calibration_error),
    }
    if experts.shape[1] > 1:
        assert analysis.disagreement is not None
        choices, pairs = experts.argmax(2), experts.shape[1] * (experts.shape[1] - 1)
        differ = (choices[:, :, None] != choices[:, None]).sum((1, 2)) / pairs
        result["experts"] = [vars(value) for value in analysis.expert_accuracy]
        result["disagreement"] = vars(analysis.disagreement)
        result["disagreement_by_class"] = mean_by_class(differ, labels, len(counts))
    return result


def accuracy(logits: Tensor, labels: Tensor, class_counts: Tensor) -> dict[str, Any]:
    """Top-1 accuracy overall, by shot and by class; None for an empty group."""
    report = shot_report(logits.cpu(), labels.cpu(), class_counts.tolist())
    groups = {name: getattr(report, name) for name in SHOTS}
    correct = logits.argmax(1) == labels
    return {"accuracy": groups, "per_class": mean_by_class(correct, labels, len(class_counts))}


def by_tau(logits: Tensor, labels: Tensor, counts: list[int]) -> list[dict[str, Any]]:
    """Accuracy by shot with the logits adjusted after training, over a fixed range of tau."""
    rows = []
    for tau in TAUS:
        report = shot_report(adjust_logits(logits, counts, tau), labels, counts)
        rows.append({"tau": tau, **{name: getattr(report, name) for name in SHOTS}})
    return rows


def mean_by_class(values: Tensor, labels: Tensor, num_classes: int) -> list[float]:
    """Mean over the samples of each class."""
    labels = labels.cpu()
    total = torch.zeros(num_classes).index_add_(0, labels, values.float().cpu())
    return (total / labels.bincount(minlength=num_classes)).tolist()


@torch.no_grad()
def predict(model: nn.Module, split: Split, batch_size: int = 500) -> Tensor:
    """Logits ``[N, E, C]`` in evaluation mode, float32; one expert for a plain backbone."""
    if isinstance(model, RIDEWrapper):
        return router_inputs(model, split, batch_size).expert_logits.float()
    model.eval()
    parts = [model(normalise(images)).float() for images in split.images.split(batch_size)]
    return torch.cat(parts)[:, None]


@torch.no_grad()
def router_inputs(model: RIDEWrapper, split: Split, batch_size: int = 500) -> RouterInputs:
    """What the router reads of a whole split, computed once."""
    parts = [model.router_inputs(normalise(images)) for images in split.images.split(batch_size)]
    return RouterInputs(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def flops(model: nn.Module) -> int:
    """FLOPs of one image, two for each multiply-add, all experts running."""
    device = next(model.parameters()).device
    image = torch.zeros(1, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    return count_flops(model.eval(), image)
