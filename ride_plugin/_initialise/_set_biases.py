"""Biases that somebody set, to the logarithms of the classes' frequencies say.

Each entry belongs to its place, so in another order they would give every class another's prior.
They are known by values that neither the layer's own initialisation draws nor the one that drew
its weights, since some draw both alike.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ride_plugin._initialise._draw import is_constant
from ride_plugin._tree import dotted


def set_biases(
    expert: nn.Module, classifier: str | None, num_classes: int, may_be_trained: bool
) -> dict[str, Tensor]:
    """The classifier's biases that were set, and those beside which all weights are equal.

    Training moves a classifier's bias beyond what is drawn as well, but up for some classes and
    down for others, as the gradients of a softmax sum to zero. So where the weights may be trained,
    only a classifier's biases of one sign are found: logarithms of frequencies, or of counts.

    Args:
        expert: with the values that it starts from.
        classifier: name of the classifier inside it, or None if there is no such module.
        num_classes: entries of a bias of the classes; other layers of the classifier have others.
        may_be_trained: whether the values are a pretrained backbone's.

    Returns:
        The biases, by their names inside the expert.
    """
    found = {}
    for path, layer in expert.named_modules():
        bias = layer._parameters.get("bias")
        if not isinstance(layer, nn.Linear | _ConvNd) or bias is None or not bias.requires_grad:
            continue
        values = bias.detach()
        if is_constant(values) or float(values.abs().max()) <= 1.01 * _drawn_up_to(layer.weight):
            continue
        inside = classifier in ("", path) or path.startswith(f"{classifier}.")
        if inside and len(bias) == num_classes:
            was_set = not may_be_trained or bool((values > 0).all() | (values < 0).all())
        else:
            was_set = not may_be_trained and is_constant(layer.weight)
        if was_set:
            found[dotted(path, "bias")] = bias
    return found


def _drawn_up_to(weight: Tensor) -> float:
    """The largest bias that is drawn beside a weight."""
    default: float = weight[0].numel() ** -0.5
    return default if is_constant(weight) else max(default, float(weight.detach().abs().max()))
