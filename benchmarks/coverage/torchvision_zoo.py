"""Architectures of torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.environment import let_torchvision_import

_IMAGE = [
    "alexnet vgg11 resnet18 resnet34 resnet50 resnext50_32x4d",
    "densenet121 squeezenet1_0 squeezenet1_1 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large",
    "mnasnet0_5 shufflenet_v2_x0_5 shufflenet_v2_x1_0 googlenet inception_v3 efficientnet_b0",
    "efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny swin_t swin_v2_t maxvit_t",
]
_VIDEO = ["r3d_18", "mc3_18", "r2plus1d_18", "s3d"]
_HARD = {
    "googlenet": "auxiliary heads in training",
    "inception_v3": "auxiliary head in training",
    "squeezenet1_0": "1x1 convolution as classifier",
    "squeezenet1_1": "1x1 convolution as classifier",
    "swin_t": "stochastic depth",
    "vit_b_16": "class token, dropout",
    "densenet121": "concatenations",
}
_COMPILED = {"resnet18", "mobilenet_v2", "vit_b_16"}


def architectures() -> Iterator[Architecture]:
    """List them; importing torchvision only here."""
    names = [name for line in _IMAGE for name in line.split()]
    for name in names:
        options: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            options = {"aux_logits": True, "init_weights": True}
        yield _architecture(name, partial(_image, name, options))
    small = {"image_size": 64, "num_layers": 12, "num_heads": 4, "hidden_dim": 128}
    yield _architecture("vit_b_16", partial(_small_vit, small))
    for name in _VIDEO:
        yield _architecture(name, partial(_video, name))


def _architecture(name: str, build: Callable[[], nn.Module]) -> Architecture:
    return Architecture(name, "torchvision", build, _HARD.get(name, ""), name in _COMPILED)


def _image(name: str, options: dict[str, Any]) -> nn.Module:
    return _models().get_model(name, weights=None, num_classes=10, **options)


def _small_vit(options: dict[str, int]) -> nn.Module:
    return _models().VisionTransformer(
        patch_size=16, mlp_dim=512, num_classes=10, dropout=0.1, **options
    )


def _video(name: str) -> nn.Module:
    return getattr(_models().video, name)(weights=None, num_classes=10)


def _models() -> Any:
    let_torchvision_import()
    import torchvision

    return torchvision.models
