"""Tau-normalisation of classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ride_plugin._checks import check_floating, check_number, has_values
from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import float32_or_better
from ride_plugin.longtail._classifiers import Classifiers, linear_classifiers, refuse_tied


def tau_normalized(weight: Tensor, tau: float) -> Tensor:
    r"""Class weights divided by their norm to the power tau.

    $$\tilde w_c = \frac{w_c}{\lVert w_c \rVert^\tau}$$

    Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition",
    ICLR 2020, section 4.

    Args:
        weight: ``[C, D]``.
        tau: 0 changes nothing, 1 gives unit vectors; the best is chosen on held-out data.

    Returns:
        ``[C, D]``, differentiable. To compare many tau, compute the features once and use
        ``features @ tau_normalized(weight, tau).T``.

    Raises:
        ArgumentError: ``weight`` is not ``[C, D]``, a row is zero, ``tau`` is negative, or so large
            that weights would be infinite.

    Example:
        >>> tau_normalized(torch.tensor([[3.0, 4.0]]), 1.0)
        tensor([[0.6000, 0.8000]])
    """
    tau = check_number(tau, "tau", 0)
    check_floating(weight, "weight", "C", "D", advice="Pass a linear layer's weight.")
    precise = float32_or_better(weight)  # a power of a norm overflows in half precision
    norms: Tensor = torch.linalg.vector_norm(precise, dim=1, keepdim=True)
    if has_values(norms) and not bool((norms > 0).all() & norms.isfinite().all()):
        raise ArgumentError(
            "Expected argument `weight` to have a finite norm > 0 in every row, but got norms from "
            f"{norms.min().item():g} to {norms.max().item():g}. Train the classifier first."
        )
    normalized = (precise / norms.pow(tau)).to(weight.dtype)
    if has_values(normalized) and not bool(normalized.isfinite().all()):
        raise ArgumentError(
            f"Expected argument `tau` to leave the weights finite, but got {tau:g} for norms from "
            f"{norms.min().item():g} to {norms.max().item():g}. The paper's are from 0 to 1."
        )
    return normalized


def tau_normalize(
    model: Classifiers, tau: float | Sequence[float], *, classifier: str | None = None
) -> None:
    """Tau-normalise every classifier in place and set its bias to zero, as the paper does.

    In place means that calls add up: to try several tau, start each time from the trained weights
    (keep a ``copy.deepcopy``, or use :func:`tau_normalized`).

    Args:
        model: a wrapped model, an ``nn.Linear``, a list of them, or any model with ``classifier``.
        tau: one number, or one per classifier. See :func:`tau_normalized`.
        classifier: dotted name of the classifier in a plain model.

    Raises:
        ArgumentError: a classifier is not an ``nn.Linear`` (cosine classifiers have unit weights
            already), or a class of it that computes something else, a layer comes twice, its weight
            is another module's as well, an embedding's say, or tau does not fit: two of them for
            one weight, say.

    Example:
        >>> layer = torch.nn.Linear(8, 5)
        >>> tau_normalize(layer, 1.0)
        >>> layer.weight.norm(dim=1).detach(), layer.bias.norm().item()
        (tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000]), 0.0)
    """
    layers = linear_classifiers(model, classifier, "tau_normalize")
    refuse_tied(model, layers, "tau_normalize")
    given = list(tau) if isinstance(tau, Sequence) else [tau] * len(layers)
    taus = [check_number(one, "tau", 0) for one in given]
    if len(taus) != len(layers):
        raise ArgumentError(
            f"Expected argument `tau` to be one number or {len(layers)}, one per classifier, but "
            f"got {len(taus)}. Pass one number for all."
        )
    tau_of: dict[Tensor, float] = {}
    for layer, one in zip(layers, taus, strict=True):
        if tau_of.setdefault(layer.weight, one) != one:
            raise ArgumentError(
                f"Expected argument `tau` to be one number, since classifiers share a weight (it "
                f"was frozen when the model was wrapped), but got {tau_of[layer.weight]:g} and "
                f"{one:g} for it. Pass one number for all."
            )
    with torch.no_grad():
        # All are computed before any is written, so that an error leaves the model as it was.
        weights = [tau_normalized(x.weight, t) for x, t in zip(layers, taus, strict=True)]
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.zero_()
