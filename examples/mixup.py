"""Mixup: pairs of images and of labels, blended; every loss takes the soft targets as they are.

A sample's temperature in the diversity loss is then the mean over its two classes.
Lines that use RIDE end in ``# RIDE``. See docs/how-to/recipes.md.
"""

import argparse

import torch
import torch.nn.functional as F
from _data import Digits, Loader
from _models import SmallResNet
from _recipes import compare, loaders, parse, sgd, test
from quickstart import augment
from torch import Tensor, nn
from torch.distributions import Beta
from torch.optim.lr_scheduler import CosineAnnealingLR

from ride_plugin import DiversityLoss, RIDEWrapper, experts_loss
from ride_plugin.longtail import ShotReport


def mix(x: Tensor, y: Tensor, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """Blend each image with another of the batch: images, and targets ``[B, C]``."""
    share = Beta(alpha, alpha).sample()
    order = torch.randperm(len(y))
    target = F.one_hot(y, 10).float()
    return share * x + (1 - share) * x[order], share * target + (1 - share) * target[order]


def train_plain(loader: Loader, epochs: int) -> nn.Module:
    model = SmallResNet()
    criterion = nn.CrossEntropyLoss()
    optimizer = sgd(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in loader:
            mixed, target = mix(augment(x), y)
            loss = criterion(model(mixed), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return model.eval()


def train_experts(loader: Loader, epochs: int, class_counts: list[int]) -> RIDEWrapper:
    model = RIDEWrapper(SmallResNet(), num_experts=3, expert_width=0.75)  # RIDE
    diversity = DiversityLoss(  # RIDE
        class_counts, start_epoch=round(0.8 * epochs)
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = sgd(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in loader:
            mixed, target = mix(augment(x), y)
            out = model(mixed)
            loss = experts_loss(criterion, out, target) + diversity(out, target)  # RIDE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        diversity.step()  # RIDE
    return model.eval()


def run(digits: Digits, arguments: argparse.Namespace) -> dict[str, ShotReport]:
    loader, _ = loaders(digits)
    counts, epochs = digits.train.class_counts, arguments.epochs
    return {
        "plain backbone, mixup": test(train_plain(loader, epochs), digits),
        "RIDE, mixup": test(train_experts(loader, epochs, counts), digits),
    }


if __name__ == "__main__":
    compare(run, parse(__doc__))
