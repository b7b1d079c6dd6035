"""Nested values: their tensors, maps over them, and which of them are the logits."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ride_plugin._tree import (
    at_path,
    emptied,
    filled,
    logits_in,
    map_tensors,
    matrices_in,
    own_container,
    tensors_in,
)


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


def test_map_keeps_the_kinds_of_containers() -> None:
    value = UserDict(a=torch.ones(1), b=deque([torch.ones(2)], maxlen=3), c=3)
    mapped = map_tensors(lambda t: t + 1, value)
    assert type(mapped) is UserDict
    assert mapped["b"].maxlen == 3
    assert mapped["c"] == 3
    assert all((t == 2).all() for t in tensors_in(mapped))
    assert all((t == 1).all() for t in tensors_in(value))


def test_a_matrix_lies_where_it_is_said_to() -> None:
    a, b, c, d = (torch.rand(2, n) for n in range(2, 6))
    value = {"x": Pair(a, [b, torch.rand(3)]), "y": Output(None, c), "z": SimpleNamespace(logits=d)}
    found = matrices_in(value)
    paths = [("x", "first"), ("x", "second", 0), ("y", "logits"), ("z", "logits")]
    assert [path for path, _ in found] == paths
    assert all(at_path(value, path) is tensor for path, tensor in found)


@pytest.mark.parametrize("path", [("x", 1), ("x", -2), (0, "x"), ("w",), ("x", 0, "logits")])
def test_where_nothing_lies(path: tuple[int | str, ...]) -> None:
    assert at_path({"x": [torch.rand(2, 3)]}, path) is None


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


@dataclass(frozen=True)
class Checked:
    """Refuses what is no tensor."""

    features: Tensor
    size: int = 3

    def __post_init__(self) -> None:
        assert isinstance(self.features, Tensor)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (torch.rand(1), ()),
        ([1, torch.rand(1)], (1,)),
        ((torch.rand(1), 2), (-2,)),
        (Pair(torch.rand(1), torch.rand(1)), ("second",)),
        (Pair(torch.rand(1), torch.rand(1)), (1,)),
        (torch.max(torch.rand(3, 4), dim=1), (0,)),
        ({"a": 1, "b": [torch.rand(1), None]}, ("b", 0)),
        (OrderedDict(a=torch.rand(1), b=2), ("a",)),
        (UserDict(a=torch.rand(1), b=2), ("a",)),
        (Checked(torch.rand(1)), ("features",)),
        (Output(None, torch.rand(1)), ("logits",)),
        (SimpleNamespace(logits=torch.rand(1), other=torch.rand(1)), ("logits",)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_another_tensor_takes_its_place_and_nothing_else_stays(value: Any, path: Any) -> None:
    old, new = at_path(value, path), torch.ones(2)
    made = filled(emptied(value, path), new)
    assert at_path(made, path) is new
    assert [tensor for tensor in tensors_in(made) if tensor is not new] == []
    assert at_path(value, path) is old  # the original is not written
    if not isinstance(value, UserDict):
        assert type(made) is type(value)
    if path and not isinstance(path[0], int):
        held = made if isinstance(made, dict) else getattr(made, "__dict__", {})
        assert all(item is None for key, item in held.items() if key != path[0])


class Batch(MutableMapping[str, Any]):
    """Keeps its entries in a dict, of which it knows no copy."""

    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class Holds:
    values: list[Tensor]


@pytest.mark.parametrize(
    ("hold", "inner"),
    [
        (lambda held: {"a": held}, lambda value: value["a"]),
        (lambda held: [1, held], lambda value: value[1]),
        (lambda held: (torch.rand(1), held), lambda value: value[1]),
        (lambda held: Pair(torch.rand(1), held), lambda value: value.second),
        (lambda held: deque([held], maxlen=2), lambda value: value[0]),
        (lambda held: OrderedDict(a=(held,)), lambda value: value["a"][0]),
        (lambda held: UserDict(a=held), lambda value: value["a"]),
        (lambda held: Batch(a=held), lambda value: value["a"]),
        (Holds, lambda value: value.values),
    ],
)
def test_containers_are_somebody_s_own_at_any_depth(hold: Any, inner: Any) -> None:
    held = [torch.rand(1)]
    value = hold(held)
    own = own_container(value)
    assert type(own) is type(value)
    assert inner(own) is not held
    assert inner(own)[0] is held[0]  # tensors stay what they are
    inner(own).append(None)
    assert len(inner(value)) == 1
    if isinstance(own, MutableMapping):
        own.clear()
        assert "a" in value


def test_what_is_one_object_stays_one_and_what_cannot_change_is_itself() -> None:
    held, tensor = [torch.rand(1)], torch.rand(1)
    circle: list[Any] = [held]
    circle.append(circle)
    own = own_container({"a": held, "b": (held,), "c": circle})
    assert own["a"] is own["b"][0] is own["c"][0]
    assert own["c"][1] is own["c"] is not circle
    for value in (tensor, (tensor, 2), "word", SimpleNamespace(a=held), MappingProxyType({"a": 1})):
        assert own_container(value) is value


def test_a_map_leaves_the_entries_of_a_mapping_of_somebody_s_own() -> None:
    value = Batch(a=torch.ones(1))
    assert map_tensors(lambda t: t + 1, value)["a"] == 2
    assert value["a"] == 1
