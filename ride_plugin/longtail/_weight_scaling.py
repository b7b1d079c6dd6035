"""Learnable weight scaling (LWS) of classifiers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ride_plugin._checks import check_integer
from ride_plugin.longtail._classifiers import Classifiers, linear_classifiers


class LearnableWeightScaling(nn.Module):
    r"""One learnable factor per class on a frozen classifier.

    $$\tilde w_c = f_c w_c$$

    with $f_c$ starting at 1 and trained by class-balanced sampling while the weights keep
    their direction. Source: Kang et al., "Decoupling Representation and Classifier for
    Long-Tailed Recognition", ICLR 2020, section 4. The bias is scaled along, so that the whole
    logit is multiplied by $f_c$.

    It is a parametrization in the sense of ``torch.nn.utils.parametrize``: the layer stays the
    same object at the same place, so it also works inside a wrapped model.
    :func:`learnable_weight_scaling` installs it.

    Attributes:
        scale: ``[C]``, the factors.

    Example:
        >>> LearnableWeightScaling(3)(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    _trains_alone = True  # see freeze_representation: the weight below stays frozen

    def __init__(self, num_classes: int) -> None:
        """Start all factors at 1.

        Args:
            num_classes: C.

        Raises:
            ArgumentError: ``num_classes`` is below 1.
        """
        super().__init__()
        num_classes = check_integer(
            num_classes, "num_classes", 1, advice="Pass the classifier's out_features."
        )
        self.scale = nn.Parameter(torch.ones(num_classes))

    def forward(self, values: Tensor) -> Tensor:
        """Return ``values`` ``[C, ...]`` with row c multiplied by factor c."""
        return self.scale.view(-1, *[1] * (values.dim() - 1)) * values


def learnable_weight_scaling(
    model: Classifiers, *, classifier: str | None = None
) -> list[LearnableWeightScaling]:
    """Put learnable scales on every classifier and freeze the weights and biases below them.

    Each layer gets weight and bias of its own, also where it shared them with others.

    When trained, ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")`` (and
    ``"bias"``) folds the factors into the layer.

    Args:
        model: a wrapped model, an ``nn.Linear``, a list of them, or any model with ``classifier``.
        classifier: dotted name of the classifier in a plain model.

    Returns:
        One module per classifier; train their ``scale``.

    Raises:
        ArgumentError: a classifier is not an ``nn.Linear``, or a class of it that computes
            something else, comes twice, or is scaled already.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> [scaling] = learnable_weight_scaling(layer)
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['parametrizations.weight.0.scale']
    """
    scalings = []
    for layer in linear_classifiers(model, classifier, "learnable_weight_scaling"):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            # Folding the factors in writes into the tensor, which others may hold as well: experts
            # whose classifier was frozen when the model was wrapped, or an embedding it is tied to.
            own = parameter.detach().clone()
            layer.register_parameter(name, nn.Parameter(own, requires_grad=False))
        scaling = LearnableWeightScaling(layer.out_features).to(layer.weight)
        parametrize.register_parametrization(layer, "weight", scaling)
        if layer.bias is not None:
            parametrize.register_parametrization(layer, "bias", scaling)
        scalings.append(scaling)
    return scalings
