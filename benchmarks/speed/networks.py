"""The networks that are timed, and one step of training them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.resnets import CifarResNet, ImageNetResNet
from benchmarks.speed.straightforward import HandSplit
from ride_plugin import RIDEWrapper, experts_loss

_Module = TypeVar("_Module", bound=nn.Module)
Case = tuple[str, list[str], Iterator[list[Any]]]


def to_channels_last(model: _Module) -> _Module:
    """In place; torch's annotations of `Module.to` forget its memory format."""
    return cast(_Module, model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


class NarrowResNet32(CifarResNet):
    """Full width up to the fork and 3/4 of it from there on, as the authors build it."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__(num_classes)
        self.layer2 = self.stage(16, 24, 2)
        self.layer3 = self.stage(24, 48, 2)
        self.linear = nn.Linear(48, num_classes)


def resnet32(
    num_experts: int = 3, channels_last: bool = True, num_classes: int = 100
) -> RIDEWrapper:
    """The paper's CIFAR network: ResNet-32, experts of 3/4 width, cosine classifiers."""
    backbone = NarrowResNet32(num_classes)
    model = RIDEWrapper(backbone, num_experts, fork_at="layer2", classifier="cosine")
    return to_channels_last(model) if channels_last else model


def resnet50(num_experts: int = 3, channels_last: bool = True) -> RIDEWrapper:
    """The paper's ImageNet network: ResNet-50, experts of 3/4 width, cosine classifiers."""
    model = RIDEWrapper(
        plain_resnet50(), num_experts, fork_at="layer3", expert_width=0.75, classifier="cosine"
    )
    return to_channels_last(model) if channels_last else model


def plain_resnet50() -> nn.Module:
    """ResNet-50 with 1000 classes."""
    return ImageNetResNet(1000, 64, (3, 4, 6, 3))


def by_hand(model: RIDEWrapper) -> HandSplit:
    """The same layers as ``model``, forked by hand."""
    if hasattr(model.trunk, "maxpool"):
        trunk = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2")
        return HandSplit(model, trunk, ("layer3", "layer4", "avgpool"), "fc")
    return HandSplit(model, ("conv1", "bn1", "relu", "layer1"), ("layer2", "layer3", "pool"))


def images(batch: int, channels_last: bool = True, size: int = 32) -> Tensor:
    """Random images; the time of a convolution does not depend on their content."""
    x = torch.randn(batch, 3, size, size)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def train_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward, cross entropy, backward."""

    def run() -> None:
        out = model(x)
        if isinstance(model, RIDEWrapper):
            loss = experts_loss(F.cross_entropy, out, y)
        else:
            loss = F.cross_entropy(out, y)
        model.zero_grad(set_to_none=True)
        loss.backward()

    return run
