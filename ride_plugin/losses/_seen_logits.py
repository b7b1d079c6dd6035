"""The logits that a criterion's softmax sees, which need not be those that it is given.

A criterion for long tails may add the logarithm of the class prior to the logits. On the plain ones
experts can then part at no cost to their criterion, by favouring rare classes on frequent classes'
images, so a term that rewards them for parting has to compare what the criteria see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin._numerics import float32_or_better
from ride_plugin._tree import map_tensors, tensors_in
from ride_plugin.losses._trials import try_out

_RATIO = 1.5  # of two probabilities that should be the same
_SUM = 0.08  # two shares of a prior differ from one by less, be the labels smoothed by a tenth
_SHIFT = 10.0  # of all logits, which a softmax does not see; most of a sigmoid's range


def seen_logits(criteria: Sequence[Any], experts: Tensor) -> Tensor:
    """Expert logits ``[B, E, C]`` as their criteria see them.

    A criterion that changes logits says so by a method ``with_prior(logits)``.

    Args:
        criteria: one for all experts, or one for each.
        experts: ``[B, E, C]``.
    """
    if not any(hasattr(criterion, "with_prior") for criterion in criteria):
        return experts
    if len(criteria) == 1:
        seen: Tensor = criteria[0].with_prior(experts)
        return seen
    each = zip(criteria, float32_or_better(experts).unbind(1), strict=True)
    return torch.stack(
        [c.with_prior(logits) if hasattr(c, "with_prior") else logits for c, logits in each], dim=1
    )


def adds_a_prior(
    criterion: Callable[..., Any],
    logits: Tensor,
    target: object,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> bool:
    """Whether a criterion adds something to the logits of some classes, or multiplies them.

    As far as can be told. A factor for each class, as of class-dependent temperatures, leaves
    experts as free to part as a prior does: a number that is added to all logits which the softmax
    sees changes nothing there, and parts the plain logits.

    The gradient of cross entropy at equal logits is, for the classes that are not the sample's, the
    probability that the softmax gives them: the same for all, unless something was added to their
    logits. Margins and weights leave it the same, and so do smoothed labels; torch's own cross
    entropy, where weights and smoothed labels together do not, adds nothing and is left out.

    Where each class has a sigmoid of its own, the gradient is that times the weight of the class.
    How much it grows when all logits do tells the sigmoid alone. Of two classes, each sample has
    only one other, so samples of both are compared.

    Args:
        criterion: of ``(logits, target, *args, **kwargs)``; what it keeps and draws stays as it is.
        logits: ``[B, C]``, of whatever values.
        target: as the criterion takes it. Class indices ``[B]`` and what has something for each
            class, ``[B, C]``, also within a tuple, list or dictionary, are replaced by labels made
            for the purpose.
        args: handed on, with such labels as well.
        kwargs: handed on, likewise.
    """
    function = criterion.func if isinstance(criterion, partial) else criterion
    if function is F.cross_entropy or type(function) is nn.CrossEntropyLoss:
        return False
    batch, classes = logits.shape
    labels = torch.arange(batch, device=logits.device) % classes
    if not any(_is_of_labels(tensor, labels, classes) for tensor in tensors_in(target)):
        return False
    one_hot = F.one_hot(labels, classes)

    def with_labels(value: Tensor) -> Tensor:
        if not _is_of_labels(value, labels, classes):
            return value
        return (labels if value.dim() == 1 else one_hot).to(value.dtype)

    try:
        given = [map_tensors(with_labels, each) for each in (target, args, dict(kwargs or {}))]
        at_equal, higher, others_higher = (
            _gradient(criterion, (_SHIFT * add).to(logits.dtype).expand(batch, classes), *given)
            for add in (torch.zeros_like(one_hot), torch.ones_like(one_hot), 1 - one_hot)
        )
        is_softmax = bool(torch.isclose(at_equal, higher, rtol=0.1).all())
        if classes == 2:
            # Weights of classes are part of both. Two probabilities of a prior sum to one, shares
            # that margins or weights inside of a focal loss make do not.
            shares = at_equal / others_higher if is_softmax else higher / at_equal
            low, high = sorted((float(shares[0, 1]), float(shares[1, 0])))
            return 0 < low * _RATIO < high and (not is_softmax or abs(low + high - 1) < _SUM)
        shares = at_equal if is_softmax else higher / at_equal
        others = shares.scatter(1, labels[:, None], torch.nan)
        largest = others.nan_to_num(-torch.inf).amax(1)
        smallest = others.nan_to_num(torch.inf).amin(1)
        return bool(((smallest > 0) & (largest > _RATIO * smallest)).any())
    except Exception:  # whatever it cannot do is told where it is called in earnest
        return False


def _is_of_labels(value: Tensor, labels: Tensor, classes: int) -> bool:
    """Whether it is class indices ``[B]``, or something for each class, ``[B, C]``."""
    indices = value.shape == labels.shape and not value.is_floating_point()
    return indices or value.shape == (len(labels), classes)


def _gradient(criterion: Callable[..., Any], logits: Tensor, *given: Any) -> Tensor:
    """The gradient of a criterion, of which nothing is changed, by logits ``[B, C]``."""
    loss, leaf, _ = try_out(criterion, logits, *given)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return gradient
