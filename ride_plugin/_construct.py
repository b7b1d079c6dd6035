"""How a wrapped model comes about: split, narrow, replicate or graft, classifier, initialise.

Each step takes values and returns values; the backbone itself is never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from ride_plugin._errors import warn_caller
from ride_plugin._initialise import (
    break_tie,
    reinitialise,
    renew_classifier,
    warn_if_all_frozen,
    warn_if_frozen,
    warn_if_trained,
)
from ride_plugin._split import (
    Choice,
    Parts,
    graft_experts,
    replace_classifiers,
    replicate,
    split_backbone,
)
from ride_plugin._width import narrow_expert


def construct(
    backbone: nn.Module,
    num_experts: int,
    *,
    fork_at: str | None,
    expert_width: float,
    init: Literal["fresh", "copy"],
    classifier: Literal["cosine"] | Callable[[int, int], nn.Module] | None,
    expert_factory: Callable[[int], nn.Module] | None,
    example_input: Any,
    logits: Choice,
    num_classes: int | None,
) -> Parts:
    """The parts of a wrapped model; arguments and errors are those of :class:`RIDEWrapper`."""
    split = split_backbone(backbone, fork_at, example_input, logits, num_classes)
    drawn = expert_factory is None and (num_experts > 1 or expert_width < 1)
    if drawn and init == "fresh":
        warn_if_trained(split.views.expert)  # before narrowing, which starts the statistics anew
    if expert_width < 1:
        split = narrow_expert(split, expert_width)
    if expert_factory is None:
        parts = replicate(split, num_experts)
    else:
        parts = graft_experts(split, expert_factory, num_experts)
    if classifier is not None or num_classes not in (None, parts.num_classes):
        parts = replace_classifiers(parts, classifier, num_classes)
    if drawn:
        parts = initialise(parts, init, expert_width)
    return parts


def initialise(parts: Parts, init: Literal["fresh", "copy"], expert_width: float = 1.0) -> Parts:
    """Give the experts the weights that they start with, and say which of them will not learn."""
    shared = {id(tensor) for tensor in parts.trunk.parameters()}
    classifiers = parts.classifiers()
    if expert_width < 1:
        why = f"expert_width={expert_width} makes new layers"
        warn_if_frozen(parts.experts[0], shared, why)
    if init == "fresh":
        warn_if_all_frozen(parts.experts[0], shared)
        left, *_ = [reinitialise(expert, shared) for expert in parts.experts]  # equal lists
        if left:
            warn_caller(
                "Not re-initialised, because the positions of their zeros matter (identity, dirac "
                f"or pruned weights): {left}. To make experts differ there, set them in "
                "`model.experts[k]`."
            )
    if init == "copy" and classifiers:
        warn_if_frozen(classifiers[0], shared, "Each expert gets a classifier of its own")
    for head in classifiers:
        if init == "copy":
            renew_classifier(head)
        break_tie(head)
    return parts
