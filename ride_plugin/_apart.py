"""Whether what was drawn anew for each expert differs between them.

This looks at the result, whatever was meant to make it differ. Experts all of whose weights are
equal are found in training.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set

import torch
from torch import Tensor, nn

from ride_plugin._errors import warn_caller
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
