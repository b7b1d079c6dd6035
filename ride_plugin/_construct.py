"""How a wrapped model comes about: split, narrow, replicate or graft, classifier, initialise.

Each step takes values and returns values; the backbone itself is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ride_plugin._apart import warn_if_copied, warn_if_equal
from ride_plugin._errors import warn_caller
from ride_plugin._initialise import (
    break_tie,
    follow,
    followers_in,
    redraw,
    reinitialise,
    renew_classifier,
    set_biases,
    settle_computed,
    warn_if_all_frozen,
    warn_if_frozen,
    warn_if_trained,
)
from ride_plugin._split import (
    Choice,
    Pair,
    Parts,
    graft_experts,
    held_by_all,
    inert_parameters,
    replace_classifiers,
    replicate,
    split_backbone,
)
from ride_plugin._tree import ids_of_tensors
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
    return_experts: object,
) -> Parts:
    """The parts of a wrapped model; arguments and errors are those of :class:`RIDEWrapper`."""
    split = split_backbone(backbone, fork_at, example_input, logits, num_classes)
    if split.doubt is not None and num_experts > 1:
        warn_caller(
            f"The fork was put at {split.fork_at!r}, but {split.doubt}, or "
            f"`fork_at={split.fork_at!r}` if it is meant so."
        )
    # A pair is called as a whole by code that was written for the wrapped model, and an output of
    # logits and experts' logits is a tuple that somebody has asked for.
    expected = logits is not None or return_experts is True or isinstance(backbone, Pair)
    if split.sequence is not None and not expected:
        told, in_training = split.sequence
        if not (in_training and return_experts):  # which returns something else in training
            warn_caller(told)
    drawn = expert_factory is None and (num_experts > 1 or expert_width < 1)
    if drawn and init == "fresh":
        warn_if_trained(split.views.expert)  # before narrowing, which starts the statistics anew
    # A frozen copy of pretrained weights, an old classifier say, shall keep them.
    followers = followers_in(split.views.expert) if drawn and init == "fresh" else {}
    if expert_width < 1:
        before = list(split.views.expert.parameters())  # what keeps its size stays one of these
        split = narrow_expert(split, expert_width)
        why = f"expert_width={expert_width} makes new layers"
        warn_if_frozen(split.views.expert, {id(parameter) for parameter in before}, why)
    if expert_factory is None:
        parts = replicate(split, num_experts)
    else:
        parts = graft_experts(split, expert_factory, num_experts, logits, num_classes)
    if classifier is not None or num_classes not in (None, parts.num_classes):
        parts = replace_classifiers(parts, classifier, num_classes)
    if drawn:
        parts = initialise(parts, init, followers)
    return parts


def initialise(parts: Parts, init: Literal["fresh", "copy"], followers: Mapping[str, str]) -> Parts:
    """Give the experts the weights that they start with, and say which of them will not learn."""
    of_trunk = ids_of_tensors(parts.trunk)
    shared = of_trunk | {id(d[key]) for d, key in held_by_all(parts.experts).values()}
    classifiers, left = parts.classifiers(), []
    was_set = [
        set_biases(expert, parts.classifier, parts.num_classes, may_be_trained=init == "copy")
        for expert in parts.experts
    ]
    if was_set[0]:
        warn_caller(
            "Kept, because their layers do not draw such values, so that each entry seems to have "
            f"its place (a class's prior, an offset): {list(was_set[0])}. For other values set "
            "them in `model.experts[k]`."
        )
    shared |= {id(bias) for found in was_set for bias in found.values()}
    if init == "fresh":
        left, *_ = [reinitialise(expert, shared) for expert in parts.experts]  # equal lists
        if left:
            warn_caller(
                "Not re-initialised, because their values seem to have their places (identity, "
                "dirac or pruned weights, ranges, tables of positions, equal rows): "
                f"{left}. To make experts differ there, set them in `model.experts[k]`."
            )
    else:
        parts.redrawn = redraw_inert(parts)
    for head in classifiers:
        if not all(id(parameter) in shared for parameter in head.parameters()):
            if init == "copy":
                renew_classifier(head, shared)
            break_tie(head, shared)
    changed = parts.experts if init == "fresh" else classifiers
    stale = [settle_computed(module, shared) for module in changed]
    if any(stale):
        warn_caller(
            "Drawn anew beside buffers of a parametrization, which stay as they are and may have "
            f"been computed from the weight before: {stale[0]}. If they were, compute them again "
            "in `model.experts[k]`."
        )
    old = [follow(expert, followers, shared) for expert in parts.experts]
    if old[0]:
        warn_caller(
            "These frozen tensors held the values of weights that were drawn anew, and all experts "
            f"share them, so that they keep the old values: {old[0]}. If they shall follow the "
            "weights, unfreeze them before wrapping (`requires_grad_(True)`), and freeze and set "
            "them in `model.experts[k]` afterwards."
        )
    warn_if_all_frozen(parts.experts[0], of_trunk)
    warn_if_equal(parts.experts, shared, "" if init == "fresh" else parts.classifier, left)
    if init == "copy":
        warn_if_copied(parts.experts, shared, parts.num_classes)
    return parts


def redraw_inert(parts: Parts) -> list[str]:
    """Beside frozen parameters, give each expert its own draw of what does not act yet.

    Returns:
        Names inside an expert of what was drawn anew.
    """
    if all(parameter.requires_grad for parameter in parts.experts[0].parameters()):
        return []
    inert = inert_parameters(parts, redraw)
    with torch.no_grad():
        for expert in parts.experts:
            for name in inert:
                redraw(expert.get_parameter(name))
    return inert
