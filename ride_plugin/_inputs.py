"""A batch as a forward receives it: positional and keyword arguments, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ride_plugin._errors import ArgumentError, RIDEError
from ride_plugin._tree import holds_tensors, map_tensors, own_container, tensors_in

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def as_inputs(example: Any) -> Inputs:
    """Turn ``example_input`` into ``(args, kwargs)``.

    It is a tuple of arguments, a mapping of keyword arguments, or one argument: a tensor, or what
    holds some, for example the trunk's state.
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple):
        if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict):
            return example
        return example, {}
    if not isinstance(example, list) and holds_tensors(example):
        return (example,), {}
    raise ArgumentError(
        "Expected argument `example_input` to be a tensor, a tuple of positional arguments or a "
        f"mapping of keyword arguments, but got {type(example).__name__}."
    )


def own_inputs(inputs: Inputs, tensors: bool = False) -> Inputs:
    """The same arguments in containers of their own, since a forward may pop or append.

    With ``tensors`` these are copied as well: a forward may change its input in place.
    """
    args, kwargs = inputs
    memo: dict[int, tuple[Any, Any]] = {}  # what two arguments hold stays one object
    own: Inputs = (
        tuple(own_container(value, memo) for value in args),
        {name: own_container(value, memo) for name, value in kwargs.items()},
    )
    if tensors:
        own = map_tensors(torch.clone, own)
    return own


def run_plainly(module: nn.Module, inputs: Inputs) -> Any:
    """What a module returns without gradients for copies of these inputs, which it may change."""
    args, kwargs = own_inputs(inputs, tensors=True)
    with torch.no_grad():
        return module(*args, **kwargs)


def in_order_of(example: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments in the example's order, whose first tensor tells the batch size."""
    if len(kwargs) < 2 or list(kwargs) == list(example):
        return kwargs
    first = {name: kwargs[name] for name in example if name in kwargs}
    return first | kwargs


def batch_size_of(inputs: Inputs, name: str = "the arguments of the call") -> int:
    """Batch size: the first dimension of the first tensor that has one; errors say ``name``."""
    for tensor in tensors_in(inputs):
        if tensor.is_nested:
            raise ArgumentError(
                "Expected tensors with a batch dimension, but got a nested tensor, whose rows are "
                "of different sizes. Pass `torch.nested.to_padded_tensor(x, 0.0)` and a mask."
            )
        if tensor.dim() > 0:
            return tensor.shape[0]
    args, kwargs = inputs
    kinds = ", ".join(type(value).__name__ for value in (*args, *kwargs.values())) or "nothing"
    raise ArgumentError(
        f"Expected {name} to hold a tensor with a batch dimension, but got {kinds}. Pass a batch "
        "as the backbone's forward receives it, for images `torch.zeros(2, 3, 32, 32)` say."
    )


def row_sizes(inputs: Inputs, rows: int) -> tuple[tuple[int, ...], ...]:
    """Sizes of one row of every tensor; the whole tensor's where it is for all ``rows``."""
    shapes = (tuple(tensor.shape) for tensor in tensors_in(inputs))
    return tuple(shape[1:] if shape[:1] == (rows,) else shape for shape in shapes)


def rows_of_example(inputs: Inputs) -> int:
    """Batch size of an example, which has at least one row."""
    return at_least_one_row(batch_size_of(inputs, "argument `example_input`"))


def at_least_one_row(rows: int) -> int:
    """Return the number of rows of an example, which is no empty batch."""
    if rows < 1:
        raise ArgumentError(
            "Expected argument `example_input` to hold at least one row, but got an empty batch."
        )
    return rows


@contextmanager
def taken_by_model(example: Any) -> Iterator[None]:
    """Say that it is about ``example_input``, where one was given, if a model fails on it."""
    try:
        yield
    except RIDEError:
        raise
    except Exception as error:
        if example is None:
            raise
        raise ArgumentError(
            "Expected argument `example_input` to be a batch as the model's forward receives it, "
            f"but on this one it raised {type(error).__name__}: {error}"
        ) from error


_SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc})


def resize_batch(inputs: Inputs, batch_size: int, most: int | None = None) -> Inputs:
    """Repeat the rows of an example until there are ``batch_size``; repeated rows are varied.

    Floating rows get a little noise and integer rows are rotated, so that rows differ (a check
    that rows come back in order needs that) and stay valid (token ids, masks). With ``most``, only
    so many of the first rows are used.
    """
    given = rows_of_example(inputs)
    given = given if most is None else min(given, most)
    generator = torch.Generator().manual_seed(0)

    def resize(tensor: Tensor) -> list[Tensor]:
        rows = [tensor[i % given] for i in range(batch_size)]
        for i in range(given, batch_size):
            if tensor.is_floating_point():
                noise = torch.randn(rows[i].shape, generator=generator, device="cpu").to(tensor)
                rows[i] = rows[i] + 0.3 * noise
            elif rows[i].dim() > 0:
                rows[i] = rows[i].roll(i, dims=0)
        return rows

    return _with_rows(inputs, resize)


def repeat_row(inputs: Inputs, row: int) -> Inputs:
    """One row of an example twice, as it was given."""
    return _with_rows(inputs, lambda tensor: [tensor[row]] * 2)


def _with_rows(inputs: Inputs, rows: Callable[[Tensor], list[Tensor]]) -> Inputs:
    """Other rows in every tensor that has one for each row of the batch."""
    given = rows_of_example(inputs)

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != given:
            return tensor
        if tensor.layout in _SPARSE:
            return change(tensor.to_dense()).to_sparse(layout=tensor.layout)
        return torch.stack(rows(tensor))

    changed: Inputs = map_tensors(change, own_inputs(inputs))
    return changed
