"""Real images that a package ships: scikit-learn's handwritten digits, made long-tailed."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ride_plugin.longtail import LongTailedSubset

IMBALANCE = 20  # the most frequent digit has 100 training images, the rarest 5
MANY, FEW = 50, 15  # "many": more than 50 training images, "few": fewer than 15


Loader = DataLoader[tuple[Tensor, ...]]


class Digits(NamedTuple):
    """8x8 images: a long-tailed training set, two balanced sets that training never sees."""

    train: LongTailedSubset  # knows its `class_counts`
    calibration: TensorDataset  # for the routing threshold; never the test set
    test: TensorDataset


def long_tailed_digits(seed: int) -> Digits:
    """Split scikit-learn's 1,797 digits, and thin the training images out to a tail.

    The test images are the same for every seed; which others train and calibrate is drawn anew.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # [N, 1, 8, 8]
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    test, calibration, rest = [], [], []
    for c in range(10):
        of_class = (labels == c).nonzero().squeeze(1)
        test.append(of_class[:50])
        others = of_class[50:][torch.randperm(len(of_class) - 50, generator=generator)]
        calibration.append(others[:20])
        rest.append(others[20:])

    def subset(parts: list[Tensor]) -> TensorDataset:
        rows = torch.cat(parts)
        return TensorDataset(images[rows], labels[rows])

    train = LongTailedSubset(subset(rest), IMBALANCE, max_count=100, seed=seed)
    return Digits(train, subset(calibration), subset(test))
