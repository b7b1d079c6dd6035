"""Exported stages made fast: operations fused and weights laid out once, before serving starts.

An exported stage is a graph of plain operations, which :mod:`ride_plugin.routing._rewrite` makes
fewer and faster. No compiler is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import without_autocast
from ride_plugin.routing._rewrite import rewritten


def fuse_stages(stages: Mapping[str, ExportedProgram]) -> dict[str, nn.Module]:
    """Turn exported stages into equal functions of tensors that run faster.

    The results differ from those of the programs by rounding. Convolutions in float32 on an x86
    processor run in oneDNN with their ReLU and addition; everywhere else, and for layers that
    oneDNN does not take, the same operations run one after the other. Autocast has no effect.

    Args:
        stages: what ``serve.export_stages()`` returned, or the same programs loaded from files.

    Returns:
        Modules by the same names, for `StagedRunner`. They are in evaluation mode and their
        weights do not require gradients. They take any batch size, can be pickled, and can serve
        several threads.

    Raises:
        ArgumentError: a stage is not an ``ExportedProgram``.

    Example:
        >>> from torch import nn
        >>> from ride_plugin import ConfidenceRouter, RIDEWrapper, RoutingInference
        >>> from ride_plugin.routing import StagedRunner, fuse_stages
        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        ... )
        >>> serve = RoutingInference(RIDEWrapper(backbone, 2), ConfidenceRouter())
        >>> runner = StagedRunner(fuse_stages(serve.export_stages()))
        >>> x = torch.randn(4, 3, 32, 32)
        >>> torch.allclose(runner(x), serve(x), atol=1e-5)
        True
    """
    fused: dict[str, nn.Module] = {}
    for name, program in stages.items():
        if not isinstance(program, ExportedProgram):
            raise ArgumentError(
                f"Expected `stages[{name!r}]` to be an ExportedProgram, but got "
                f"{type(program).__name__}. Pass what `serve.export_stages()` returned."
            )
        fused[name] = FusedStage(program)
    return fused


class FusedStage(nn.Module):
    """One stage as a plain graph of fused operations: tensors in, a tuple of tensors out."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        with torch.no_grad():
            self.graph_module = rewritten(program)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the stage; images are taken in either memory format."""
        if torch.is_autocast_enabled(tensors[0].device.type):
            with without_autocast(tensors[0]):
                return cast("tuple[Tensor, ...]", self.graph_module.forward(*tensors))
        return cast("tuple[Tensor, ...]", self.graph_module.forward(*tensors))
