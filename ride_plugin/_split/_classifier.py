"""The classifier of a backbone: how it is found and replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._cosine import CosineClassifier
from ride_plugin._errors import ArgumentError, SplitError
from ride_plugin._split._parts import Parts
from ride_plugin._split._probe import Call
from ride_plugin._split._tape import watch_classifier
from ride_plugin._tree import logits_in

ClassifierFactory = Callable[[int, int], nn.Module]


def find_classifier(root: Call, output: Any, forked_units: list[str]) -> str | None:
    """Name of the last parametric leaf that returns ``B x C`` elements, preferably the logits.

    None if there is none, for example where the class weights are used by a function call.
    """
    logits = logits_in(output)
    if logits is None:
        raise SplitError("The backbone returned no logits [B, C].")
    candidates = [
        leaf
        for leaf in root.leaves
        if leaf.num_parameters
        and leaf.shape is not None
        and torch.Size(leaf.shape).numel() == logits.numel()
        and any(leaf.name == unit or leaf.name.startswith(unit + ".") for unit in forked_units)
    ]
    exact = [c for c in candidates if c.outputs[0][0] == logits.data_ptr()]
    chosen = (exact or candidates)[-1:]
    return chosen[0].name if chosen else None


def replace_classifiers(parts: Parts, classifier: str | ClassifierFactory) -> Parts:
    """Give each expert a new classifier.

    Raises:
        SplitError: the backbone's classifier is not an ordinary linear layer on pooled features.
        ArgumentError: ``classifier`` is of another kind.
    """
    olds = parts.classifiers()
    in_features = _in_features(olds[0], parts.num_classes) if olds else None
    if in_features is None:
        kind = f"is a {type(olds[0]).__name__} at `{parts.classifier}`" if olds else "was not found"
        raise SplitError(
            f"Expected the backbone's classifier to be a linear layer that `classifier=` can "
            f"replace, but it {kind}. Replace it in the backbone before wrapping, for example by "
            "ride_plugin.longtail.CosineClassifier, and leave `classifier=None`."
        )
    for expert, old in zip(parts.experts, olds, strict=True):
        if callable(classifier):
            new = classifier(in_features, parts.num_classes)
        elif classifier == "cosine":
            new = CosineClassifier(in_features, parts.num_classes)
        else:
            raise ArgumentError(
                "Expected argument `classifier` to be None, 'cosine' or a function of "
                f"(in_features, num_classes) that returns a module, but got {classifier!r}."
            )
        parameter = next(old.parameters())
        new = new.to(parameter.device, parameter.dtype).train(old.training)
        path, _, attribute = str(parts.classifier).rpartition(".")
        setattr(expert.get_submodule(path), attribute, new)
        watch_classifier(expert, parts.classifier, parts.running)
    return parts


def _in_features(head: nn.Module, num_classes: int) -> int | None:
    in_features = getattr(head, "in_features", None)
    weight = getattr(head, "weight", None)
    if in_features is None and isinstance(weight, Tensor) and weight.dim() == 2:
        in_features = weight.shape[0] if weight.shape[1] == num_classes else weight.shape[1]
    return in_features if isinstance(in_features, int) else None
