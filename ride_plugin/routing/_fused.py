"""Exported stages made fast: operations fused and weights laid out once, before serving starts.

An exported stage is a graph of plain operations, which :mod:`ride_plugin.routing._rewrite` makes
fewer and faster. No compiler is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import without_autocast
from ride_plugin.routing._call import call_of
from ride_plugin.routing._rewrite import rewritten
from ride_plugin.routing._stage_inputs import check_inputs, inputs_of_nodes
from ride_plugin.routing._stages import check_stages


def fuse_stages(stages: Mapping[str, ExportedProgram]) -> dict[str, nn.Module]:
    """Turn exported stages into equal functions of tensors that run faster.

    The results differ from those of the programs by rounding. Convolutions in float32 on an x86
    processor run in oneDNN with their ReLU and addition; everywhere else, and for layers that
    oneDNN does not take, the same operations run one after the other. Autocast has no effect.

    Args:
        stages: what ``serve.export_stages()`` returned, or the same programs loaded from files.

    Returns:
        Modules by the same names, for `StagedRunner`. They are in evaluation mode and hold copies
        of the weights, which do not require gradients. They take any batch size, can be pickled,
        and can serve several threads. They raise ArgumentError where inputs are of other sizes or
        dtypes than the exported ones and, on the CPU, where NaN or infinity comes to a convolution.
        They can be moved to another device, but not cast: cast the model and export again.

    Raises:
        ArgumentError: a stage is not an ``ExportedProgram``, or a convolution's weights are not
            finite.

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
    check_stages(stages, ExportedProgram, "an ExportedProgram", "`serve.export_stages()`")
    return {name: FusedStage(program) for name, program in stages.items()}


class FusedStage(nn.Module):
    """One stage as a plain graph of fused operations: tensors in, a tuple of tensors out."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        # Tensors made under inference mode could not be loaded into outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.graph_module = rewritten(program)
        self.call = call_of(program)
        placeholders = self.graph_module.graph.find_nodes(op="placeholder")
        self.dtypes, self.sizes = inputs_of_nodes(placeholders)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the stage; images are taken in either memory format."""
        check_inputs(tensors, self.dtypes, self.sizes)
        if torch.is_autocast_enabled(tensors[0].device.type):
            with without_autocast(tensors[0]):
                return cast("tuple[Tensor, ...]", self.graph_module.forward(*tensors))
        return cast("tuple[Tensor, ...]", self.graph_module.forward(*tensors))

    def _apply(self, fn: Any, recurse: bool = True) -> FusedStage:
        held = {tensor.dtype for tensor in (*self.parameters(), *self.buffers())}
        for dtype in sorted(held | set(self.dtypes), key=str):
            found = fn(torch.empty(0, dtype=dtype)).dtype
            if found != dtype:
                raise ArgumentError(
                    f"Expected a fused stage to keep its dtypes, but got a cast from {dtype} to "
                    f"{found}: its graph holds numbers and steps of the exported precision. Cast "
                    "the model, and export and fuse its stages again."
                )
        return cast("FusedStage", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]
