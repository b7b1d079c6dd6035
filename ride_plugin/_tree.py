"""Tensors inside nested values: what modules take and return, whatever container they use."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, depth first: tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return the value with ``function`` applied to its tensors, in :func:`tensors_in`'s order."""
    if isinstance(value, Tensor):
        return function(value)
    if next(tensors_in(value), None) is None:
        return value
    if isinstance(value, dict) and type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)  # keeps subclasses such as BatchEncoding or ModelOutput
        for key, item in value.items():
            changed[key] = map_tensors(function, item)
        return changed
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return dataclasses.replace(
        value,
        **{
            field.name: map_tensors(function, getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        },
    )


def logits_in(output: Any) -> Tensor | None:
    """Return the ``[B, C]`` logits of a classifier's output, or None if there are none.

    A tensor is the logits; a structured output gives its ``logits`` entry, else its first matrix.
    """
    if isinstance(output, Tensor):
        return output if output.dim() == 2 and output.is_floating_point() else None
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return logits_in(named)
    matrices = (t for t in tensors_in(output) if t.dim() == 2 and t.is_floating_point())
    return next(matrices, None)
