"""Second stage of cRT and tau-normalisation: the representation stays, the classifiers change."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cifar.data import Split, augment, batches, normalise
from ride_plugin import RIDEWrapper, experts_loss
from ride_plugin.longtail import (
    ClassBalancedSampler,
    freeze_representation,
    reset_classifiers,
    tau_normalize,
)

SHARE = 0.25  # of the first stage's epochs
TAUS = [i / 10 for i in range(21)]


def retrain_classifiers(
    model: nn.Module, split: Split, epochs: int, degrees: float, generator: torch.Generator
) -> None:
    """cRT: draw every classifier anew and train it on class-balanced batches, for a quarter.

    In evaluation mode throughout, so that BatchNorm keeps the first stage's statistics.
    """
    name = _name(model)
    reset_classifiers(model, name)
    parameters = freeze_representation(model.eval(), name)
    optimizer = torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    epochs = max(1, round(SHARE * epochs))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    sampler = ClassBalancedSampler(split.labels.cpu(), seed=generator.initial_seed())
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for indices in batches(split, 128, generator, torch.tensor(list(sampler))):
            x = normalise(augment(split.images[indices], generator, degrees))
            out, y = model(x), split.labels[indices]
            if isinstance(model, RIDEWrapper):
                loss = experts_loss(F.cross_entropy, out, y)
            else:
                loss = F.cross_entropy(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()


@torch.no_grad()
def normalise_classifiers(
    model: nn.Module, split: Split, degrees: float, generator: torch.Generator
) -> float:
    """Divide by the power of the norms that is best on class-balanced augmented training images.

    There are too few images of rare classes to hold some back; on images that were trained on,
    rare classes look better than they are, so the power comes out rather too small.

    Returns:
        The power.
    """
    sampler = ClassBalancedSampler(split.labels.cpu(), seed=generator.initial_seed())
    drawn = torch.tensor(list(sampler)).to(split.labels.device)
    images = augment(split.images[drawn], generator, degrees)
    labels, model = split.labels[drawn], model.eval()

    def accuracy(tau: float) -> float:
        changed = copy.deepcopy(model)
        tau_normalize(changed, tau, classifier=_name(model))
        hits: list[Tensor] = [
            (changed(normalise(x)).argmax(1) == y).float()
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
        return float(torch.cat(hits).mean())

    best = max(TAUS, key=accuracy)
    tau_normalize(model, best, classifier=_name(model))
    return best


def _name(model: nn.Module) -> str | None:
    return None if isinstance(model, RIDEWrapper) else "linear"
