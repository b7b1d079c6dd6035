"""A dozen backbones as people write them; each is hard to split in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


class OptionABlock(nn.Module):
    """Residual block whose shortcut pads channels with zeros, inside a closure."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_channels != channels:
            pad = (0, 0, 0, 0, channels // 4, channels // 4)
            self.shortcut = LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], pad))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """CIFAR ResNet with option-A shortcuts and a normalised head, as LDAM-DRW's."""

    def __init__(self, blocks: int = 5, num_classes: int = 10, normed: bool = True) -> None:
        super().__init__()
        self.in_planes = 16
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(16, blocks, 1)
        self.layer2 = self._make_layer(32, blocks, 2)
        self.layer3 = self._make_layer(64, blocks, 2)
        head = NormedLinear if normed else nn.Linear
        self.linear = head(64, num_classes)

    def _make_layer(self, planes: int, blocks: int, stride: int) -> nn.Sequential:
        layers = []
        for step in [stride] + [1] * (blocks - 1):
            layers.append(OptionABlock(self.in_planes, planes, step))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, int(out.shape[3]))
        return self.linear(out.flatten(1))


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

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
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


@dataclass
class Prediction:
    """What :class:`TwoInputs` returns."""

    loss: Tensor | None
    logits: Tensor


class TwoInputs(nn.Module):
    """Two inputs, one by keyword; a skip bypasses the fork; a dataclass as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        layers = [nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True) for _ in range(3)]
        self.layers = nn.ModuleList(layers)
        self.skip = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 10)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0
    ) -> Prediction:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        first = x = self.embedding(input_ids) * scale
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        x = x + self.skip(first)
        weights = attention_mask.unsqueeze(-1).to(x)
        return Prediction(None, self.classifier((x * weights).sum(1) / weights.sum(1)))


class LateClassToken(nn.Module):
    """Blocks see patches only; the class token joins for the last two. Tied position table."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 16, 16) * 0.02)
        self.late_positions = self.positions  # tied: read before and after the fork
        block = lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)  # noqa: E731
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


class TextLSTM(nn.Module):
    """Bidirectional LSTM of two layers; the tuple it returns is glued together by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 16)
        self.lstm1 = nn.LSTM(16, 24, batch_first=True, bidirectional=True)
        self.lstm2 = nn.LSTM(48, 24, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(48, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x, (hidden, cell) = self.lstm1(self.embedding(tokens))
        _, (hidden, _) = self.lstm2(x, (hidden.tanh(), cell))
        return self.classifier(torch.cat([hidden[0], hidden[1]], dim=1))


class AudioConvNet(nn.Module):
    """1-D convolutions on a waveform."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 8, 16, 32, 32]
        self.convs = nn.ModuleList(
            [nn.Conv1d(a, b, 9, stride=4, padding=4) for a, b in pairwise(widths)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for width in widths[1:]])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean(dim=-1))


def convnet_3d() -> nn.Module:
    """A video network in one nn.Sequential."""
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, (1, 2, 2), 1),
        nn.BatchNorm3d(8),
        nn.ReLU(inplace=True),
        nn.Conv3d(8, 16, 3, 2, 1),
        nn.BatchNorm3d(16),
        nn.ReLU(inplace=True),
        nn.Conv3d(16, 24, 3, 2, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(24, 10),
    )


class SetNetwork(nn.Module):
    """An MLP for each element of a set [B, N, 12], a maximum over the set, then another MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.element = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.whole = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        batch, size, width = x.shape
        each = self.element(x.reshape(batch * size, width)).view(batch, size, -1)
        return self.whole(each.max(dim=1).values)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "cifar_resnet32_option_a": (CifarResNet, "padding shortcut in a closure, normalised head"),
    "features_and_classifier": (FeaturesAndClassifier, "two networks in a ModuleDict"),
    "auxiliary_heads": (AuxiliaryHeads, "auxiliary heads in training only"),
    "drop_path_dict": (DropPathDict, "stochastic depth and dropout, dict output"),
    "two_inputs": (TwoInputs, "two inputs, skip over the fork, dataclass output"),
    "late_class_token": (LateClassToken, "class token after the fork, tied parameters"),
    "control_flow": (ControlFlow, "data-dependent control flow, activation checkpointing"),
    "frozen_stem": (FrozenStem, "frozen BatchNorm, buffers not saved, cached grid, counter"),
    "keeps_features": (KeepsFeatures, "kept activations, in-place writes, shared ReLU"),
    "text_lstm": (TextLSTM, "recurrent, tuples between layers"),
    "audio_convnet": (AudioConvNet, "1-D, ModuleLists walked in step"),
    "convnet_3d": (convnet_3d, "3-D, all in one Sequential"),
    "set_network": (SetNetwork, "elements folded into the batch"),
}
"""Name -> (constructor, what is hard about it)."""
