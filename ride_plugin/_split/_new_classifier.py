"""New classifiers in the place of the backbone's, and what the old one had that they have not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._closeness import close
from ride_plugin._contexts import in_mode
from ride_plugin._cosine import CosineClassifier
from ride_plugin._errors import ArgumentError, SplitError, warn_caller
from ride_plugin._split._class_number import set_class_number
from ride_plugin._split._cut import Parts, hooks_of_others, is_of_torch, trial_run
from ride_plugin._split._examine import in_features_of
from ride_plugin._split._replay import watch_classifier
from ride_plugin._tree import map_tensors

ClassifierFactory = Callable[[int, int], nn.Module]


def replace_classifiers(
    parts: Parts, classifier: str | ClassifierFactory | None, num_classes: int | None
) -> Parts:
    """Give each expert a new classifier: the one asked for, or a linear layer as the old one.

    Raises:
        SplitError: the backbone's classifier is not an ordinary linear layer on pooled features, or
            not all that its logits are computed from.
        ArgumentError: ``classifier`` is of another kind.
    """
    num_classes = parts.num_classes if num_classes is None else num_classes
    olds = parts.classifiers()
    in_features = in_features_of(olds[0], parts.num_classes) if olds else None
    if in_features is None or (classifier is None and not isinstance(olds[0], nn.Linear)):
        kind = f"is a {type(olds[0]).__name__} at `{parts.classifier}`" if olds else "was not found"
        argument = "`num_classes=`" if classifier is None else "`classifier=`"
        raise SplitError(
            f"Expected the backbone's classifier to be a linear layer that {argument} can replace, "
            f"but it {kind}. Replace it in the backbone before wrapping, for example by "
            "ride_plugin.longtail.CosineClassifier, and leave the argument out."
        )
    if not (classifier in (None, "cosine") or callable(classifier)):
        raise ArgumentError(
            "Expected argument `classifier` to be None, 'cosine' or a function of "
            f"(in_features, num_classes) that returns a module, but got {classifier!r}."
        )
    _refuse_several(parts, olds[0])
    _tell_of_hooks(olds[0], parts.classifier)
    if classifier == "cosine":
        _tell_of_scale(olds[0], parts.classifier, in_features)
    for expert, old in zip(parts.experts, olds, strict=True):
        parameter = next(old.parameters())
        with parameter.device:  # whatever torch's default device is
            if callable(classifier):
                new = classifier(in_features, num_classes)
            elif classifier == "cosine":
                new = CosineClassifier(in_features, num_classes)
            else:
                bias = getattr(old, "bias", None) is not None
                new = nn.Linear(in_features, num_classes, bias=bias)
        if not isinstance(new, nn.Module):
            raise ArgumentError(
                "Expected argument `classifier` to return a torch.nn.Module for (in_features, "
                f"num_classes) = {(in_features, num_classes)}, but it returned "
                f"{type(new).__name__}."
            )
        new = in_mode(new.to(parameter.device, parameter.dtype), old.training)
        expert.set_submodule(str(parts.classifier), new)
        watch_classifier(expert, parts.classifier, parts.running)
    if num_classes != parts.num_classes:
        set_class_number(parts, num_classes)
    return replace(parts, num_classes=num_classes)


def _refuse_several(parts: Parts, head: nn.Module) -> None:
    """Refuse logits that differ from row to row where the classifier returns zeros for each.

    A sum or mean of two classifiers does; a scale, a temperature or a bias of a classifier do not.

    Raises:
        SplitError: they do.
    """

    def zeros(module: nn.Module, args: Any, output: Any) -> Any:
        return map_tensors(torch.zeros_like, output)

    handle = head.register_forward_hook(zeros)
    try:
        logits, _ = trial_run(parts, 0, parts.inputs)
    finally:
        handle.remove()
    if not logits.is_meta and not torch.equal(
        logits.nan_to_num(), logits[:1].nan_to_num().expand_as(logits)
    ):
        raise SplitError(
            f"The backbone computes its logits from more than one module: `{parts.classifier}` "
            "would be replaced, and the logits depend on something beside what it returns, another "
            "classifier say. Change it before wrapping, and leave `classifier=` and "
            "`num_classes=` out."
        )


def _tell_of_hooks(head: nn.Module, name: str | None) -> None:
    """Warn of hooks on a classifier that is replaced: the new one does without what they do."""
    theirs = hooks_of_others(head, and_before=True)
    hooks = [hook for _, hook in theirs if not is_of_torch(hook)]
    if hooks:
        told = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        warn_caller(
            f"The backbone's classifier `{name}` has hooks (`{told}`), and the new ones in its "
            "place have none, so what these do is not done. Register them on each of "
            "`model.classifiers`; or leave `classifier=` and `num_classes=` out."
        )


def _tell_of_scale(head: nn.Module, name: str | None, in_features: int) -> None:
    """Warn if cosines that a criterion may multiply by a scale come multiplied by another one.

    For its own weights as features, a cosine classifier returns its scale, and for twice the
    features the same.
    """
    weight = getattr(head, "weight", None)
    if type(head) is nn.Linear or not isinstance(weight, Tensor) or weight.dim() != 2:
        return
    largest = 0.0
    try:
        with torch.no_grad():
            alone = copy.deepcopy(head).eval()
            for rows in (weight, weight.T):
                if rows.shape[1] == in_features:
                    logits = alone(rows)
                    if not close(alone(2 * rows), logits, units=100, scale=0.0):
                        return
                    largest = max(largest, float(logits.abs().max()))
    except Exception:  # it may take more than features, or return more than logits
        return
    new = CosineClassifier(in_features, 2).scale
    if largest and abs(largest - new) > 0.01 * new:
        warn_caller(
            f"The backbone's classifier `{name}` ({type(head).__name__}) returns cosines times "
            f"{largest:.3g}, and those in its place cosines times {new:.3g}. If the criterion "
            "multiplies them by a scale of its own, as losses of LDAM do, leave `classifier=` "
            "out, or keep the scale: `classifier=lambda d, c: ride_plugin.longtail."
            f"CosineClassifier(d, c, scale={largest:.3g})`."
        )
