"""Classifier re-training (cRT): keep what was learned on all images, learn the classifiers anew.

The second stage freezes the representation, BatchNorm statistics included, draws every classifier
anew and trains it on class-balanced batches. With RIDE each expert has a classifier of its own.
Lines that use RIDE end in ``# RIDE``. See docs/how-to/recipes.md.
"""

import argparse

from _data import Digits, Loader
from _models import SmallResNet
from _recipes import compare, loaders, parse, sgd, test, train_plain
from quickstart import augment
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ride_plugin import DiversityLoss, RIDEWrapper, experts_loss
from ride_plugin.longtail import ShotReport, freeze_representation, reset_classifiers


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
            out = model(augment(x))
            loss = experts_loss(criterion, out, y) + diversity(out, y)  # RIDE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        diversity.step()  # RIDE
    return model.eval()


def retrain_classifiers(model: RIDEWrapper, balanced: Loader, epochs: int) -> RIDEWrapper:
    reset_classifiers(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = sgd(freeze_representation(model))  # the model is in evaluation mode, and stays so
    scheduler = CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in balanced:
            loss = experts_loss(criterion, model(augment(x)), y)  # RIDE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return model


def run(digits: Digits, arguments: argparse.Namespace) -> dict[str, ShotReport]:
    loader, balanced = loaders(digits)
    first, second = arguments.epochs, max(1, arguments.epochs // 4)
    results = {}

    plain = train_plain(SmallResNet(), loader, nn.CrossEntropyLoss(), first)
    results["plain backbone"] = test(plain, digits)
    reset_classifiers(plain, "linear")
    heads = freeze_representation(plain, "linear")
    train_plain(plain, balanced, nn.CrossEntropyLoss(), second, heads)
    results["plain backbone, cRT"] = test(plain, digits)

    model = train_experts(loader, first, digits.train.class_counts)
    results["RIDE"] = test(model, digits)
    retrain_classifiers(model, balanced, second)
    results["RIDE, cRT"] = test(model, digits)
    return results


if __name__ == "__main__":
    compare(run, parse(__doc__))
