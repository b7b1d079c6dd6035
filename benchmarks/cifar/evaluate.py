"""Test-set figures of a trained model."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cifar.data import Split, normalise
from ride_plugin import RIDEWrapper, RouterInputs
from ride_plugin.longtail import shot_report


def evaluate(model: nn.Module, split: Split, class_counts: Tensor) -> dict[str, Any]:
    """Accuracy overall and by shot, accuracy of each class, FLOPs per image."""
    logits = predict(model, split)
    return {**accuracy(logits, split.labels, class_counts), "flops": flops(model)}


def accuracy(logits: Tensor, labels: Tensor, class_counts: Tensor) -> dict[str, Any]:
    """Top-1 accuracy overall, by shot and by class; None for an empty group."""
    report = shot_report(logits.cpu(), labels.cpu(), class_counts.tolist())
    groups = {name: getattr(report, name) for name in ("overall", "many", "medium", "few")}
    correct = (logits.argmax(1) == labels).float().cpu()
    hits = torch.zeros(len(class_counts)).index_add_(0, labels.cpu(), correct)
    size = labels.cpu().bincount(minlength=len(class_counts))
    return {"accuracy": groups, "per_class": (hits / size).tolist()}


@torch.no_grad()
def predict(model: nn.Module, split: Split, batch_size: int = 500) -> Tensor:
    """Logits ``[N, C]`` in evaluation mode, float32."""
    model.eval()
    parts = [model(normalise(images)).float() for images in split.images.split(batch_size)]
    return torch.cat(parts)


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
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops())


def device_name(device: torch.device) -> str:
    """The card's name, or the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
