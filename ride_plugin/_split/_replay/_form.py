"""The form of a value: where its tensors lie. What is known of one holds for others of its form."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ride_plugin._checks import version_of
from ride_plugin._inputs import Inputs
from ride_plugin._tree import tensors_in

Form: TypeAlias = Any
"""The number of dimensions of a tensor; tuples of forms for what holds several values."""

_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_PLAIN = (bool, int, float, complex, str, bytes, np.generic, torch.dtype, *_FUNCTIONS)


def form_of(value: Any, options: bool = False) -> Form:
    """Where the tensors in a value lie, and how many dimensions each has.

    Args:
        value: anything.
        options: note words, numbers and what is true or false as well, in dicts and dataclasses
            too. Those in a list are left out: it may have one for each row.
    """
    if isinstance(value, Tensor):
        return value.dim()
    if isinstance(value, Mapping):
        return tuple((str(key), form_of(item, options)) for key, item in value.items())
    if isinstance(value, list | tuple | deque):
        return tuple(map(form_of, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return tuple(form_of(getattr(value, field.name), options) for field in fields)
    return str(value) if options and isinstance(value, bool | str | int | float) else None


def form_of_inputs(inputs: Inputs) -> Form:
    """The form of arguments. What is true or false, a word or a number decides what is done."""
    args, kwargs = inputs
    return tuple(form_of(value, options=True) for value in args), form_of(kwargs, options=True)


def single_in(inputs: Inputs) -> tuple[bool, ...]:
    """Which tensors of the arguments have one slice, whatever the batch: they are for all rows."""
    return tuple(t.dim() > 0 and t.shape[0] == 1 for t in tensors_in(inputs))


def plain_in(value: Any) -> Iterator[Any]:
    """What is no tensor and can be compared, depth first: numbers, words, dtypes, functions."""
    if isinstance(value, _PLAIN) or value is None:
        yield value
    else:
        for item in _items_of(value):
            yield from plain_in(item)


def _items_of(value: Any) -> Iterable[Any]:
    """What a container holds; nothing of what is none."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple | deque):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return ()


def versions_in(values: Sequence[Any]) -> list[int | None]:
    """How often each tensor of a tape was changed in place."""
    return [version_of(tensor) for value in values for tensor in tensors_in(value)]
