"""LDAM with deferred re-weighting (DRW), on the plain backbone and with RIDE.

LDAM asks rare classes to win by a larger margin, which needs a cosine classifier; DRW gives them
more weight in the last epochs. RIDE's class temperatures start in the same epoch as DRW.
Lines that use RIDE end in ``# RIDE``. See docs/how-to/recipes.md.
"""

import argparse

from _data import Digits, Loader
from _models import SmallResNet
from _recipes import compare, loaders, parse, sgd, test
from quickstart import augment
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from ride_plugin import DiversityLoss, RIDEWrapper, experts_loss
from ride_plugin.longtail import CosineClassifier, DeferredReweighting, LDAMLoss, ShotReport


def train_plain(loader: Loader, epochs: int, class_counts: list[int]) -> nn.Module:
    model = SmallResNet()
    model.linear = CosineClassifier(64, 10)
    criterion = LDAMLoss(class_counts)
    drw = DeferredReweighting(criterion, class_counts, start_epoch=round(0.8 * epochs))
    optimizer = sgd(model.parameters())
    scheduler = MultiStepLR(optimizer, [round(0.8 * epochs), round(0.9 * epochs)])
    for _ in range(epochs):
        for x, y in loader:
            loss = criterion(model(augment(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        drw.step()
    return model.eval()


def train_experts(loader: Loader, epochs: int, class_counts: list[int], weight: float) -> nn.Module:
    model = RIDEWrapper(  # RIDE
        SmallResNet(), num_experts=3, expert_width=0.75, classifier="cosine"
    )
    criterion = LDAMLoss(class_counts)
    drw = DeferredReweighting(criterion, class_counts, start_epoch=round(0.8 * epochs))
    diversity = DiversityLoss(  # RIDE
        class_counts, weight=weight, start_epoch=drw.start_epoch
    )
    optimizer = sgd(model.parameters())
    scheduler = MultiStepLR(optimizer, [round(0.8 * epochs), round(0.9 * epochs)])
    for _ in range(epochs):
        for x, y in loader:
            out = model(augment(x))
            loss = experts_loss(criterion, out, y) + diversity(out, y)  # RIDE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        drw.step()
        diversity.step()  # RIDE
    return model.eval()


def run(digits: Digits, arguments: argparse.Namespace) -> dict[str, ShotReport]:
    loader, _ = loaders(digits)
    counts, epochs = digits.train.class_counts, arguments.epochs
    return {
        "LDAM-DRW": test(train_plain(loader, epochs, counts), digits),
        "RIDE, no diversity": test(train_experts(loader, epochs, counts, 0.0), digits),
        "RIDE": test(train_experts(loader, epochs, counts, 0.2), digits),
    }


if __name__ == "__main__":
    compare(run, parse(__doc__))
