"""The residual networks of the benchmarks and of the tests: CIFAR's and ImageNet's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Option A of the ResNet paper: every other position, then zero channels; no parameters."""

    def __init__(self, missing: int) -> None:
        super().__init__()
        self.missing = missing

    def forward(self, x: Tensor) -> Tensor:
        half = self.missing // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.missing - half))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        shortcut: Callable[[int], nn.Module] = PadShortcut,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else shortcut(channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images as long-tailed recognition uses it; n = 5 is ResNet-32.

    ResNet-32 has 0.46 million parameters and 69 million multiply-adds for an image.
    """

    def __init__(
        self,
        num_classes: int = 100,
        n: int = 5,
        head: Callable[[int, int], nn.Module] = nn.Linear,
        shortcut: Callable[[int], nn.Module] = PadShortcut,
        channels: int = 16,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self.stage(channels, channels, 1, n, shortcut)
        self.layer2 = self.stage(channels, 2 * channels, 2, n, shortcut)
        self.layer3 = self.stage(2 * channels, 4 * channels, 2, n, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = head(4 * channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def stage(
        in_channels: int,
        channels: int,
        stride: int,
        n: int = 5,
        shortcut: Callable[[int], nn.Module] = PadShortcut,
    ) -> nn.Sequential:
        """The blocks of one resolution."""
        first = CifarBlock(in_channels, channels, stride, shortcut)
        return nn.Sequential(first, *(CifarBlock(channels, channels, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits


class Bottleneck(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != 4 * channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, 4 * channels, 1, stride, bias=False),
                nn.BatchNorm2d(4 * channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.relu(self.bn3(self.conv3(out)) + identity)
        return out


class ImageNetResNet(nn.Module):
    """ImageNet-style ResNet; ``width=64, depths=(3, 4, 6, 3)`` is ResNet-50."""

    def __init__(
        self, num_classes: int = 20, width: int = 8, depths: tuple[int, ...] = (1, 1, 1, 1)
    ) -> None:
        super().__init__()
        self.in_channels = width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(width, depths[0], 1)
        self.layer2 = self._stage(2 * width, depths[1], 2)
        self.layer3 = self._stage(4 * width, depths[2], 2)
        self.layer4 = self._stage(8 * width, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32 * width, num_classes)

    def _stage(self, channels: int, depth: int, stride: int) -> nn.Sequential:
        blocks = []
        for s in [stride] + [1] * (depth - 1):
            blocks.append(Bottleneck(self.in_channels, channels, s))
            self.in_channels = 4 * channels
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits
