"""Backbones of long-tailed recognition codebases, written anew from published descriptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.resnets import CifarResNet
from benchmarks.zoo.images import closure_shortcut, resnet32_option_a


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        width = planes if groups == 1 else planes * 2  # 32 groups of 4 channels at 64 planes
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != planes * 4:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * 4, 1, stride, bias=False), nn.BatchNorm2d(planes * 4)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ModulatedAttention(nn.Module):
    """Self-attention over positions whose result a second, spatial map switches on and off."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        inner = channels // 2
        self.g, self.theta, self.phi = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.W = nn.Conv2d(inner, channels, 1)
        self.fc_spatial = nn.Linear(channels * height * width, height * width)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.size()
        g = self.g(x).view(batch, -1, height * width).permute(0, 2, 1)
        theta = self.theta(x).view(batch, -1, height * width).permute(0, 2, 1)
        phi = self.phi(x).view(batch, -1, height * width)
        attention = torch.matmul(theta, phi).softmax(dim=-1)
        y = torch.matmul(attention, g).permute(0, 2, 1).contiguous().view(batch, -1, height, width)
        spatial = self.fc_spatial(x.view(batch, -1)).softmax(dim=1).view(batch, 1, height, width)
        return self.W(y) * spatial * (height * width) + x


class ResNetFeatures(nn.Module):
    """ImageNet ResNet without classifier; returns features, or features and maps."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        attention: bool = False,
        returns_maps: bool = False,
        **options: int,
    ) -> None:
        super().__init__()
        self.inplanes = 64
        self.returns_maps = returns_maps
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, (planes, count) in enumerate(zip((64, 128, 256, 512), layers, strict=True)):
            stage = []
            for j in range(count):
                stride = 2 if i and not j else 1
                stage.append(block(self.inplanes, planes, stride, **options))
                self.inplanes = planes * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.att: nn.Module | None = ModulatedAttention(self.inplanes, 7, 7) if attention else None
        self.avgpool = nn.AvgPool2d(7, stride=1)

    def forward(self, x: Tensor, *_: object) -> Tensor | tuple[Tensor, Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.att is not None:
            x = self.att(x)
        maps = x
        x = self.avgpool(x).view(x.size(0), -1)
        return (x, maps) if self.returns_maps else x


class DotProductClassifier(nn.Module):
    """Linear layer; with scales, each class's norm is learnt beside fixed weights."""

    def __init__(self, dim: int, scales: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, 10)
        self.scales = nn.Parameter(torch.ones(10)) if scales else None

    def forward(self, x: Tensor, *_: object) -> tuple[Tensor, None]:
        x = self.fc(x)
        return (x if self.scales is None else x * self.scales), None


class CosineNormClassifier(nn.Module):
    """Cosine of the weights with a feature squashed to length |x| / (1 + |x|), times 16."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = 16.0
        self.weight = nn.Parameter(torch.empty(10, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: Tensor, *_: object) -> tuple[Tensor, None]:
        norm = x.norm(2, 1, keepdim=True)
        squashed = norm / (1 + norm) * (x / norm)
        weight = self.weight / self.weight.norm(2, 1, keepdim=True)
        return torch.mm(self.scale * squashed, weight.t()), None


class CausalNormClassifier(nn.Module):
    """Several heads of normalised weights, and a moving mean of the features as a buffer."""

    mean_feature: Tensor

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(10, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.register_buffer("mean_feature", torch.zeros(1, dim))

    def forward(self, x: Tensor, *_: object) -> tuple[Tensor, None]:
        if self.training:
            self.mean_feature.mul_(0.9).add_(x.detach().mean(0, keepdim=True), alpha=0.1)
        weights = torch.split(self.weight, self.weight.shape[1] // self.heads, dim=1)
        weight = torch.cat([w / (w.norm(2, 1, keepdim=True) + 0.03) for w in weights], dim=1)
        parts = torch.split(x, x.shape[1] // self.heads, dim=1)
        normed = torch.cat([p / p.norm(2, 1, keepdim=True) for p in parts], dim=1)
        return 8 * torch.mm(normed, weight.t()), None


class Pair(nn.Module):
    """Feature extractor and classifier, as configuration files pair them."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.feat_model = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        features = self.feat_model(x)
        if isinstance(features, tuple):
            features, self.feature_maps = features
        logits, self.direct_memory_feature = self.classifier(features, None)
        return logits


class TwoBranches(nn.Module):
    """A shared body, then a conventional and a re-balancing branch joined by their features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16) for _ in range(3)])
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64))
        self.cb_block, self.rb_block = BasicBlock(64, 64), BasicBlock(64, 64)
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor, **kwargs: bool) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        branches = [self.cb_block(out), self.rb_block(out)]
        both = torch.cat([F.adaptive_avg_pool2d(branch, 1) for branch in branches], dim=1)
        mixed = both.flatten(1) if "feature_flag" in kwargs else 2 * (0.5 * both.flatten(1))
        return self.classifier(mixed)


class CombinedNetwork(nn.Module):
    """Body, pooling module, reshape and classifier kept apart and driven by flags."""

    def __init__(self) -> None:
        super().__init__()
        body = CifarResNet(10)
        self.backbone = nn.Sequential(
            body.conv1, body.bn1, nn.ReLU(), body.layer1, body.layer2, body.layer3
        )
        self.module = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Linear(64, 10, bias=False)
        self.mode = "GAP"

    def forward(self, x: Tensor, feature_flag: bool = False) -> Tensor:
        x = self.backbone(x)
        x = self.module(x) if self.mode == "GAP" else x
        x = x.view(x.shape[0], -1)
        return x if feature_flag else self.classifier(x)


def _pair(classifier: Callable[[int], nn.Module], *args: Any, **options: Any) -> nn.Module:
    features = ResNetFeatures(*args, **options)
    return Pair(features, classifier(features.inplanes))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ldam_resnet32": (lambda: CifarResNet(10, shortcut=closure_shortcut), "option-A shortcuts"),
    "ldam_resnet32_normed": (resnet32_option_a, "option-A shortcuts, normalised head"),
    "decoupling_resnet10_pair": (
        lambda: _pair(DotProductClassifier, BasicBlock, (1, 1, 1, 1), returns_maps=True),
        "features and maps; kept as attributes",
    ),
    "decoupling_resnext50_lws": (
        lambda: _pair(lambda d: DotProductClassifier(d, True), Bottleneck, (3, 4, 6, 3), groups=32),
        "learnable scales after the linear layer",
    ),
    "oltr_resnet10_modulated_attention": (
        lambda: _pair(CosineNormClassifier, BasicBlock, (1, 1, 1, 1), attention=True),
        "attention whose layer fixes the input size",
    ),
    "causal_norm_resnet10": (
        lambda: _pair(CausalNormClassifier, BasicBlock, (1, 1, 1, 1)),
        "classifier with a moving mean",
    ),
    "bag_of_tricks_resnet32": (CombinedNetwork, "parts driven by flags"),
    "bbn_resnet": (TwoBranches, "two branches after a shared body"),
}
"""Name -> (constructor, what is hard about it)."""
