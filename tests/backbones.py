"""Backbones for the tests, written as users write them: one of each kind that must split."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class PadShortcut:
    """Option A of the ResNet paper: stride, then zero channels on both sides; no parameters."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels // 4, self.channels // 4))


class CifarBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = Lambda(PadShortcut(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images as long-tail codebases use it; n = 5 is ResNet-32."""

    def __init__(self, num_classes: int = 100, n: int = 5) -> None:
        super().__init__()
        self.in_channels = 16
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, n, 1)
        self.layer2 = self._stage(32, n, 2)
        self.layer3 = self._stage(64, n, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def _stage(self, channels: int, n: int, stride: int) -> nn.Sequential:
        blocks = []
        for s in [stride] + [1] * (n - 1):
            blocks.append(CifarBlock(self.in_channels, channels, s))
            self.in_channels = channels
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


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
        return self.relu(self.bn3(self.conv3(out)) + identity)


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
        return self.fc(torch.flatten(self.avgpool(x), 1))


def plain_convnet(num_classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, num_classes),
    )


def mlp(num_classes: int = 7) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, num_classes),
    )


class VisionTransformer(nn.Module):
    """A vision transformer made of torch.nn modules, with a class token and dropout."""

    def __init__(self, num_classes: int = 10, dim: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, 4, 2 * dim, dropout=0.1, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class GluedNet(nn.Module):
    """Functional glue, Python control flow and a skip connection over the fork."""

    def __init__(self, num_classes: int = 5, steps: int = 2) -> None:
        super().__init__()
        self.steps = steps
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.late_bias = nn.Parameter(torch.randn(16, 1, 1))
        self.head = nn.Linear(16 + 8, num_classes)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        x = F.relu(self.stem(x)) * self.gain
        for _ in range(self.steps):
            x = x + F.relu(self.mix(x))
        if self.training:
            x = F.dropout(x, 0.2)
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        if x.abs().sum() < 0:
            x = -x
        skip = x.mean((2, 3))
        x = F.relu(self.down(x))
        x = F.relu(self.body(x) + self.late_bias) + x
        if double:
            x = 2 * x
        pooled = x.mean((2, 3))
        return self.head(torch.cat([pooled, skip], dim=1))


BACKBONES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "cifar resnet-32": (CifarResNet, (3, 32, 32), "layer2"),
    "imagenet resnet": (ImageNetResNet, (3, 64, 64), "layer3"),
    "plain convnet": (plain_convnet, (1, 8, 8), "3"),
    "mlp": (mlp, (20,), "4"),
    "vision transformer": (VisionTransformer, (3, 32, 32), "blocks.4"),
    "functional glue": (GluedNet, (3, 16, 16), "down"),
}
"""Name -> (constructor, shape of one input, expected default fork point)."""
