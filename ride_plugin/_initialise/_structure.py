"""Parameters whose entries have their places: ranges, tables of positions, kernels, equal rows.

In most parameters every entry was drawn by itself, so their order says nothing. What a constructor
computed instead (``A_log`` of a state-space model, sinusoidal positions, one gate's bias) shows in
entries along a dimension: they are equal, they rise or fall, or neighbours resemble each other.
Each test is for what an independent draw of any distribution does about once in a million times,
so small parameters, in which chance orders much, are hardly ever found.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LINES, _LONGEST = 16, 256  # that many lines along a dimension tell, and so many entries of each
_SHORTEST = 8  # neighbours in shorter lines, in a small kernel say, are not compared
_SURPRISE = 14.0  # minus the logarithm of a probability
_ALIKE = 0.15  # square of a correlation; trained weights, which are no structure, stay below


def is_structured(parameter: Tensor) -> bool:
    """Whether the order of the entries along some dimension is no matter of chance."""
    if parameter.is_complex():
        return any(is_structured(part) for part in torch.view_as_real(parameter).unbind(-1))
    if parameter.numel() <= _LONGEST and _repeats_few_values(parameter):
        return True
    return any(
        _is_ordered(_lines_along(parameter, dim))
        for dim, size in enumerate(parameter.shape)
        if size > 1
    )


def _repeats_few_values(parameter: Tensor) -> bool:
    """Whether it holds a few numbers again and again, as a kernel for blurring or for edges does.

    Two numbers may be a draw of signs, and no other draw repeats so many, be it in bfloat16.
    """
    return 2 < len(parameter.unique()) <= 2 * parameter.numel() // 3


def _lines_along(parameter: Tensor, dim: int) -> Tensor:
    """Some of the parameter's lines along a dimension, from all over it: ``[lines, entries]``."""
    chosen, left = [], _LINES
    for other, size in enumerate(parameter.shape):
        if other == dim:
            chosen.append(slice(_LONGEST))
        else:
            step = -(-size // left)
            chosen.append(slice(None, None, step))
            left //= -(-size // step)
    lines = parameter[tuple(chosen)].movedim(dim, -1)
    return lines.reshape(-1, lines.shape[-1])


def _is_ordered(lines: Tensor) -> bool:
    count, length = lines.shape
    steps = lines.diff(dim=1)
    if not bool(steps.any()):  # equal slices, which chance makes of few values only
        return steps.numel() * math.log(len(lines[:, 0].unique())) > _SURPRISE
    surprise = count * (math.lgamma(length + 1) - math.log(2))  # of all lines being sorted
    monotone = ((steps > 0).all(1) | (steps < 0).all(1)).all()
    if surprise > _SURPRISE and bool(monotone):
        return True
    return length >= _SHORTEST and _are_neighbours_alike(lines)


def _are_neighbours_alike(lines: Tensor) -> bool:
    """Whether neighbours, or the values of a whole line, are close or opposite in rank."""
    count, length = lines.shape
    # Ranks, as one large entry of a long-tailed draw would outweigh all others. Equal entries have
    # one rank, so that those of few values are not ordered by their places.
    ranks = torch.unique(lines, return_inverse=True)[1].float()
    ranks -= ranks.mean()
    products = (ranks[:, 1:] * ranks[:, :-1]).sum(1)
    squared = (products / ranks.square().sum(1).clamp_min(1e-6)).square()
    # In a draw a correlation has (1 - r^2)^(length / 2) as the probability to be larger, and a
    # sum of such surprises exceeds this bound with the probability exp(-_SURPRISE) (Laurent and
    # Massart, 2000).
    surprise = float(-(length - 1) / 2 * torch.log1p(-squared.clamp(max=1 - 1e-6)).sum())
    bound = count + math.sqrt(2 * count * _SURPRISE) + _SURPRISE
    return surprise > bound and float(squared.mean()) > _ALIKE
