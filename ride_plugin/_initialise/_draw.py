"""A tensor drawn anew from the distribution that its own values show.

Shuffling a parameter's own entries is an independent draw for every initialisation with independent
entries, and leaves constants (zero-initialised gains, LayerScale, the row of a padding index) as
they are. Values that have their places are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ride_plugin._initialise._structure import is_structured

_LARGEST_CHECKED = 4096  # rows; orthogonality of larger matrices is not looked for
_FEW = 8  # entries or rows that are looked at first
_SAMPLE = 64  # entries at random places, looked at before all zeros of a weight are counted
_BLOCK = 2**16  # entries; so many, and their order, stay near the processor while they are shuffled


def redraw(parameter: Tensor) -> bool:
    """Draw a parameter anew in place; False if its values have their places, so that it is left."""
    if not _can_be_drawn(parameter):
        return True
    if is_sparse(parameter):
        return False
    constant = constant_rows(parameter)
    if constant is not None:
        rows = parameter[~constant]
        drawn = rows.numel() > 0 and redraw(rows)
        parameter[~constant] = rows
        return drawn
    if is_structured(parameter):
        return False
    draw_anew(parameter)
    return True


def _can_be_drawn(parameter: Tensor) -> bool:
    numbers = parameter.is_floating_point() or parameter.is_complex()
    return numbers and parameter.numel() > 1 and not is_constant(parameter)


def draw_anew(parameter: Tensor) -> bool:
    """Draw a parameter anew in place, wherever its values stand; False if there is nothing to."""
    if not _can_be_drawn(parameter):
        return False
    if has_orthogonal_rows(parameter):
        # Shuffled entries would not be orthogonal; signed permutations of rows and columns are.
        matrix = parameter.flatten(1)
        for dim in (0, 1):
            size = matrix.shape[dim]
            order = torch.randperm(size, device=parameter.device)
            sign = torch.randint(0, 2, (size,), device=parameter.device) * 2 - 1
            shape = [size, 1] if dim == 0 else [1, size]
            matrix = matrix.index_select(dim, order) * sign.view(shape).to(matrix.dtype)
        parameter.copy_(matrix.view_as(parameter))
    else:
        parameter.copy_(shuffled_to(parameter.shape, parameter))
    return True


def shuffled_to(shape: Sequence[int], values: Tensor) -> Tensor:
    """A tensor of this shape with the entries of ``values`` in random order.

    They stay within blocks of one spread, and rows that have one length have one again.
    """
    count = math.gcd(_blocks_in(values), shape[0])
    size = math.prod(shape) // count
    blocks = [shuffled(block, size) for block in values.chunk(count)]
    drawn = (torch.cat(blocks) if count > 1 else blocks[0]).view(*shape)
    length = _length_of_rows(values)
    if length is not None and _length_of_rows(drawn) is None:
        length *= (drawn[0].numel() / values[0].numel()) ** 0.5
        drawn = F.normalize(drawn.flatten(1)).mul(length).view(*shape)
    return drawn


def _blocks_in(parameter: Tensor) -> int:
    """How many blocks of rows are drawn by themselves: more than one if their spreads differ.

    Two, three or four layers whose weights stand in one parameter, queries, keys and values say,
    may have been drawn with different spreads. Twelfths belong to one of them each. Where chance
    alone makes spreads differ, a draw within blocks is as good.
    """
    count = math.gcd(len(parameter), 12)
    if parameter.numel() < 64 * count:
        return 1
    squares = parameter.abs().float().square().reshape(count, -1).mean(1)
    return count if float(squares.max()) > 2 * float(squares.min()) else 1


def _length_of_rows(parameter: Tensor) -> float | None:
    """The length that all rows have, as prototypes have it; None if they differ."""
    if parameter.dim() < 2 or len(parameter) < 2:
        return None
    rows = parameter.flatten(1)
    for some in (rows[:_FEW], rows):  # a few tell almost always
        low, high = torch.linalg.vector_norm(some.abs().float(), dim=1).aminmax()
        if float(high - low) > max(1e-4, torch.finfo(parameter.dtype).eps) * float(high):
            return None
    return float(high)


def shuffled(values: Tensor, count: int) -> Tensor:
    """``count`` entries of ``values`` in random order, all of them used before one is repeated."""
    flat = values.flatten()
    if count > flat.numel():
        parts = [shuffled(flat, flat.numel()) for _ in range(count // flat.numel())]
        return torch.cat([*parts, shuffled(flat, count % flat.numel())])
    # One order for all blocks will do: what stands in one is independent of the others already.
    size = min(flat.numel(), _BLOCK)
    blocks, rest = flat.split([flat.numel() // size * size, flat.numel() % size])
    drawn = []
    for entries in (blocks.view(-1, size), rest.view(1, -1)):
        if entries.numel():
            order = torch.randperm(entries.shape[1], dtype=torch.int32, device=flat.device)
            order = order[: -(-entries.shape[1] * count // flat.numel())]
            drawn.append(entries.index_select(1, order).flatten())
    return torch.cat(drawn)[:count] if len(drawn) > 1 else drawn[0][:count]


def is_constant(parameter: Tensor) -> bool:
    """Whether all entries are equal; where there is none, they are."""
    if not parameter.numel():
        return True
    first = parameter.flatten()[:_FEW]  # these tell almost always
    if bool((first != first[0]).any()):
        return False
    return bool((parameter == parameter.flatten()[0]).all())


def constant_rows(parameter: Tensor) -> Tensor | None:
    """Which rows hold one value each, zeros for a padding index say; None if no row does."""
    if parameter.dim() < 2:
        return None
    rows = parameter.flatten(1)
    # Of two values, plus or minus one say, short rows are equal by chance, but not zero.
    constant = rows[:, 0] == rows[:, -1] if rows.shape[1] >= _FEW else rows[:, 0] == 0
    if rows.shape[1] < 2 or not bool(constant.any()):
        return None
    constant = (rows == rows[:, :1]).all(1) & constant
    return constant if bool(constant.any()) else None


def is_sparse(parameter: Tensor) -> bool:
    """Whether most entries are zero and have their places: identity, dirac, pruned weights."""
    entries = parameter.flatten()
    if entries.numel() > _SAMPLE**2:
        # If half were zero, so many at random places would all be others once in 2^64 times.
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(entries.numel(), (_SAMPLE,), generator=generator, device="cpu")
        if bool(entries[places.to(entries.device)].all()):
            return False
    return 2 * int(entries.count_nonzero()) < entries.numel()


def has_orthogonal_rows(parameter: Tensor) -> bool:
    """Whether the rows of a matrix, or its columns if there are fewer, are orthogonal."""
    if parameter.dim() < 2 or min(parameter.shape[0], parameter[0].numel()) < 2:
        return False
    matrix = parameter.flatten(1)
    matrix = matrix.to(torch.complex64) if matrix.is_complex() else matrix.float()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.t()
    if matrix.shape[0] > _LARGEST_CHECKED:
        return False
    # A few rows tell almost always, and the product of all would cost more than a forward.
    return _is_orthogonal(matrix[:_FEW]) and _is_orthogonal(matrix)


def _is_orthogonal(matrix: Tensor) -> bool:
    gram = matrix @ matrix.mH
    scale = gram.diagonal().abs().mean()
    identity = torch.eye(gram.shape[0], device=gram.device) * scale
    return bool((gram - identity).abs().max() < 1e-3 * scale)
