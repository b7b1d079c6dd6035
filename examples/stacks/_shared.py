"""Data and a backbone for every script here: nothing in this file knows of the training stack."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).resolve().parents[1]))

from _data import long_tailed_digits
from _models import SmallResNet

NUM_CLASSES = 10


def digits(batch_size: int = 64) -> tuple[DataLoader, DataLoader, list[int]]:
    """Long-tailed training batches, balanced test batches, and the images of each class."""
    data = long_tailed_digits(seed=0)
    train = DataLoader(data.train, batch_size, shuffle=True)
    return train, DataLoader(data.test, 500), data.train.class_counts


def backbone() -> nn.Module:
    """A ResNet-8 with random weights."""
    torch.manual_seed(0)
    return SmallResNet(NUM_CLASSES)


@torch.no_grad()
def accuracy(model: nn.Module, test: DataLoader) -> float:
    """Share of the test images whose largest logit is their class, in per cent."""
    model.eval()
    hits: list[Tensor] = [model(x).argmax(1) == y for x, y in test]
    return 100 * torch.cat(hits).float().mean().item()
