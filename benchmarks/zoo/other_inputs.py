"""Backbones for text, sound, video and sets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
