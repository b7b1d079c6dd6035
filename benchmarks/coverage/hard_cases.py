"""Hard cases of the forward: what happens between the submodules."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.images import conv_bn


class DenseSkips(nn.Module):
    """Every stage reads what all earlier ones returned."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv_bn(3 + 8 * i, 8) for i in range(6)])
        self.head = nn.Linear(51, 10)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for stage in self.stages:
            seen.append(stage(torch.cat(seen, dim=1)))
        return self.head(torch.cat(seen, dim=1).mean((2, 3)))


class UShape(nn.Module):
    """An encoder whose maps come back in the decoder, after the fork."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = conv_bn(3, 8), conv_bn(8, 16, 2), conv_bn(16, 32, 2)
        self.up2, self.up1 = conv_bn(32 + 16, 16), conv_bn(16 + 8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        c = self.down3(b)
        c = F.interpolate(c, size=b.shape[2:], mode="bilinear", align_corners=False)
        b = self.up2(torch.cat([c, b], 1))
        b = F.interpolate(b, size=a.shape[2:])
        return self.head(self.up1(torch.cat([b, a], 1)).mean((2, 3)))


class TwoStreams(nn.Module):
    """Two inputs with a stream each, joined late; the second stream runs after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.image1, self.image2 = conv_bn(3, 8), conv_bn(8, 16, 2)
        self.signal1, self.signal2 = nn.Linear(20, 32), nn.Linear(32, 16)
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor, signal: Tensor) -> Tensor:
        a = self.image2(self.image1(image)).mean((2, 3))
        b = self.signal2(self.signal1(signal).relu()).relu()
        return self.head(torch.cat([a, b], dim=1))


class VideoFrames(nn.Module):
    """Frames are folded into the batch, scored one by one, and averaged (segment networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleDict(
            {"stem": conv_bn(3, 8, 2), "body": conv_bn(8, 16, 2), "top": conv_bn(16, 32, 2)}
        )
        self.consensus = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        x = x.view((-1, *x.shape[2:]))
        for part in self.base.values():
            x = part(x)
        shifted = x.view(batch, frames, *x.shape[1:]).roll(1, dims=1)
        return self.consensus(shifted.mean((1, 3, 4)))


class TimeFirst(nn.Module):
    """The batch is the second dimension inside, as recurrent code likes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.layers = nn.ModuleList([nn.GRU(16, 16) for _ in range(4)])
        self.decoder = nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.t())
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.decoder(x[-1])


class UnrolledCell(nn.Module):
    """One cell called many times in a loop, a list of its states, a stack at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 24)
        self.cell1, self.cell2 = nn.GRUCell(24, 24), nn.GRUCell(24, 24)
        self.attention = nn.Linear(24, 1)
        self.classify = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.encode(x).relu().unbind(1)
        state, states = torch.zeros(x.shape[0], 24, dtype=x.dtype, device=x.device), []
        for step in steps:
            state = self.cell1(step, state)
            states.append(state)
        state = torch.zeros_like(state)
        outputs = []
        for step in states:
            state = self.cell2(step, state)
            outputs.append(state)
        stacked = torch.stack(outputs, 1)
        weights = self.attention(stacked).softmax(1)
        return self.classify((stacked * weights).sum(1))


class SameBlocks(nn.Module):
    """Weights shared by recurrence: one block runs three times, then another three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.first, self.second = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16) for _ in range(6)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(3):
            x = F.relu(self.norms[i](self.first(x)) + x)
        for i in range(3, 6):
            x = F.relu(self.norms[i](self.second(x)) + x)
        return self.head(x.mean((2, 3)))


class InPlaceGlue(nn.Module):
    """Assignments to slices, out= and underscore operations between modules, on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), conv_bn(8, 16, 2)
        self.c, self.d = conv_bn(16, 24, 2), conv_bn(24, 32, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).clone()
        x[:, 0] = 0.5
        x[:, 1:3] += 2
        x = self.b(x)
        x = x * 0.5
        x.add_(0.1)
        buffer = x.new_zeros(x.shape[0], x.shape[1])
        buffer.copy_(x.mean((2, 3)))
        x = self.d(self.c(x) * buffer.sigmoid().mean(1)[:, None, None, None])
        x = x.mean((2, 3))
        x += buffer.mean(1, keepdim=True)
        return self.head(x)


class Scores(NamedTuple):
    """What :class:`NamedOutput` returns."""

    logits: Tensor
    features: Tensor
    levels: list[Tensor]


class NamedOutput(nn.Module):
    """A NamedTuple with a list of maps from both sides of the fork."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), conv_bn(8, 16, 2)
        self.c, self.head = conv_bn(16, 32, 2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Scores:
        levels = []
        for stage in (self.a, self.b, self.c):
            x = stage(x)
            levels.append(x)
        features = F.normalize(x.mean((2, 3)), dim=1)
        return Scores(self.head(features), features, levels)


class ModeSwitches(nn.Module):
    """no_grad, autocast, self.training and a detached branch inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), conv_bn(8, 16, 2)
        self.c, self.d = conv_bn(16, 24, 2), conv_bn(24, 32, 2)
        self.gate = nn.Linear(8, 16)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x - x.mean((2, 3), keepdim=True)
        x = self.a(x)
        gate = self.gate(x.mean((2, 3)).detach()).sigmoid()
        x = self.b(x) * gate[:, :, None, None]
        if self.training:
            x = x + 0.01 * torch.randn_like(x)
        with torch.autocast(x.device.type, enabled=False):
            x = self.d(self.c(x))
        return self.head(x.mean((2, 3)))


class Loss(nn.Module):
    """Takes labels by keyword and returns its loss beside the logits, as libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.classifier = nn.Linear(32, 10)

    def forward(self, values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        logits = self.classifier(self.features(values))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Perturbed(nn.Module):
    """Draws in eager Python on every forward: a random skip of whole layers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(20, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(6)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for layer in self.layers:
            if self.training and float(torch.rand(())) < 0.3:
                continue
            x = x + layer(x).tanh()
        return self.head(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dense_skips": (DenseSkips, "every stage reads all earlier ones"),
    "u_shape": (UShape, "skips over the fork, interpolation to recorded sizes"),
    "two_streams": (TwoStreams, "two inputs of different kinds"),
    "video_frames": (VideoFrames, "frames folded into the batch"),
    "time_first": (TimeFirst, "batch in the second dimension"),
    "unrolled_cell": (UnrolledCell, "cells called in a loop"),
    "same_blocks": (SameBlocks, "modules called several times"),
    "in_place_glue": (InPlaceGlue, "in-place glue on both sides"),
    "named_output": (NamedOutput, "NamedTuple with maps of both sides"),
    "mode_switches": (ModeSwitches, "no_grad, autocast, noise in training"),
    "loss_inside": (Loss, "labels by keyword, loss in the output"),
    "layer_drop": (Perturbed, "layers skipped at random in training"),
}
"""Name -> (constructor, what is hard about it)."""
