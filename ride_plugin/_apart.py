"""Whether what was drawn anew for each expert differs between them.

This looks at the result, whatever was meant to make it differ. Experts all of whose weights are
equal for another reason than a copy are found in training.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set

import torch
from torch import Tensor, nn

from ride_plugin._errors import listed, warn_caller
from ride_plugin._initialise import is_constant

_SURPRISE = 14.0  # minus the logarithm of a probability, as for structure


def warn_if_equal(
    experts: Sequence[nn.Module], keep: Set[int], drawn: str | None, named: Collection[str] = ()
) -> None:
    """Warn of parameters that should differ between experts and do not.

    Args:
        experts: with the values that they start with.
        keep: ids of tensors that are not an expert's own.
        drawn: name of the module, inside an expert, all of whose parameters were drawn anew; an
            empty name is the whole expert, None is none.
        named: parameters of which a warning has told already.
    """
    if len(experts) < 2 or drawn is None:
        return
    second = dict(experts[1].named_parameters())
    prefix = f"{drawn}." if drawn else ""
    left = [
        name
        for name, parameter in experts[0].named_parameters()
        if name.startswith(prefix)
        and name not in named
        and parameter.requires_grad
        and id(parameter) not in keep
        and name in second
        and torch.equal(parameter, second[name])
        and not is_constant(parameter)
        and not _is_equal_by_chance(parameter)
        and not _computes_different(name, experts)
    ]
    if left:
        warn_caller(
            f"Not drawn anew, so equal in all experts: {left}. To make experts differ there, set "
            "them in `model.experts[k]`."
        )


def warn_if_copied(experts: Sequence[nn.Module], keep: Set[int], num_classes: int) -> None:
    """Warn of experts that ``init="copy"`` has left equal: nothing in them was drawn anew.

    Args:
        experts: with the values that they start with.
        keep: ids of tensors that are not an expert's own.
        num_classes: ``C``, by which parameters that may be class weights are told.
    """
    first, second = (dict(expert.named_parameters()) for expert in (*experts, *experts)[:2])
    own = {n: p for n, p in first.items() if p.requires_grad and id(p) not in keep}
    if len(experts) < 2 or not own:
        return
    if all(name in second and torch.equal(p, second[name]) for name, p in own.items()):
        rows = [name for name, p in own.items() if p.dim() > 1 and num_classes in p.shape]
        which = f" (perhaps {listed(rows)})" if rows else ""
        warn_caller(
            'Experts 0 and 1 have equal weights: init="copy" draws the classifier anew, and none '
            "was found that is a module of the experts and trains. Equal experts receive equal "
            "gradients and stay one expert. Draw something anew in each of `model.experts[k]`"
            f"{which} before training; or let a module compute the logits of class weights, an "
            "nn.Linear or a ride_plugin.longtail.CosineClassifier say, and wrap that."
        )


def _is_equal_by_chance(parameter: Tensor) -> bool:
    """Whether so few entries, or so few different ones, come out in one order twice."""
    flat = parameter.detach().flatten()
    flat = flat.real if flat.is_complex() else flat
    times = flat.unique(return_counts=True)[1].tolist()
    orders = math.lgamma(len(flat) + 1) - sum(math.lgamma(count + 1) for count in times)
    return orders < _SURPRISE


def _computes_different(name: str, experts: Sequence[nn.Module]) -> bool:
    """Whether a weight that is computed from this parameter differs, by a basis say."""
    path, found, rest = name.rpartition("parametrizations.")
    if not found:
        return False
    key = rest.partition(".")[0]
    with torch.no_grad():
        first, second = (getattr(e.get_submodule(path.rstrip(".")), key) for e in experts[:2])
        return not torch.equal(first, second)
