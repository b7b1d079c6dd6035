"""Distillation: six experts teach three, which cost half as much.

The teacher is in evaluation mode and gets no gradient. Each expert of the student learns from it;
``--form official`` distils the mean of the student's experts instead, as the authors' code does.
Lines that use RIDE end in ``# RIDE``. See docs/how-to/recipes.md.
"""

import argparse
from typing import Literal

import torch
from _data import Digits, Loader
from _models import SmallResNet
from _recipes import compare, loaders, sgd, test
from quickstart import augment
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ride_plugin import DistillationLoss, DiversityLoss, RIDEWrapper, experts_loss
from ride_plugin.longtail import ShotReport


def train_experts(
    num_experts: int,
    loader: Loader,
    epochs: int,
    class_counts: list[int],
    teacher: RIDEWrapper | None = None,
    form: Literal["per_expert", "official"] = "per_expert",
) -> RIDEWrapper:
    model = RIDEWrapper(SmallResNet(), num_experts, expert_width=0.75)  # RIDE
    diversity = DiversityLoss(  # RIDE
        class_counts, start_epoch=round(0.8 * epochs)
    )
    distillation = DistillationLoss(form=form)  # RIDE
    criterion = nn.CrossEntropyLoss()
    optimizer = sgd(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in loader:
            x = augment(x)  # teacher and student see the same images
            out = model(x)
            loss = experts_loss(criterion, out, y) + diversity(out, y)  # RIDE
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher(x)
                loss = loss + distillation(out, taught)  # RIDE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        diversity.step()  # RIDE
    return model.eval()


def run(digits: Digits, arguments: argparse.Namespace) -> dict[str, ShotReport]:
    loader, _ = loaders(digits)
    common = (loader, arguments.epochs, digits.train.class_counts)
    teacher = train_experts(6, *common)
    alone = train_experts(3, *common)
    student = train_experts(3, *common, teacher=teacher, form=arguments.form)
    return {
        "teacher, 6 experts": test(teacher, digits),
        "3 experts alone": test(alone, digits),
        "3 experts, taught": test(student, digits),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="draws of data and weights")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--form", choices=["per_expert", "official"], default="per_expert")
    return parser.parse_args()


if __name__ == "__main__":
    compare(run, parse())
