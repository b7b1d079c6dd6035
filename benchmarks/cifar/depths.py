"""Experts that look at different depths: the first part of SHIKE (arXiv 2304.01279)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from benchmarks.resnets import CifarResNet
from ride_plugin import RIDEWrapper


class ShallowAndDeep(CifarResNet):
    """A CIFAR ResNet whose last features are multiplied by aligned features of an earlier stage.

    Strided convolutions bring the earlier features to the size of the last; a ReLU follows the
    first of them alone, as in SHIKE's code.

    Args:
        num_classes: ``C``.
        source: 1 or 2, the stage whose result is aligned.
        width: share of the channels that ``layer2``, ``layer3`` and the alignment have.
    """

    def __init__(self, num_classes: int, source: int, width: float) -> None:
        super().__init__(num_classes)
        middle, last = int(32 * width), int(64 * width)
        self.source = source
        self.layer2 = self.stage(16, middle, 2)
        self.layer3 = self.stage(middle, last, 2)
        self.linear = nn.Linear(last, num_classes)
        layers: list[nn.Module] = []
        for before, after in pairwise((16, middle, last)[source - 1 :]):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after)]
            layers += [nn.ReLU()] if len(layers) == 2 else []
        self.align = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer1(self.relu(self.bn1(self.conv1(x))))
        second = self.layer2(first)
        early = self.align(first if self.source == 1 else second)
        logits: Tensor = self.linear(self.pool(self.layer3(second) * early).flatten(1))
        return logits


def mixed_depths(num_classes: int, num_experts: int, width: float) -> RIDEWrapper:
    """Experts with cosine classifiers that look at the first and at the second stage in turn."""
    return RIDEWrapper(
        ShallowAndDeep(num_classes, 1, width),
        num_experts,
        fork_at="layer2",
        expert_factory=lambda k: ShallowAndDeep(num_classes, 1 + k % 2, width),
        classifier="cosine",
    )
