"""Real images that a package ships: scikit-learn's handwritten digits, made long-tailed."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

IMBALANCE = 20  # the most frequent digit has 20 times the training images of the rarest
MANY, FEW = 50, 15  # "many": more than 50 training images, "few": fewer than 15


class Digits(NamedTuple):
    """8x8 images: a long-tailed training set, two balanced sets that training never sees."""

    train: TensorDataset
    calibration: TensorDataset  # for the routing threshold; never the test set
    test: TensorDataset
    class_counts: list[int]  # training images of each class


def long_tailed_digits(seed: int) -> Digits:
    """Split scikit-learn's 1,797 digits by class, and thin the training images out to a tail.

    The test images are the same for every seed; which others train and calibrate is drawn anew.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # [N, 1, 8, 8]
    labels = torch.tensor(digits.target)
    class_counts = [round(100 * IMBALANCE ** (-c / 9)) for c in range(10)]  # 100, 72, ... 7, 5
    generator = torch.Generator().manual_seed(seed)
    train, calibration, test = [], [], []
    for c, count in enumerate(class_counts):
        of_class = (labels == c).nonzero().squeeze(1)
        test.append(of_class[:50])
        rest = of_class[50:][torch.randperm(len(of_class) - 50, generator=generator)]
        calibration.append(rest[:20])
        train.append(rest[20 : 20 + count])

    def subset(parts: list[Tensor]) -> TensorDataset:
        rows = torch.cat(parts)
        return TensorDataset(images[rows], labels[rows])

    return Digits(subset(train), subset(calibration), subset(test), class_counts)
