"""Image classifiers as people write them; each is hard to split in a way of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.resnets import CifarResNet


def conv_bn(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class NormedLinear(nn.Module):
    """Cosine of feature and class weight, without scale: the head that margin losses use."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(in_features, num_classes), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1).mm(F.normalize(self.weight, dim=0))


class LambdaLayer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def closure_shortcut(missing: int) -> nn.Module:
    """Pads channels with zeros inside a closure, which cannot be pickled."""
    half = missing // 2
    return LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, missing - half)))


def resnet32_option_a() -> CifarResNet:
    """ResNet-32 with closures as shortcuts and a normalised head, as LDAM-DRW's."""
    return CifarResNet(10, head=NormedLinear, shortcut=closure_shortcut)


class FeaturesAndClassifier(nn.Module):
    """A feature extractor that returns (features, maps), and a dot-product classifier beside it."""

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv_bn(3, 8)
            self.layer1, self.layer2 = conv_bn(8, 16, 2), conv_bn(16, 24, 2)
            self.layer3 = conv_bn(24, 32, 2)

        def forward(self, x: Tensor, *_: Tensor) -> list[Tensor]:
            maps = self.layer3(self.layer2(self.layer1(self.stem(x))))
            return [F.adaptive_avg_pool2d(maps, 1).flatten(1), maps]

    class DotProduct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 10)

        def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, None]:
            return self.fc(x), None

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(
            {"feat_model": self.Features(), "classifier": self.DotProduct()}
        )

    def forward(self, x: Tensor) -> Tensor:
        features, _ = self.networks["feat_model"](x)
        logits, _ = self.networks["classifier"](features)
        return logits


class AuxiliaryHeads(nn.Module):
    """Returns logits alone in evaluation, and a tuple with two auxiliary heads in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2 = conv_bn(3, 8), conv_bn(8, 16, 2)
        self.stage3, self.stage4 = conv_bn(16, 24, 2), conv_bn(24, 32, 2)
        self.early, self.late = nn.Linear(8, 10), nn.Linear(24, 10)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        x = self.stage1(x)
        early = self.early(x.mean((2, 3))) if self.training else None
        x = self.stage3(self.stage2(x))
        late = self.late(x.mean((2, 3))) if self.training else None
        logits = self.head(self.dropout(self.stage4(x).mean((2, 3))))
        return (logits, early, late) if self.training else logits


class DropPathDict(nn.Module):
    """Stochastic depth and dropout in trunk and experts; a dict as the result."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = conv_bn(width, width)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x + self.body(x)
            kept = (torch.rand(x.shape[0], 1, 1, 1, device=x.device) < 0.7).to(x)
            return x + F.dropout(self.body(x), 0.1, self.training) * kept / 0.7

    def __init__(self) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.ModuleList([self.Block(12) for _ in range(6)])
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        x = F.dropout(self.patchify(x), 0.2, self.training)
        for block in self.blocks:
            x = block(x)
        features = x.mean((2, 3))
        return {"loss": None, "logits": self.head(features), "features": features}


class LateClassToken(nn.Module):
    """Blocks see patches only; the class token joins for the last two. Tied position table."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 16, 16) * 0.02)
        self.late_positions = self.positions  # tied: read before and after the fork

        def block() -> nn.Module:
            return nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)

        self.blocks = nn.ModuleList([block() for _ in range(3)])
        self.class_blocks = nn.ModuleList([block() for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        token = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([token, x + self.late_positions], dim=1)
        for block in self.class_blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
