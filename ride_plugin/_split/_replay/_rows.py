"""Which dimension of a recorded value is the batch, and how to take some of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ride_plugin._errors import ArgumentError, ReplayError, SplitError
from ride_plugin._split._replay._hollow import is_hollow


class Rows(NamedTuple):
    """The batch dimension of a value, and how many of its slices belong to a sample of the example.

    ``per_sample`` is above one where a backbone folds something into the batch, such as windows or
    the frames of a video. Another input may have another number of them.
    """

    dim: int
    per_sample: int


def find_rows(key: str, small: Tensor, large: Tensor, batches: tuple[int, int]) -> Rows | None:
    """Compare one value at two batch sizes; None when it does not depend on the batch.

    Raises:
        SplitError: more than one dimension scales with the batch, or one scales differently.
    """
    if small.shape == large.shape:
        return None
    scaling = [i for i, (a, b) in enumerate(zip(small.shape, large.shape, strict=False)) if a != b]
    if small.dim() == large.dim() and len(scaling) == 1:
        (dim,) = scaling
        per_sample, rest = divmod(small.shape[dim], batches[0])
        if rest == 0 and large.shape[dim] == per_sample * batches[1]:
            return Rows(dim, per_sample)
    raise SplitError(
        f"The value that `{key}` hands to the experts has shape {list(small.shape)} for a batch of "
        f"{batches[0]} and {list(large.shape)} for a batch of {batches[1]}; expected exactly one "
        "dimension to scale with the batch. "
        + (
            "It relates rows to one another. Pass `fork_at=` a later submodule, behind the place "
            "where it is used."
            if len(scaling) > 1
            else "Pass `fork_at=` another submodule. (A packed sequence has no such dimension: "
            "fork where it is padded again, or pack it inside of a submodule.)"
        )
    )


def take_rows(value: Tensor, spec: Rows | None, rows: Tensor, batch_size: int) -> Tensor:
    """Gather rows ``[b]`` of a value of a whole batch, in the memory layout that the value has.

    ``index_select`` alone always returns the contiguous layout, which would send channels-last
    experts back to the slow one; gathering through a view in memory order keeps it.

    Raises:
        ReplayError: which slices belong to which row cannot be told.
    """
    if spec is None:
        return value
    dim, per_sample = spec.dim, _per_sample(value, spec, batch_size)
    if is_hollow(value):
        shape = list(value.shape)
        shape[dim] = rows.numel() * per_sample
        return value[(0,) * value.dim()].expand(shape)
    if per_sample > 1:
        inside = torch.arange(per_sample, device=rows.device)
        rows = (rows.unsqueeze(1) * per_sample + inside).flatten()
    if value.layout is not torch.strided:  # sparse: only one of the layouts can be indexed
        some: Tensor = value.to_sparse_coo().index_select(dim, rows)
        return some.to_sparse(layout=value.layout)
    if value.is_contiguous():
        return value.index_select(dim, rows)
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    back = sorted(range(value.dim()), key=order.__getitem__)
    return value.permute(order).index_select(order.index(dim), rows).permute(back)


def _per_sample(value: Tensor, spec: Rows, batch_size: int) -> int:
    """How many slices of a value belong to one row.

    An example with a single slice for each row does not tell in which order several would lie.

    Raises:
        ReplayError: the slices do not come out even, or the example had one for each row.
    """
    size = value.shape[spec.dim]
    if size == batch_size * spec.per_sample:
        return spec.per_sample
    per_sample, rest = divmod(size, batch_size) if batch_size else (0, size)
    if rest or spec.per_sample == 1:
        raise ReplayError(
            f"A value that the experts read has {size} slices along dimension {spec.dim} for a "
            f"batch of {batch_size}, where the example had {spec.per_sample} for each row, so it "
            "is not known which belong to which row. Wrap the backbone with an `example_input=` "
            "that folds as many into the batch, at least two for each row."
        )
    return per_sample


def join_rows(
    values: Sequence[Tensor], spec: Rows | None, live: bool, batch_sizes: Sequence[int]
) -> Tensor:
    """Concatenate values of several batches along their batch dimension, in their layout.

    Of a value that no expert reads (not ``live``) there may be nothing but NaN: its shape counts.

    Raises:
        ArgumentError: they differ in another dimension, in dtype or device, or where they do not
            depend on the batch.
    """
    first = values[0]
    if len({(value.dtype, value.device) for value in values}) > 1:
        found = sorted({f"{value.dtype} on {value.device}" for value in values})
        raise ArgumentError(
            "Expected batches of one dtype on one device, but got trunk values of "
            f"{' and '.join(found)}. Run them apart."
        )
    if spec is None:
        others = [value for value in values[1:] if value is not first]
        same = torch.equal if live else _same_shape
        if not all(same(other, first) for other in others):
            raise ArgumentError(
                "Expected batches that differ in their rows only, but a value that has no batch "
                "dimension differs between them. Run them apart."
            )
        return first
    dim = spec.dim
    shapes = {
        (*value.shape[:dim], _per_sample(value, spec, size), *value.shape[dim + 1 :])
        for value, size in zip(values, batch_sizes, strict=True)
    }
    if len(shapes) > 1:
        raise ArgumentError(
            "Expected batches of one input size, but got trunk values of shapes "
            f"{[list(value.shape) for value in values]}. Run inputs of different sizes apart."
        )
    if all(is_hollow(value) for value in values):
        shape = list(first.shape)
        shape[dim] = sum(value.shape[dim] for value in values)
        return first[(0,) * first.dim()].expand(shape)
    return torch.cat(list(values), dim)


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape
