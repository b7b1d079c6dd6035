"""Balanced softmax, and a different logit adjustment for each expert.

Logit adjustment adds ``tau * log(n_c / n)`` to the logits in training: at 0 an expert fits the long
tail, at 1 a balanced test set (balanced softmax), at 2 an inverted tail. A list of criteria gives
each expert its own, as later multi-expert methods do: no other line of the loop knows of it.
Experts that fit different priors differ already, so there is no diversity term.
Lines that use RIDE end in ``# RIDE``. See docs/how-to/recipes.md.
"""

import argparse

from _data import Digits, Loader
from _models import SmallResNet
from _recipes import compare, loaders, parse, sgd, test, train_plain
from quickstart import augment
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ride_plugin import RIDEWrapper, experts_loss
from ride_plugin.longtail import BalancedSoftmaxLoss, LogitAdjustedLoss, ShotReport


def train_experts(
    loader: Loader, epochs: int, class_counts: list[int], taus: list[float]
) -> RIDEWrapper:
    model = RIDEWrapper(SmallResNet(), num_experts=len(taus), expert_width=0.75)  # RIDE
    criteria = [LogitAdjustedLoss(class_counts, tau=tau) for tau in taus]  # RIDE: one an expert
    optimizer = sgd(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in loader:
            out = model(augment(x))
            loss = experts_loss(criteria, out, y)  # RIDE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return model.eval()


def run(digits: Digits, arguments: argparse.Namespace) -> dict[str, ShotReport]:
    loader, _ = loaders(digits)
    counts, epochs = digits.train.class_counts, arguments.epochs
    plain = train_plain(SmallResNet(), loader, nn.CrossEntropyLoss(), epochs)
    balanced = train_plain(SmallResNet(), loader, BalancedSoftmaxLoss(counts), epochs)
    same = train_experts(loader, epochs, counts, [1.0, 1.0, 1.0])
    different = train_experts(loader, epochs, counts, [1.0, 0.0, 2.0])
    return {
        "plain backbone": test(plain, digits),
        "plain backbone, balanced softmax": test(balanced, digits),
        "RIDE, adjusted by 1, 1, 1": test(same, digits),
        "RIDE, adjusted by 1, 0, 2": test(different, digits),
    }


if __name__ == "__main__":
    compare(run, parse(__doc__))
