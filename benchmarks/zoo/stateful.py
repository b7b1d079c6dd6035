"""Backbones whose forward decides, remembers, or writes in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .images import conv_bn


class ControlFlow(nn.Module):
    """Python decisions on tensors in the trunk, and activation checkpointing on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.plain, self.bright = conv_bn(8, 8), conv_bn(8, 8)
        self.stage2, self.stage3 = conv_bn(8, 16, 2), conv_bn(16, 32, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        # The batch decides, as an emergency rescaling would; the answer is the same for any rows.
        x = self.bright(x) if bool(x.abs().amax() > 1e6) else self.plain(x)
        for stage in (self.stage2, self.stage3):
            x = checkpoint(stage, x, use_reentrant=False) if self.training else stage(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class FrozenStem(nn.Module):
    """BatchNorm frozen by an overridden train(), buffers that are not saved, a cached grid."""

    grid: Tensor | None
    mean: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage1 = conv_bn(3, 8), conv_bn(8, 8)
        self.stage2, self.stage3 = conv_bn(8 + 1, 16, 2), conv_bn(16, 32, 2)
        self.head = nn.Linear(32, 10)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.1), persistent=False)
        self.register_buffer("steps", torch.zeros(()))
        self.grid = None
        self.last_size: tuple[int, ...] = ()
        for parameter in self.stem.parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenStem:
        super().train(mode)
        self.stem.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        x = self.stage1(self.stem(x - self.mean))
        if self.grid is None or self.grid.shape[-1] != x.shape[-1] or self.grid.dtype != x.dtype:
            self.grid = torch.linspace(0, 1, x.shape[-1], device=x.device, dtype=x.dtype)
        self.last_size = tuple(x.shape[2:])
        ramp = self.grid.expand(x.shape[0], 1, *self.last_size)
        x = self.stage3(self.stage2(torch.cat([x, ramp], dim=1)))
        return self.head(x.mean((2, 3)))


class KeepsFeatures(nn.Module):
    """Keeps activations as attributes, writes in place right after the fork, shares one ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.conv4, self.bn4 = nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)
        self.feat: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        self.early = x
        summary = x.mean((1, 2, 3), keepdim=False).unsqueeze(1)
        x = F.dropout(x, 0.1, self.training)
        y = self.relu(self.bn3(self.conv3(x)))
        summary += 1.0  # what the trunk returned; every expert must find it as it was
        y = self.relu(self.bn4(self.conv4(y))) + summary[:, :, None, None]
        self.feat = y.mean((2, 3))
        return self.fc(F.dropout(self.feat, 0.1, self.training))
