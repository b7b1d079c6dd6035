"""Decoupling: mend the classifiers of a trained model by their norms, for each expert by itself.

Frequent classes get classifier weights of larger norm. tau-normalisation divides by a power of the
norm, chosen on held-out images; learnable weight scaling (LWS) learns one factor a class on
class-balanced batches. Lines that use RIDE end in ``# RIDE``. See docs/how-to/recipes.md.
"""

import argparse
import copy

import torch
from _data import Digits, Loader
from _models import SmallResNet
from _recipes import compare, loaders, parse, sgd, test, train_plain
from crt import train_experts
from quickstart import augment
from torch import nn
from torch.utils.data import TensorDataset

from ride_plugin import RIDEWrapper, experts_loss
from ride_plugin.longtail import (
    ShotReport,
    freeze_representation,
    learnable_weight_scaling,
    tau_normalize,
)

TAUS = [i / 10 for i in range(21)]


def choose_tau(model: nn.Module, held_out: TensorDataset, classifier: str | None = None) -> float:
    """The power that is most accurate on balanced held-out images; the smallest of equals."""
    x, y = held_out.tensors

    def accuracy(tau: float) -> float:
        changed = copy.deepcopy(model)
        tau_normalize(changed, tau, classifier=classifier)
        with torch.no_grad():
            return float((changed(x).argmax(dim=1) == y).float().mean())

    return max(TAUS, key=accuracy)


def scale_weights(model: RIDEWrapper, balanced: Loader, epochs: int) -> RIDEWrapper:
    freeze_representation(model)
    scalings = learnable_weight_scaling(model)  # one for each expert
    optimizer = sgd([scaling.scale for scaling in scalings], lr=0.2)
    criterion = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for x, y in balanced:
            loss = experts_loss(criterion, model(augment(x)), y)  # RIDE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def run(digits: Digits, arguments: argparse.Namespace) -> dict[str, ShotReport]:
    loader, balanced = loaders(digits)
    epochs = arguments.epochs
    results = {}

    plain = train_plain(SmallResNet(), loader, nn.CrossEntropyLoss(), epochs)
    results["plain backbone"] = test(plain, digits)
    tau = choose_tau(plain, digits.calibration, "linear")
    tau_normalize(plain, tau, classifier="linear")
    results["plain backbone, tau"] = test(plain, digits)

    model = train_experts(loader, epochs, digits.train.class_counts)  # RIDE
    results["RIDE"] = test(model, digits)
    normalised = copy.deepcopy(model)
    tau_normalize(normalised, choose_tau(model, digits.calibration))
    results["RIDE, tau"] = test(normalised, digits)
    results["RIDE, LWS"] = test(scale_weights(model, balanced, max(1, epochs // 4)), digits)
    return results


if __name__ == "__main__":
    compare(run, parse(__doc__))
