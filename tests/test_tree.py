"""Nested values: their tensors, maps over them, and which of them are the logits."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ride_plugin._tree import logits_in, map_tensors, tensors_in


class Pair(NamedTuple):
    first: Tensor
    second: list[Tensor]


@dataclass
class Output:
    loss: float | None
    logits: Tensor


def test_tensors_in_nested_values_come_depth_first() -> None:
    a, b, c, d = (torch.full((1,), float(i)) for i in range(4))
    value = {"x": Pair(a, [b]), "y": (3, None, Output(None, c)), "z": OrderedDict(k=d)}
    assert [int(t) for t in tensors_in(value)] == [0, 1, 2, 3]


def test_map_keeps_structure_and_leaves_the_original() -> None:
    value = {"x": Pair(torch.ones(1), [torch.ones(2)]), "y": Output(None, torch.ones(3))}
    mapped = map_tensors(lambda t: t + 1, value)
    assert type(mapped["x"]) is Pair
    assert mapped["y"].loss is None
    assert all((t == 2).all() for t in tensors_in(mapped))
    assert all((t == 1).all() for t in tensors_in(value))


def test_map_rebuilds_what_torch_functions_return() -> None:
    values, indices = map_tensors(lambda t: t[:1], torch.max(torch.rand(3, 4), dim=1))
    assert values.shape == indices.shape == (1,)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t,),
        lambda t: {"logits": t},
        lambda t: Output(None, t),
        lambda t: (t, torch.rand(2, 7, 3)),
        lambda t: {"features": torch.rand(2, 7), "logits": t},
        lambda t: (torch.rand(2, 7), {"logits": t}),
    ],
)
def test_logits_are_found(wrap) -> None:
    logits = torch.rand(2, 5)
    assert logits_in(wrap(logits)) is logits


def test_no_logits() -> None:
    assert logits_in(torch.rand(2, 3, 4)) is None
    assert logits_in(("a", 1)) is None
    assert logits_in((torch.rand(2, 7), torch.rand(2, 5))) is None  # which one?
