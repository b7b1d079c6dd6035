"""Copies of weights inside of experts, a moving average say, that start as the weights do."""

from __future__ import annotations

from collections.abc import Mapping, Set
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._initialise._draw import is_constant

_FEW = 8  # entries that tell almost always


def followers_in(expert: nn.Module) -> dict[str, str]:
    """Frozen parameters and buffers that equal a parameter that trains: names of both."""
    trained: dict[Any, list[str]] = {}
    kinds = set()
    for name, parameter in expert.named_parameters():
        if parameter.requires_grad and not is_constant(parameter):
            trained.setdefault(_mark(parameter), []).append(name)
            kinds.add(_kind(parameter))
    frozen = {name: p for name, p in expert.named_parameters() if not p.requires_grad}
    found = {}
    for name, tensor in {**frozen, **dict(expert.named_buffers())}.items():
        if _kind(tensor) not in kinds:
            continue
        equal = [
            other
            for other in trained.get(_mark(tensor), ())
            if torch.equal(expert.get_parameter(other), tensor)
        ]
        if equal:  # layers that are copies of each other have one value; a name tells them apart
            found[name] = max(equal, key=lambda other: _common_end(other, name))
    return found


def follow(expert: nn.Module, followers: Mapping[str, str], keep: Set[int]) -> list[str]:
    """Give copies of weights the values that the weights have.

    Args:
        expert: changed in place.
        followers: from :func:`followers_in`, before its weights were drawn anew.
        keep: ids of tensors that are not the expert's own.

    Returns:
        Names of copies that are not its own and do not equal the weights any more.
    """
    left = []
    tensors = {**dict(expert.named_parameters()), **dict(expert.named_buffers())}
    for name, source in followers.items():
        copy, weight = tensors[name], tensors[source]
        if copy.shape == weight.shape and not torch.equal(copy, weight):
            if id(copy) in keep:
                left.append(name)
            else:
                copy.detach().copy_(weight.detach())
    return left


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """What tells most tensors apart, also those of which no entry can be read (quantized ones)."""
    return tensor.shape, tensor.dtype, tensor.layout


def _mark(tensor: Tensor) -> tuple[object, ...]:
    return *_kind(tensor), *tensor.detach().flatten()[:_FEW].tolist()


def _common_end(a: str, b: str) -> int:
    """How many letters at their ends are the same."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
