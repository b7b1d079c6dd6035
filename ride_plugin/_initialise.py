"""Fresh weights for an expert, drawn from the distribution that the backbone was given.

Calling ``reset_parameters`` would change the spread of most weights (a backbone's constructor
usually initialises over them), and misses parameters of the backbone's own modules. Shuffling a
parameter's own entries is an independent draw for every initialisation with independent entries,
and leaves constants (zero-initialised gains, LayerScale, the row of a padding index) as they are.
Values that have their places are left as they are, and named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ride_plugin._structure import is_structured

_LARGEST_CHECKED = 4096  # rows; orthogonality of larger matrices is not looked for
_FEW = 8  # entries or rows that are looked at first
_SAMPLE = 64  # entries at random places, looked at before all zeros of a weight are counted
_BLOCK = 2**16  # entries; so many, and their order, stay near the processor while they are shuffled


def reinitialise(expert: nn.Module, keep: set[int]) -> list[str]:
    """Redraw an expert's parameters in place and reset its BatchNorm statistics.

    Frozen parameters stay as they are: fresh values would be random for good.

    Args:
        expert: an exact copy of the backbone's forked part.
        keep: ids of tensors that are not the expert's own (frozen, or tied to the trunk).

    Returns:
        Names of parameters that could not be redrawn safely and were left as they are.
    """
    left: list[str] = []
    with torch.no_grad():
        gates = _gates_in(expert)
        own = {name: p for name, p in expert.named_parameters() if _is_own(p, keep)}
        done = _draw_computed(expert, {id(p) for p in own.values()}, redraw)
        for name, parameter in own.items():
            if id(parameter) in done:
                continue
            if not _redraw_gates(parameter, gates.get(id(parameter), 1)):
                left.append(name)
    for module in expert.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and not any(
            id(buffer) in keep for buffer in module.buffers()
        ):
            module.reset_running_stats()
    return left


def renew_classifier(classifier: nn.Module, keep: Set[int] = frozenset()) -> None:
    """Give a classifier new weights: by its own method, else by shuffling; never all equal.

    The method leaves what it does not know, as a layer's own does if its weight is computed from
    other parameters: those are shuffled as well.

    Args:
        classifier: changed in place.
        keep: ids of parameters that are not its own; these and frozen ones stay as they are.
    """
    reset = getattr(classifier, "reset_parameters", None)
    with torch.no_grad():
        before = [(parameter, parameter.clone()) for parameter in classifier.parameters()]
        if callable(reset):
            reset()
        unchanged = []
        for parameter, value in before:
            if not _is_own(parameter, keep):
                parameter.copy_(value)
            elif torch.equal(parameter, value):
                unchanged.append(parameter)
        done = _draw_computed(classifier, {id(p) for p in unchanged}, _draw)
        for parameter in unchanged:
            if id(parameter) not in done and not is_sparse(parameter):
                _draw(parameter)  # neighbours may be alike in trained weights


def break_tie(classifier: nn.Module, keep: Set[int] = frozenset()) -> None:
    """Give a classifier with constant weights (zero-initialised) a small random weight.

    Experts whose classifiers are equal and zero would receive equal gradients at first. Where one
    weight is random the experts part, and constants beside it (an adapter's second matrix, the
    lengths of weight normalisation) stay.
    """
    weights = [p for p in classifier.parameters() if p.dim() >= 2 and _is_own(p, keep)]
    with torch.no_grad():
        if all(is_constant(weight) for weight in weights):
            for weight in weights:
                weight.add_(0.01 * torch.randn_like(weight))


def _is_own(parameter: Tensor, keep: Set[int]) -> bool:
    """Whether a parameter may start with other values: fresh ones of a frozen one would stay."""
    return parameter.requires_grad and id(parameter) not in keep


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
    _draw(parameter)
    return True


def _can_be_drawn(parameter: Tensor) -> bool:
    numbers = parameter.is_floating_point() or parameter.is_complex()
    return numbers and parameter.numel() > 1 and not is_constant(parameter)


def _draw_computed(root: nn.Module, own: Set[int], draw: Callable[[Tensor], bool]) -> set[int]:
    """Draw orthogonal weights that a parametrization computes, by handing it other weights.

    To shuffle what they are computed from would not do: reflections would not make an orthogonal
    weight any more, and the identity that torch starts from counts as having its places.

    Args:
        root: changed in place.
        own: ids of the parameters that may change.
        draw: draws a tensor in place; False if it has left it.

    Returns:
        Ids of the parameters that hold what was drawn.
    """
    done: set[int] = set()
    for module in filter(is_parametrized, root.modules()):
        computed = module.parametrizations
        assert isinstance(computed, nn.ModuleDict)
        for name, held in computed.items():
            sources = {id(parameter) for parameter in held.parameters()}
            weight = getattr(module, name).detach().clone()
            if sources <= own and has_orthogonal_rows(weight) and draw(weight):
                try:
                    setattr(module, name, weight)
                except Exception:  # not every parametrization can be handed a weight
                    continue
                done |= sources
    return done


def _draw(parameter: Tensor) -> bool:
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
        _shuffle(parameter)
    return True


def _shuffle(parameter: Tensor) -> None:
    """Put the entries in another order, within blocks of one spread; equal lengths stay equal."""
    length = _length_of_rows(parameter)
    for block in parameter.chunk(_blocks_in(parameter)):
        block.copy_(shuffled(block, block.numel()).view_as(block))
    if length is not None and _length_of_rows(parameter) is None:
        parameter.copy_(F.normalize(parameter.flatten(1)).mul(length).view_as(parameter))


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
        if float(high - low) > 1e-4 * float(high):
            return None
    return float(high)


def _redraw_gates(parameter: Tensor, gates: int) -> bool:
    """Draw a parameter of a recurrent layer anew gate by gate, since gates start differently."""
    if gates == 1:  # or it has no dimension
        return redraw(parameter)
    parts = parameter.chunk(gates)
    if has_orthogonal_rows(parameter) and not has_orthogonal_rows(parts[0]):
        parts = (parameter,)  # drawn orthogonal as a whole
    drawn = [redraw(part) for part in parts]  # all of them, whatever the first says
    return all(drawn)


def _gates_in(expert: nn.Module) -> dict[int, int]:
    """How many gates have their rows in a parameter of a recurrent layer, by its id."""
    return {
        id(parameter): parameter.shape[0] // module.hidden_size
        for module in expert.modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() and parameter.shape[0] % module.hidden_size == 0
    }


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
    """Whether all entries are equal."""
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
