"""A convolution with what follows it in one call of oneDNN, and its weight laid out once."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ride_plugin._checks import may_read
from ride_plugin._errors import ArgumentError

_POINTWISE: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_ONTO: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)  # writes over the addend
_SMALL = 12_000  # elements of a single image below which torch's own convolution is faster


class AllFinite(nn.Module):
    """Hands on a value if all of it is finite; on an accelerator or in a graph it is not read.

    oneDNN makes zeros of NaN where it fuses a ReLU, so a broken image would become a prediction
    like any other. A sum is not finite either then, and costs a small part of looking at each.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` itself; raises ArgumentError."""
        if may_read(x) and not math.isfinite(x.sum().item()):
            broken = ~x.isfinite()
            if bool(broken.any()):
                raise ArgumentError(
                    "Expected what enters a stage's convolutions to be finite, but got NaN or "
                    f"infinite values in {int(broken.flatten(1).any(dim=1).sum())} of {len(x)} "
                    "rows. Skip the bad samples, or look at what makes them."
                )
        return x


class FusedConv2d(nn.Module):
    """A convolution, then the addition of ``other`` if given, then a ReLU if asked for.

    With ``onto`` the result may take the place of ``other``, which nobody reads afterwards.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        options: tuple[list[int], list[int], list[int], int],
        relu: bool,
        input_size: list[int],
    ) -> None:
        super().__init__()
        weight = weight.clone(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.clone())
        self.stride, self.padding, self.dilation, self.groups = options
        self.relu = relu
        self.input_size = input_size
        self.onto = False
        self._pack()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Map ``x`` ``[b, c, h, w]``; ``other`` has the shape of the result."""
        if self._packed is None or (x.shape[0] == 1 and x.numel() < _SMALL):
            out = torch.conv2d(x, *self._plain)
            if other is not None:
                out.add_(other)
            return out.relu_() if self.relu else out
        return self._fast(x, other)

    def _fast(self, x: Tensor, other: Tensor | None) -> Tensor:
        if other is None:
            unary = "relu" if self.relu else "none"
            return cast("Tensor", _POINTWISE(x, *self._packed, unary, [], ""))
        then = "relu" if self.relu else None
        if self.onto:
            return cast("Tensor", _ONTO.binary(other, x, *self._packed, "add", 1.0, then, [], None))
        return cast(
            "Tensor", _POINTWISE.binary(x, other, *self._packed, "add", 1.0, then, [], None)
        )

    def extra_repr(self) -> str:
        """What was fused."""
        return f"{list(self.weight.shape)}, relu={self.relu}, packed={self._packed is not None}"

    def _pack(self) -> None:
        """Lay the weight out as oneDNN wants it; None where oneDNN does not take it."""
        weight, bias = self.weight, self.bias
        self._plain = (weight, bias, self.stride, self.padding, self.dilation, self.groups)
        self._packed: Any = None
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and _has_onednn():
            where = (self.padding, self.stride, self.dilation, self.groups)
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *where, self.input_size)
            self._packed = (packed, bias, *where)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedConv2d:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_plain": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and None not in (_POINTWISE, _ONTO)
