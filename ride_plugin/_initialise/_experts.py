"""Fresh weights for an expert, drawn from the distribution that the backbone was given.

Calling ``reset_parameters`` would change the spread of most weights (a backbone's constructor
usually initialises over them), and misses parameters of the backbone's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Set

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ride_plugin._initialise._draw import (
    draw_anew,
    has_orthogonal_rows,
    is_constant,
    is_sparse,
    redraw,
)


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
        done = _draw_computed(classifier, {id(p) for p in unchanged}, draw_anew)
        for parameter in unchanged:
            if id(parameter) not in done and not is_sparse(parameter):
                draw_anew(parameter)  # neighbours may be alike in trained weights


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
