"""Builds a split: probe, fork point, views, what crosses the cut, self-check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ride_plugin._contexts import random_state_kept
from ride_plugin._errors import ArgumentError, SplitError
from ride_plugin._inputs import Inputs, resize_batch
from ride_plugin._split._analysis import changing_attributes, layout_of, tensors_only_experts_read
from ride_plugin._split._check import check
from ride_plugin._split._classifier import find_classifier
from ride_plugin._split._example import find_example
from ride_plugin._split._fork import choose_fork
from ride_plugin._split._parts import Split
from ride_plugin._split._probe import Call, call_tree, clone_module
from ride_plugin._split._state import Layout
from ride_plugin._split._tape import Forked, Recorded, watch_classifier
from ride_plugin._split._views import Views, build_views, sides, spine_tensors
from ride_plugin._tree import logits_in


@dataclass(frozen=True)
class Examined:
    """What one forward of a backbone shows.

    Attributes:
        inputs: an example of two rows.
        root: the calls in evaluation mode.
        training_root: the calls in training mode; None where that needs more than the inputs.
        output: what the backbone returned in evaluation mode.
        num_classes: ``C``.
    """

    inputs: Inputs
    root: Call
    training_root: Call | None
    output: Any
    num_classes: int


def split_backbone(backbone: nn.Module, fork_at: str | None, example_input: Any) -> Split:
    """Cut ``backbone`` at ``fork_at``; the backbone and the random state are left as they are.

    Raises:
        SplitError: it cannot be cut there; the message says what to pass.
    """
    if not isinstance(backbone, nn.Module):
        raise ArgumentError(
            "Expected argument `backbone` to be a torch.nn.Module that maps a batch to logits "
            f"[B, C], but got {type(backbone).__name__}."
        )
    with random_state_kept(backbone):
        seen = examine(backbone, example_input)
        fork = choose_fork(seen.root, fork_at)
        trunk_units, forked_units = sides(fork, seen.root, seen.training_root)
        outside = spine_tensors(backbone, [*trunk_units, *forked_units])
        views = build_views(backbone, trunk_units, forked_units, set())
        forked_tensors = tensors_only_experts_read(views, seen.inputs, outside, training=False)
        if seen.training_root is not None:
            forked_tensors &= tensors_only_experts_read(views, seen.inputs, outside, training=True)
        if forked_tensors:
            views = build_views(backbone, trunk_units, forked_units, forked_tensors)
        return learned(backbone, views, seen, fork.name, forked_units)


def reason_of_fork(backbone: nn.Module, fork_at: str | None, example_input: Any) -> tuple[str, str]:
    """Where ``backbone`` is forked, and why there, in words."""
    with random_state_kept(backbone):
        fork = choose_fork(examine(backbone, example_input).root, fork_at)
    return fork.name, fork.reason


def examine(backbone: nn.Module, example_input: Any) -> Examined:
    """Run a copy of the backbone on the example, or on one that is guessed.

    Raises:
        SplitError: it does not run, or returns no logits.
    """
    _refuse_unfit(backbone)
    probed = clone_module(backbone).eval()
    inputs = find_example(probed, example_input)
    root, output = call_tree(probed, inputs)
    logits = logits_in(output)
    if logits is None or logits.shape[0] != 2:
        raise SplitError(
            "Expected argument `backbone` to map a batch to logits [B, C], but for 2 rows it "
            f"returned {'none' if logits is None else list(logits.shape)}."
        )
    training_root = _training_call_tree(backbone, inputs)
    return Examined(inputs, root, training_root, output, logits.shape[1])


def learned(
    backbone: nn.Module, views: Views, seen: Examined, fork_at: str, forked_units: list[str]
) -> Split:
    """Learn what crosses the cut between two views of a backbone, and check that they are it.

    Raises:
        SplitError: they compute something else than the backbone, or mix rows.
    """
    modes = (False, True) if seen.training_root is not None else (False,)
    attributes = sorted(
        set().union(*(changing_attributes(views, seen.inputs, training) for training in modes))
    )
    layouts: list[Layout] = []
    passes = [
        (training, warm) for training in modes for warm in (False, True)[: 1 + bool(attributes)]
    ]
    for training, warm in passes:
        layout = layout_of(views, seen.inputs, training, attributes, warm=warm)
        if all(known.keys != layout.keys for known in layouts):
            layouts.append(layout)
    check(backbone, views, seen.inputs, layouts, fork_at)
    classifier = find_classifier(seen.root, seen.output, forked_units)
    watch_classifier(views.expert, classifier, views.running)
    return Split(views, layouts, attributes, seen.inputs, seen.num_classes, fork_at, classifier)


def _refuse_unfit(backbone: nn.Module) -> None:
    if torch.is_inference_mode_enabled():
        raise SplitError(
            "Expected to be called outside `torch.inference_mode()`: tensors made there can never "
            "be trained. Wrap the backbone first."
        )
    for name, module in backbone.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise SplitError(
                f"Expected argument `backbone` to be made of Python modules, but `{name}` is "
                "TorchScript, which runs no hooks. Wrap the backbone before scripting or tracing "
                "its parts."
            )
        if isinstance(module, Recorded | Forked):
            raise SplitError(
                "Expected argument `backbone` to be a plain module, but it is or holds a wrapped "
                "one. Wrap the backbone once; `to_module()` gives back a plain one."
            )
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        if is_lazy(tensor):
            raise SplitError(
                f"Expected argument `backbone` to have weights, but `{name}` is lazy and has none "
                "yet. Run one batch through the backbone before wrapping it."
            )
        if tensor.is_meta:
            raise SplitError(
                f"Expected argument `backbone` to have weights, but `{name}` is on the meta "
                "device. Materialise it (`to_empty`, then initialise or load) before wrapping it."
            )


def _training_call_tree(backbone: nn.Module, inputs: Inputs) -> Call | None:
    """The calls of a forward in training mode; None where the backbone needs more than inputs."""
    try:
        return call_tree(clone_module(backbone).train(), resize_batch(inputs, 3))[0]
    except Exception:
        return None
