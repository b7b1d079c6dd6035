"""Backbones for the tests, written as users write them: one of each kind that must split."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.resnets import CifarResNet, ImageNetResNet


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


class TwoMatrices(nn.Module):
    """Returns two matrices, either of which may be the logits."""

    def __init__(self, late: int = 16) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(8, 16), nn.Linear(16, late)
        self.left, self.right = nn.Linear(late, 5), nn.Linear(late, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(self.stem(x).relu()).relu()
        return self.right(h), self.left(h)


class Decoder(nn.Module):
    """Classifies every token of ``[B, T]``; by default the last one that is no 0 counts.

    Args:
        take: makes logits of the decoder, the scores ``[B, T, C]`` and the tokens.
        width: of its hidden states.
    """

    def __init__(
        self, take: Callable[[Any, Tensor, Tensor], Tensor] | None = None, width: int = 16
    ) -> None:
        super().__init__()
        self.config, self.num_labels = SimpleNamespace(num_labels=5), 5
        self.take = take or last_scores
        self.embedding = nn.Embedding(20, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.score = nn.Linear(width, 5, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """The state of each token, which depends on those before it."""
        x: Tensor = self.embedding(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x.cumsum(1)))
        return x

    def forward(self, ids: Tensor) -> Any:
        return self.take(self, self.score(self.hidden(ids)), ids)


def last_token(ids: Tensor) -> Tensor:
    """Where the last token of each row is that is no 0: the padding may be on either side."""
    return (torch.arange(ids.shape[1], device=ids.device) * (ids != 0)).argmax(1)


def last_scores(decoder: Decoder, scores: Tensor, ids: Tensor) -> Tensor:
    """The scores of the last token, in as many columns as the decoder says."""
    last = scores[torch.arange(len(ids), device=ids.device), last_token(ids)]
    return last.view(-1, decoder.num_labels)


def token_ids(rows: int, length: int = 7, padding: str = "right") -> Tensor:
    """Rows of random tokens, of which row k has k mod 4 zeros at one side."""
    ids = torch.randint(1, 20, (rows, length))
    for row in range(rows):
        zeros = row % 4
        ids[row, : zeros if padding == "left" else 0] = 0
        ids[row, length - (zeros if padding == "right" else 0) :] = 0
    return ids
