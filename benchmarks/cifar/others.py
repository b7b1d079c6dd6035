"""The plain backbone as other libraries extend it: early exits of earlyon, ensembles of layers.

Both packages are needed only where such a network is asked for. torch-uncertainty imports
torchvision, which must be there; `let_torchvision_import` is for one built for another torch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.coverage.environment import let_torchvision_import
from benchmarks.resnets import CifarResNet, PadShortcut


class EarlyExit(nn.Module):
    """earlyon's wrapper with one exit after ``layer2``.

    In training mode it returns the exit's logits and behind them the last layer's, ``[2B, C]``; in
    evaluation those of the last layer. `serve` routes, a batch as a whole.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        from earlyon import EarlyExitConfig, EarlyExitHead, EarlyExitWrapper, ExitPoint

        points = [ExitPoint("early", "layer2", 32)]
        self.config = EarlyExitConfig("custom", num_classes, points, confidence_thresholds=[1.0])
        self.wrapped = EarlyExitWrapper(
            CifarResNet(num_classes),
            {"early": EarlyExitHead(32, num_classes)},
            nn.Identity(),
            self.config,
            (1, 3, 32, 32),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, 3, 32, 32]`` to logits."""
        if self.training:
            return torch.cat(self.wrapped(x, mode="training"))
        return cast("Tensor", self.wrapped.backbone(x))

    def serve(self, x: Tensor, threshold: float) -> Tensor:
        """Logits ``[B, C]``, the exit's if all its largest probabilities reach the threshold."""
        self.config.confidence_thresholds = [threshold]
        return cast("Tensor", self.wrapped.forward_inference_batched(x).predictions)


class _PackedShortcut(nn.Module):
    """The shortcut of each member by itself, since a member's channels lie next to each other."""

    def __init__(self, missing: int, members: int) -> None:
        super().__init__()
        self.shortcut, self.members = PadShortcut(missing), members

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.shortcut(part) for part in x.chunk(self.members, 1)], 1)


class Ensemble(nn.Module):
    """torch-uncertainty's layers in the plain backbone, four members.

    In training mode it returns the members' logits one after the other, ``[4B, C]``; in evaluation
    the logarithm of their mean probability.

    Args:
        num_classes: ``C``.
        packed: a Packed-Ensemble with alpha 2; otherwise a BatchEnsemble.
    """

    members = 4

    def __init__(self, num_classes: int, packed: bool) -> None:
        super().__init__()
        let_torchvision_import()
        from torch_uncertainty.layers import BatchConv2d, BatchLinear, PackedConv2d, PackedLinear

        self.packed = packed
        network = CifarResNet(num_classes)
        for name, layer in list(network.named_modules()):
            if isinstance(layer, nn.Conv2d):
                options: dict[str, Any] = {"stride": layer.stride[0], "padding": 1, "bias": False}
                sizes = (layer.in_channels, layer.out_channels, 3)
                if packed:
                    first = name == "conv1"
                    new = PackedConv2d(*sizes, 2, self.members, first=first, **options)
                else:
                    new = BatchConv2d(*sizes, self.members, **options)
                network.set_submodule(name, new)
            elif packed and isinstance(layer, nn.BatchNorm2d):
                network.set_submodule(name, nn.BatchNorm2d(2 * layer.num_features))
            elif packed and isinstance(layer, PadShortcut):
                network.set_submodule(name, _PackedShortcut(layer.missing // 2, self.members))
        if packed:
            network.linear = PackedLinear(64, num_classes, 2, self.members, last=True)
        else:
            network.linear = BatchLinear(64, num_classes, self.members)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, 3, 32, 32]`` to logits."""
        logits = self.network(x if self.packed else x.repeat(self.members, 1, 1, 1))
        if self.training:
            return cast("Tensor", logits)
        members = torch.stack(logits.log_softmax(1).chunk(self.members))
        return members.logsumexp(0)
