"""Inputs for the checks: fresh values, some rows, other sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ride_plugin._tree import map_tensors, tensors_in

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def redrawn(inputs: Inputs, seed: int = 7) -> Inputs:
    """The same shapes with new floating values; integers (tokens, masks) are kept."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    return map_tensors(draw, inputs)


def rows_of(inputs: Inputs, rows: Tensor) -> Inputs:
    """Some rows of a batch."""
    batch = next(tensors_in(inputs)).shape[0]

    def take(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.dim() and tensor.shape[0] == batch else tensor

    return map_tensors(take, inputs)


def other_sizes(inputs: Inputs) -> Iterator[Inputs]:
    """A larger input that is not square, and a smaller one."""
    for stretch in ((1.25, 1.5), (0.75, 0.75)):
        yield map_tensors(partial(_resized, stretch=stretch), inputs)


def _resized(tensor: Tensor, stretch: tuple[float, float]) -> Tensor:
    if tensor.dim() < 2:
        return tensor
    shape = list(tensor.shape)
    if not tensor.is_floating_point():  # tokens and masks: along the sequence
        length = max(1, int(shape[1] * stretch[0]))
        repeats = -(-length // shape[1])
        return tensor.repeat(1, repeats, *[1] * (tensor.dim() - 2))[:, :length].contiguous()
    if tensor.dim() == 3:
        # Positions come last in a signal [B, C, T] and in the middle of a sequence [B, T, D].
        dims = [2] if shape[2] > 4 * shape[1] else [1]
    else:
        dims = list(range(max(2, tensor.dim() - 2), tensor.dim()))
    for dim, factor in zip(dims, stretch, strict=False):
        size = shape[dim] * factor
        shape[dim] = int(size) if shape[dim] < 64 else round(size / 32) * 32
    generator = torch.Generator().manual_seed(8)
    return torch.randn(shape, generator=generator).to(tensor.dtype)
