"""What a stage takes: dtypes and sizes as they were at the export, free only where that was so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ride_plugin._errors import ArgumentError

Sizes: TypeAlias = list[int | str]
"""Sizes of one input; a free size is a name, which stands for one size wherever it occurs."""


def inputs_of_program(program: ExportedProgram) -> tuple[list[torch.dtype], list[Sizes]]:
    """Dtypes and sizes of a program's inputs, without the weights."""
    names = set(program.graph_signature.user_inputs)
    nodes = program.graph.find_nodes(op="placeholder")
    return inputs_of_nodes(node for node in nodes if node.name in names)


def inputs_of_nodes(placeholders: Iterable[fx.Node]) -> tuple[list[torch.dtype], list[Sizes]]:
    """Dtypes and sizes of what a graph takes."""
    taken = [node.meta["val"] for node in placeholders]
    sizes = [
        [size if isinstance(size, int) else str(size) for size in value.shape] for value in taken
    ]
    return [value.dtype for value in taken], sizes


def check_inputs(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], expected: Sequence[Sizes]
) -> None:
    """Refuse inputs unlike the exported ones: the graph holds what follows from their sizes.

    Raises:
        ArgumentError: number, dtype or size of a tensor differs.
    """
    free: dict[str, int] = {}
    fits = len(tensors) == len(expected)
    for tensor, dtype, sizes in zip(tensors, dtypes, expected, strict=False):
        fits = fits and tensor.dtype == dtype and len(tensor.shape) == len(sizes)
        for size, wanted in zip(tensor.shape, sizes, strict=False):
            if isinstance(wanted, str):
                wanted = free.setdefault(wanted, size)
            fits = fits and size == wanted
    if not fits:
        named = [_described(*kind) for kind in zip(dtypes, expected, strict=True)]
        found = [_described(tensor.dtype, tensor.shape) for tensor in tensors]
        raise ArgumentError(
            f"Expected the inputs of this stage to be {', '.join(named)}, as they were at the "
            f"export, but got {', '.join(found) or 'none'}. Export the stages with an "
            "`example_input` like the batches to be served."
        )


def _described(dtype: torch.dtype, sizes: Iterable[int | str]) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, sizes))}]"
