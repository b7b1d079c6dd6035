"""Layers that can be narrowed: where they keep their sizes, how to resize and redraw them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin._initialise import (
    constant_rows,
    has_orthogonal_rows,
    is_constant,
    is_sparse,
    is_structured,
    shuffled_to,
)


class Kind(NamedTuple):
    """Where a kind of layer keeps its sizes.

    Attributes:
        in_dim: dimension of the weight that holds the input width; None if there is none.
        out_dim: dimension of the weight that holds the output width.
        in_name: attribute with the input width.
        out_name: attribute with the output width.
        axis: dimension of the input that holds the channels.
    """

    in_dim: int | None
    out_dim: int
    in_name: str
    out_name: str
    axis: int


class ChannelPad(nn.Module):
    """Shortcut without parameters: subsample, then add channels of zeros (ResNet, option A).

    Args:
        channels: output width.
        stride: one pixel of so many is kept, in both directions.
        centred: zeros before and after the channels, else only after them.
        pool: average over the pixels of a stride instead of taking the first one.
    """

    def __init__(self, channels: int, stride: int, centred: bool, pool: bool) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride
        self.centred = centred
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, c, H, W]`` to ``[B, channels, H / stride, W / stride]``."""
        x = F.avg_pool2d(x, self.stride) if self.pool else x[..., :: self.stride, :: self.stride]
        missing = self.channels - x.shape[1]
        before = missing // 2 if self.centred else 0
        return F.pad(x, (0, 0, 0, 0, before, missing - before))

    def extra_repr(self) -> str:
        """Sizes, as other layers print them."""
        return f"channels={self.channels}, stride={self.stride}"


def kind_of(module: nn.Module) -> Kind | None:
    """Where ``module`` keeps its sizes, or None if its width cannot be chosen."""
    weight = module._parameters.get("weight")
    if isinstance(module, ChannelPad):
        return Kind(None, 0, "", "channels", 1)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return Kind(0, 1, "in_channels", "out_channels", 1)
    if isinstance(module, nn.modules.conv._ConvNd):
        return Kind(1, 0, "in_channels", "out_channels", 1)
    if isinstance(module, nn.Linear):
        return Kind(1, 0, "in_features", "out_features", -1)
    if isinstance(module, nn.Embedding):
        return Kind(None, 1, "", "embedding_dim", -1)
    if type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2:
        return Kind(0, 1, "nx", "nf", -1)  # transformers' linear layer with a transposed weight
    return None


def resized(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
    """Return ``tensor`` with other sizes along some dimensions.

    Where it gets smaller the first entries stay; where it gets larger they are repeated.
    """
    if tensor.is_meta:  # many trials' layers, and no entries to choose
        shape = [sizes.get(dim, size) for dim, size in enumerate(tensor.shape)]
        return tensor.new_empty(shape)
    for dim, size in sizes.items():
        if tensor.shape[dim] > size:
            tensor = tensor.narrow(dim, 0, size)
        elif tensor.shape[dim] < size:
            index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
            tensor = tensor.index_select(dim, index)
    return tensor.detach().clone()


def redrawn(new: Tensor, old: Tensor, fan_ratio: float) -> Tensor:
    """Return new values for a resized parameter, distributed as the old ones.

    They are the old tensor's entries in random order, times ``sqrt(old fan-in / new fan-in)``: so
    what a unit computes keeps its variance, whatever the initialisation was. Layers that stand in
    one parameter keep their spreads, and rows of one length have one again. A constant tensor
    stays constant, as does the row of a padding index, an orthogonal matrix is drawn orthogonal,
    and what has its places (an identity, a range) keeps its first entries.
    """
    if is_constant(old) or is_sparse(old):
        return new
    constant = constant_rows(old) if len(old) == len(new) else None
    if constant is not None and not bool(constant.all()):
        new = new.clone()
        new[~constant] = redrawn(new[~constant], old[~constant], fan_ratio)
        return new
    if is_structured(old):
        return new
    scale = fan_ratio**0.5
    if has_orthogonal_rows(old):
        rows = torch.empty_like(new, dtype=torch.float32)
        nn.init.orthogonal_(rows)
        root_mean_square = old.float().square().mean().sqrt() / rows.square().mean().sqrt()
        orthogonal: Tensor = (rows * root_mean_square * scale).to(new.dtype)
        return orthogonal
    return shuffled_to(new.shape, old).mul_(scale)


def pads_in(seen: Iterable[tuple[str, nn.Module, Any, Any]]) -> list[tuple[str, ChannelPad]]:
    """Parameter-free modules that only subsample and add zero channels, as :class:`ChannelPad`.

    Args:
        seen: ``(name, module, input, output)`` of the calls of one forward.
    """
    found = []
    for name, module, x, out in seen:
        pad = None if any(True for _ in module.parameters()) else _pad_of(x, out)
        if pad is not None:
            found.append((name, pad.train(module.training)))
    return found


def _pad_of(x: Any, out: Any) -> ChannelPad | None:
    tensors = isinstance(x, Tensor) and isinstance(out, Tensor)
    if not tensors or not x.dim() == 4 == out.dim() or out.shape[1] <= x.shape[1]:
        return None
    stride = max(1, round(x.shape[2] / out.shape[2]))
    for centred, pool in product((True, False), (False, True)):
        pad = ChannelPad(out.shape[1], stride, centred, pool)
        if torch.equal(pad(x), out):
            return pad
    return None
