"""Fused stages whose convolutions run in eight bits: faster on processors with VNNI or AMX."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._checks import refuse
from ride_plugin._errors import ArgumentError
from ride_plugin._inputs import as_inputs, batch_size_of
from ride_plugin.routing._call import call_of, tensors_of_call
from ride_plugin.routing._fused import FusedStage
from ride_plugin.routing._fused_conv import FusedConv2d
from ride_plugin.routing._stages import check_stages, count_experts

_CONVOLUTION: Any = getattr(torch.ops.onednn, "qconv2d_pointwise", None)


def quantize_stages(
    stages: Mapping[str, nn.Module], batches: Iterable[Any]
) -> dict[str, nn.Module]:
    r"""Let the convolutions of fused stages multiply integers of eight bits.

    Weights are rounded to 255 steps for each output channel (129 on a processor that adds two
    products in sixteen bits, as those without VNNI do, where more would not fit), and what enters a
    convolution to 256 steps between the smallest and the largest value that the example batches
    bring there: $q = \mathrm{round}(x / s) + z$. Stages that are loaded from a file are rounded
    for the processor that loads them. Sums, additions, classifiers and gates stay in float32. The
    results differ from those of the float stages by more than rounding, so measure the accuracy,
    and calibrate thresholds with care. Grouped convolutions stay as they are, and so do those of
    a single small image, which would not gain.

    Args:
        stages: what `fuse_stages` returned; they are left as they are.
        batches: inputs of the model without labels, a few hundred samples like those to be served:
            tensors, tuples of positional or dicts of keyword arguments.

    Returns:
        Modules by the same names, for `StagedRunner`.

    Raises:
        ArgumentError: a stage is missing or is not a fused one, there is no batch with rows, or
            this build of torch has no such convolution or a wrong one on this processor.

    Example:
        >>> from torch import nn
        >>> from ride_plugin import ConfidenceRouter, RIDEWrapper, RoutingInference
        >>> from ride_plugin.routing import StagedRunner, fuse_stages, quantize_stages
        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        ... )
        >>> serve = RoutingInference(RIDEWrapper(backbone, 2), ConfidenceRouter())
        >>> images = torch.randn(64, 3, 32, 32)
        >>> stages = quantize_stages(fuse_stages(serve.export_stages()), [images])
        >>> torch.allclose(StagedRunner(stages)(images), serve(images), atol=0.05)
        True
    """
    if _CONVOLUTION is None:
        raise ArgumentError(
            "Expected a build of torch with oneDNN's convolution in eight bits, but this one has "
            "none. Serve the float stages."
        )
    check_stages(stages, FusedStage, "a fused stage", "`fuse_stages`")
    count_experts(stages)
    quantized = {name: copy.deepcopy(stage) for name, stage in stages.items()}
    for module, (low, high) in _ranges(quantized, batches).items():
        for stage in quantized.values():
            for name, found in list(stage.named_modules()):
                if found is module:
                    stage.set_submodule(name, Int8Conv2d(module, low, high))
    return quantized


class Int8Conv2d(FusedConv2d):
    """A fused convolution of integers; ``low`` and ``high`` are the range of its input."""

    def __init__(self, conv: FusedConv2d, low: float, high: float) -> None:
        low = min(low, 0.0)  # zero must be one of the steps: padding is made of it
        self.scale = max(high - low, 1e-8) / 255
        self.zero_point = round(-low / self.scale)
        options = (conv.stride, conv.padding, conv.dilation, conv.groups)
        super().__init__(conv.weight, conv.bias, options, conv.relu, conv.input_size)

    def _fast(self, x: Tensor, other: Tensor | None) -> Tensor:
        # Conversion cuts off, so half a step is added to round.
        steps = x.mul(1 / self.scale).add_(self.zero_point + 0.5).clamp_(0.0, 255.5)
        steps = steps.to(torch.uint8)
        now = "relu" if self.relu and other is None else "none"
        out: Tensor = _CONVOLUTION(steps, *self._packed, 1.0, 0, torch.float32, now, [], "")
        if other is not None:
            out.add_(other)
            if self.relu:
                out.relu_()
        return out

    def _pack(self) -> None:
        super()._pack()
        if self._packed is None:
            return
        largest = self.weight.abs().amax(dim=(1, 2, 3)).clamp_min(1e-12)
        scales = largest / largest_step()
        rounded = (self.weight / scales[:, None, None, None]).round().to(torch.int8)
        where = (self.stride, self.padding, self.dilation, self.groups)
        self._packed = _packed(
            rounded, scales, self.scale, self.zero_point, self.bias, where, self.input_size
        )


@functools.cache
def largest_step() -> int:
    """The largest whole number that a weight may be on this processor; raises ArgumentError.

    Without VNNI oneDNN adds two products of an input up to 255 and a weight in sixteen bits, and
    cuts off what does not fit: two weights of 127 would count as 64 each. It is tried, since which
    processors do so is not to be asked in all releases of torch.
    """
    size, where = [1, 16, 4, 4], ([1, 1], [0, 0], [1, 1], 1)
    scales = torch.ones(16, dtype=torch.float32, device="cpu")
    steps = torch.full(size, 255, dtype=torch.uint8, device="cpu")
    steps = steps.contiguous(memory_format=torch.channels_last)
    for largest in (127, 64):  # 2 * 255 * 64 fits
        weight = torch.full((16, 16, 1, 1), largest, dtype=torch.int8, device="cpu")
        packed = _packed(weight, scales, 1.0, 0, None, where, size)
        sums = _CONVOLUTION(steps, *packed, 1.0, 0, torch.float32, "none", [], "")
        if bool((sums == 16 * 255 * largest).all()):
            return largest
    raise ArgumentError(
        "Expected oneDNN's convolution in eight bits to add up whole numbers, but here 16 products "
        f"of 255 and 64 are {sums.flatten()[0]:g} for it. Serve the float stages."
    )


def _packed(
    rounded: Tensor,
    scales: Tensor,
    scale: float,
    zero_point: int,
    bias: Tensor | None,
    where: tuple[list[int], list[int], list[int], int],
    input_size: list[int],
) -> tuple[Any, ...]:
    """What the convolution takes after its input, with the weight laid out as it wants it."""
    laid_out = torch.ops.onednn.qconv_prepack(
        rounded, scales, scale, zero_point, *where, input_size
    )
    zeros = torch.zeros_like(scales, dtype=torch.int64)
    return (scale, zero_point, laid_out, scales, zeros, bias, *where)


@torch.no_grad()
def _ranges(
    stages: Mapping[str, nn.Module], batches: Iterable[Any]
) -> dict[FusedConv2d, tuple[float, float]]:
    """Smallest and largest input of each convolution that can be quantized."""
    ranges: dict[FusedConv2d, tuple[float, float]] = {}
    try:
        each = iter(batches)
    except TypeError:
        refuse("batches", "inputs of the model, one after the other", batches, "Pass a list.")

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, FusedConv2d)
        low, high = (float(value) for value in inputs[0].aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ArgumentError(
                "Expected argument `batches` to bring finite values to every convolution, but got "
                f"values from {low:g} to {high:g}. Look for NaN or infinity in the batches."
            )
        before = ranges.get(module, (low, high))
        ranges[module] = min(low, before[0]), max(high, before[1])

    hooks = [
        module.register_forward_pre_hook(note)
        for stage in stages.values()
        for module in stage.modules()
        if isinstance(module, FusedConv2d) and module.groups == 1
    ]
    seen = False
    try:
        for batch in each:
            try:
                inputs = as_inputs(tuple(batch) if isinstance(batch, list) else batch)
                if batch_size_of(inputs) == 0:  # an empty shard has no smallest value
                    continue
                seen = True
                crossing = stages["trunk"](*tensors_of_call(call_of(stages["trunk"]), inputs))
            except ArgumentError as error:
                labels = " Leave labels out: `(x for x, _ in loader)`."
                raise ArgumentError(
                    "Expected argument `batches` to yield finite inputs like those to be served, "
                    f"but the trunk refuses one of them. {error}"
                    f"{labels if isinstance(batch, list | tuple) else ''}"
                ) from error
            for name, stage in stages.items():
                if name.startswith("expert_"):
                    stage(*crossing)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ArgumentError(
            "Expected argument `batches` to yield at least one batch with rows, but it is empty. "
            "Pass a list of tensors like those to be served."
        )
    return ranges
