"""RIDE networks written by hand under the authors' key names, in their shapes.

No file of their ImageNet and iNaturalist models is at hand, so state dicts of these layouts stand
in for them: stem, `layer1`, `layer2`, then `layer3s.k`, `layer4s.k`, `linears.k` for each expert
(`layer3` once if it is shared), with the classifiers' weight [D, C] if they are cosine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class Residual(nn.Module):
    """Two 3x3 convolutions, or a bottleneck with ``groups`` of ``group_width`` / 64 x planes."""

    def __init__(self, inputs: int, planes: int, stride: int, kind: str) -> None:
        super().__init__()
        outputs = planes if kind == "basic" else 4 * planes
        if kind == "basic":
            self.conv1, self.bn1 = conv_bn(inputs, planes, 3, stride)
            self.conv2, self.bn2 = conv_bn(planes, planes, 3)
        else:
            groups, width = (32, 2 * planes) if kind == "next" else (1, planes)
            self.conv1, self.bn1 = conv_bn(inputs, width, 1)
            self.conv2, self.bn2 = conv_bn(width, width, 3, stride, groups)
            self.conv3, self.bn3 = conv_bn(width, outputs, 1)
        self.deep = kind != "basic"
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.deep:
            out = self.bn3(self.conv3(F.relu(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def stage(inputs: int, planes: int, depth: int, stride: int, kind: str) -> nn.Sequential:
    outputs = planes if kind == "basic" else 4 * planes
    blocks = [Residual(inputs if i == 0 else outputs, planes, stride if i == 0 else 1, kind)
              for i in range(depth)]  # fmt: skip
    return nn.Sequential(*blocks)


class Cosine(nn.Module):
    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return 30 * F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)


class Plain(nn.Module):
    """The backbone that users wrap: ``kind`` and ``depths`` say which."""

    def __init__(self, kind: str, depths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        grown = 1 if kind == "basic" else 4
        self.conv1, self.bn1 = conv_bn(3, 64, 7, 2)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(64, 64, depths[0], 1, kind)
        self.layer2 = stage(64 * grown, 128, depths[1], 2, kind)
        self.layer3 = stage(128 * grown, 256, depths[2], 2, kind)
        self.layer4 = stage(256 * grown, 512, depths[3], 2, kind)
        self.fc = nn.Linear(512 * grown, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class Official(nn.Module):
    """Their layout; ``forward`` returns the experts' logits [B, E, C], ``gates`` the router's."""

    def __init__(
        self,
        kind: str,
        depths: tuple[int, ...],
        num_classes: int,
        num_experts: int,
        *,
        widths: tuple[int, int] = (192, 384),
        share_layer3: bool = False,
        use_norm: bool = False,
        top_k: int | None = 30,
    ) -> None:
        super().__init__()
        grown = 1 if kind == "basic" else 4
        self.conv1, self.bn1 = conv_bn(3, 64, 7, 2)
        self.layer1 = stage(64, 64, depths[0], 1, kind)
        self.layer2 = stage(64 * grown, 128, depths[1], 2, kind)
        thirds = [
            stage(128 * grown, widths[0], depths[2], 2, kind)
            for _ in range(1 if share_layer3 else num_experts)
        ]
        if share_layer3:
            self.layer3 = thirds[0]
        else:
            self.layer3s = nn.ModuleList(thirds)
        self.layer4s = nn.ModuleList(
            stage(widths[0] * grown, widths[1], depths[3], 2, kind) for _ in range(num_experts)
        )
        features, head = widths[1] * grown, Cosine if use_norm else nn.Linear
        self.linears = nn.ModuleList(head(features, num_classes) for _ in range(num_experts))
        self.top_k = top_k
        if top_k is not None:
            self.expert_help_pred_hidden_fcs = nn.ModuleList(
                nn.Linear(features, 16) for _ in range(num_experts - 1)
            )
            self.expert_help_pred_fc = nn.Linear(16 + top_k, 1)
        for module in self.modules():  # so that no two channels are alike
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)

    def parts(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer2(self.layer1(x))
        x = self.layer3(x) if hasattr(self, "layer3") else x
        found = []
        for k, (layer4, linear) in enumerate(zip(self.layer4s, self.linears, strict=True)):
            own = self.layer3s[k](x) if hasattr(self, "layer3s") else x
            features = layer4(own).mean((2, 3))
            found.append((linear(features), features))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([logits for logits, _ in self.parts(x)], dim=1)

    def gates(self, x: Tensor) -> Tensor:
        columns, total = [], 0
        for k, (logits, features) in enumerate(self.parts(x)[:-1]):
            total = total + logits
            top = (total / (k + 1)).topk(self.top_k, dim=1).values
            hidden = F.relu(self.expert_help_pred_hidden_fcs[k](F.normalize(features, dim=1)))
            columns.append(self.expert_help_pred_fc(torch.cat((top, hidden), dim=1)))
        return torch.cat(columns, dim=1)
