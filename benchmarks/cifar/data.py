"""CIFAR made long-tailed, held on the device as uint8, and augmented there in whole batches."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.coverage.environment import let_torchvision_import
from ride_plugin.longtail import long_tailed_indices

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class Split:
    """Images ``[N, 3, 32, 32]`` uint8 and labels ``[N]`` int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(path: Path, imbalance: float, device: torch.device) -> tuple[Split, Split, Tensor]:
    """Read a data set and make its training split long-tailed.

    Args:
        path: the ``cifar-100-python`` or ``cifar-10-batches-py`` folder, or an ``.npz`` with
            ``train_images, train_labels, test_images, test_labels`` that is long-tailed already.
        imbalance: largest over smallest class count; ignored for an ``.npz``.
        device: where the images go.

    Returns:
        Training split, test split, class counts ``[C]``.
    """
    if path.suffix == ".npz":
        arrays = np.load(path)
        train = arrays["train_images"], arrays["train_labels"]
        test = arrays["test_images"], arrays["test_labels"]
    elif (path / "train").exists():
        train, test = (_read(path / name, b"fine_labels") for name in ("train", "test"))
    else:
        parts = [_read(path / f"data_batch_{i}", b"labels") for i in range(1, 6)]
        pixels_of, labels_of = zip(*parts, strict=True)
        train = np.concatenate(pixels_of), np.concatenate(labels_of)
        test = _read(path / "test_batch", b"labels")
    if path.suffix != ".npz":
        chosen = np.asarray(long_tailed_indices(train[1], imbalance, seed=0))
        train = train[0][chosen], train[1][chosen]
    splits = []
    for images, labels in (train, test):
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        splits.append(Split(pixels.contiguous().to(device), torch.as_tensor(labels).to(device)))
    return splits[0], splits[1], splits[0].labels.bincount().cpu()


def _read(file: Path, label_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    with file.open("rb") as stream:
        content = pickle.load(stream, encoding="bytes")  # the data set's own format
    images = content[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.asarray(content[label_key], dtype=np.int64)


def normalise(images: Tensor) -> Tensor:
    """Scale uint8 images to zero mean and unit deviation, channels-last."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator, degrees: float) -> Tensor:
    """Random crop with padding 4, flip and rotation, one draw per image, in one gather.

    Crop, flip and rotation are one affine map each, so one ``grid_sample`` does all three when
    there is a rotation; without one, the crop is an exact gather.
    """
    n, device = len(images), images.device

    def draw(low: float, high: float) -> Tensor:
        return (torch.rand(n, generator=generator) * (high - low) + low).to(device)

    flip = (draw(0, 1) < 0.5).float() * 2 - 1
    shift_x, shift_y = (draw(0, 9).floor() - 4 for _ in range(2))
    if degrees == 0:
        padded = F.pad(images, (4, 4, 4, 4))
        ramp = torch.arange(32, device=device)
        rows = (shift_y + 4).long()[:, None] + ramp
        columns = torch.where(flip[:, None] > 0, ramp, 31 - ramp) + (shift_x + 4).long()[:, None]
        batch = torch.arange(n, device=device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2)
    angle = draw(-degrees, degrees) * (torch.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * flip, -sin, shift_x / 16], dim=1)
    second = torch.stack([sin * flip, cos, shift_y / 16], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), [n, 3, 32, 32], align_corners=False)
    mode = "nearest"  # what the usual rotation of images does
    return F.grid_sample(images.float(), grid, mode=mode, align_corners=False)


def augment_strongly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop and flip, AutoAugment's policy for CIFAR-10, then a square of 16 pixels cut out.

    What SHIKE, MDCS, NCL and PaCo train on. The policy is torchvision's, one draw per image from
    torch's global generator.
    """
    let_torchvision_import()
    from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    images = torch.stack([policy(image) for image in augment(images, generator, 0.0)])
    centers = torch.randint(32, (2, len(images), 1), generator=generator).to(images.device)
    distances = torch.arange(32, device=images.device) - centers
    rows, columns = (distances >= -8) & (distances < 8)
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)


def batches(
    split: Split, batch_size: int, generator: torch.Generator, order: Tensor | None = None
) -> Iterator[Tensor]:
    """Index batches of one epoch; ``order`` replaces the shuffle, for class-balanced sampling."""
    if order is None:
        order = torch.randperm(len(split), generator=generator)
    for indices in order.split(batch_size):
        if len(indices) > 1:  # BatchNorm needs two
            yield indices.to(split.labels.device)
