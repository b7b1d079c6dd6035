"""The classifiers of a model, and what classifier re-training (cRT) does with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ride_plugin._checks import check_instance, has_values
from ride_plugin._closeness import close
from ride_plugin._errors import ArgumentError

Classifiers: TypeAlias = nn.Module | Sequence[nn.Module]
"""A wrapped model, a plain model (with its classifier's name), a layer, or a list of layers."""


def find_classifiers(model: Classifiers, classifier: str | None = None) -> list[nn.Module]:
    """Return the classifier layers of a model, one per expert.

    Args:
        model: a wrapped model (anything with ``classifiers``), also inside of what an engine made
            of it, a linear layer, a list of layers, or any model together with ``classifier``.
        classifier: dotted name of the classifier in a plain model, such as ``"fc"``.

    Returns:
        The layers themselves, not copies.

    Raises:
        ArgumentError: the model has no layer of that name, or is plain and no name was given.

    Example:
        >>> find_classifiers(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), "1")
        [Linear(in_features=4, out_features=3, bias=True)]
    """
    if classifier is not None:
        names = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        if not isinstance(classifier, str) or classifier not in names:
            last = list(names)[-5:]
            raise ArgumentError(
                f"Expected argument `classifier` to name a layer of {type(model).__name__}, but "
                f"got {classifier!r}. Its last layers are {last}."
            )
        return [names[classifier]]
    if isinstance(model, nn.Linear):
        return [model]
    holders = _holders(model) if isinstance(model, nn.Module) else []
    if len(holders) > 1:
        raise ArgumentError(
            "Expected argument `model` to be or to hold one wrapped model, but got "
            f"{type(model).__name__} with {len(holders)} inside. Pass one of them."
        )
    found: Any = holders[0].classifiers if holders else model
    if holders and not found:
        raise ArgumentError(
            "Expected argument `model` to have a layer as its classifier, but got "
            f"{type(model).__name__}, whose logits come from none, but from a bare parameter, say. "
            "Let the backbone compute them by a layer, `self.fc = nn.Linear(...)`, before it is "
            "wrapped, or do it with that parameter of each expert by hand."
        )
    layers = list(found) if isinstance(found, (list, tuple, nn.ModuleList)) else []
    if not layers or not all(isinstance(layer, nn.Module) for layer in layers):
        raise ArgumentError(
            "Expected argument `model` to be a wrapped model, a linear layer or a list of "
            f"classifier layers, but got {type(model).__name__}. For a plain model, name its "
            'classifier: classifier="fc".'
        )
    return layers


def _holders(module: nn.Module) -> list[nn.Module]:
    """The modules with ``classifiers``, of which engines may have wrapped one."""
    if hasattr(module, "classifiers"):
        return [module]
    return list(dict.fromkeys(found for child in module.children() for found in _holders(child)))


def linear_classifiers(model: Classifiers, classifier: str | None, method: str) -> list[nn.Linear]:
    """Return the classifiers if all are plain ``nn.Linear``, whose weights ``method`` may scale."""
    layers: list[nn.Linear] = []
    for layer in find_classifiers(model, classifier):
        if any(layer is other for other in layers):
            raise ArgumentError(
                f"Expected argument `model` to have a classifier of its own for each expert, but "
                f"got one layer twice, which {method} would change twice. Pass each layer once."
            )
        _refuse_parametrized(layer, method)
        if not isinstance(layer, nn.Linear):
            raise ArgumentError(
                f"Expected argument `model` to have nn.Linear classifiers for {method}, but got "
                f"{type(layer).__name__}. A cosine classifier has unit weights already: its norms "
                "carry nothing to rescale."
            )
        if not _is_linear(layer):
            raise ArgumentError(
                f"Expected argument `model` to have nn.Linear classifiers for {method}, but got "
                f"{type(layer).__name__}, whose forward computes something else of its weight than "
                "`F.linear(x, weight, bias)`: where it normalises the weight, scaling it changes "
                "nothing. Use an nn.Linear, or scale the weight by hand, as `tau_normalized` does."
            )
        layers.append(layer)
    return layers


def _is_linear(layer: nn.Linear) -> bool:
    """Whether the layer computes what nn.Linear does; a class made of it may do something else."""
    own = type(layer).forward is not nn.Linear.forward or "forward" in vars(layer)
    if not own or not has_values(layer.weight):
        return True
    try:
        with torch.no_grad():
            x = torch.linspace(-1, 1, layer.in_features, device="cpu").to(layer.weight)[None]
            plain = F.linear(x, layer.weight, layer.bias)
            result = layer.forward(x)  # without hooks
            return isinstance(result, Tensor) and close(result, plain)
    except Exception:  # it takes something else, or its weight is no plain tensor
        return False


def refuse_tied(model: Classifiers, layers: Sequence[nn.Module], method: str) -> None:
    """Refuse a classifier whose weight another module of the model has as well."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inside = {id(module) for layer in layers for module in layer.modules()}
    weights = {id(layer._parameters.get("weight")) for layer in layers} - {id(None)}
    for name, module in modules:
        if id(module) not in inside and any(id(p) in weights for p in module._parameters.values()):
            raise ArgumentError(
                f"Expected argument `model` to have classifiers with a weight of their own for "
                f"{method}, but got one whose weight is that of `{name}` as well, so that the "
                "representation would change with it. Untie them first: `layer.weight = "
                "nn.Parameter(layer.weight.detach().clone())`, for each layer of "
                "find_classifiers(model)."
            )


def _refuse_parametrized(layer: nn.Module, method: str) -> None:
    if parametrize.is_parametrized(layer):
        raise ArgumentError(
            f"Expected argument `model` to have plain classifiers for {method}, but got one whose "
            "weight is parametrized, as by learnable weight scaling. Fold it in first with "
            'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight").'
        )
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and "weight" not in layer._parameters:
        raise ArgumentError(
            f"Expected argument `model` to have plain classifiers for {method}, but got one whose "
            "weight is computed before each forward, as by torch.nn.utils.weight_norm, "
            "spectral_norm or prune, so that what is written to it would be lost. Fold it in first "
            "with torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove."
        )


def reset_classifiers(model: Classifiers, classifier: str | None = None) -> None:
    """Draw the weights of every expert's classifier anew, as cRT asks before it retrains them.

    Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition",
    ICLR 2020, section 4 (cRT).

    Args:
        model: see :func:`find_classifiers`.
        classifier: see :func:`find_classifiers`.

    Raises:
        ArgumentError: no classifier is found, one has no ``reset_parameters``, or its weight is
            another module's as well, an embedding's say.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> before = layer.weight.clone()
        >>> reset_classifiers(layer)
        >>> bool((layer.weight == before).any())
        False
    """
    layers = find_classifiers(model, classifier)
    refuse_tied(model, layers, "reset_classifiers")
    for layer in layers:
        _refuse_parametrized(layer, "reset_classifiers")
        if not callable(getattr(layer, "reset_parameters", None)):
            raise ArgumentError(
                "Expected argument `model` to have classifiers with reset_parameters(), but got "
                f"{type(layer).__name__}. Initialise it by hand."
            )
    for layer in layers:
        layer.reset_parameters()  # type: ignore[operator]


def freeze_representation(model: nn.Module, classifier: str | None = None) -> list[nn.Parameter]:
    """Freeze everything but the classifiers, and return what is left to train.

    Parameters outside the classifiers stop requiring gradients, and the model goes into eval mode,
    so that BatchNorm statistics stay as they are. **Leave it in eval mode**: in the retraining
    loop, do not call ``model.train()``.

    Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition",
    ICLR 2020, section 4.

    Args:
        model: a wrapped model, or a plain model together with ``classifier``.
        classifier: see :func:`find_classifiers`.

    Returns:
        The classifiers' parameters, each once, for the optimiser; of those that
        :func:`learnable_weight_scaling` scales, the factors alone.

    Raises:
        ArgumentError: no classifier is found, or its weight is another module's as well, an
            embedding's say.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
        >>> len(freeze_representation(model, "1")), model[0].weight.requires_grad
        (2, False)
    """
    layers = find_classifiers(model, classifier)
    check_instance(model, "model", nn.Module, "a module, wrapped or plain")
    refuse_tied(model, layers, "freeze_representation")
    model.requires_grad_(False)
    model.eval()
    for layer in layers:
        layer.requires_grad_(True)
        for part in layer.modules():
            if isinstance(part, parametrize.ParametrizationList) and _trains_alone(part):
                part.original.requires_grad_(False)
    # Layers may share a weight, and an optimiser would step it once for each time it is listed.
    trained = (p for layer in layers for p in layer.parameters() if p.requires_grad)
    return list(dict.fromkeys(trained))


def _trains_alone(parametrizations: parametrize.ParametrizationList) -> bool:
    """Whether one of them, learnable weight scaling say, leaves the weight below it frozen."""
    return any(getattr(one, "_trains_alone", False) for one in parametrizations)
