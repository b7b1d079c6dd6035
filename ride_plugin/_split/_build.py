"""Builds a split: probe, fork point, views, what crosses the cut, self-check."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ride_plugin._contexts import random_state_kept
from ride_plugin._errors import ArgumentError, SplitError, warn_caller
from ride_plugin._inputs import Inputs, resize_batch
from ride_plugin._split._analysis import changing_attributes, layout_of, tensors_only_experts_read
from ride_plugin._split._check import check
from ride_plugin._split._example import find_example
from ride_plugin._split._fork import choose_fork
from ride_plugin._split._logits import (
    Choice,
    LogitsReader,
    check_classifies,
    find_logits,
    learn_training_output,
)
from ride_plugin._split._parts import Split
from ride_plugin._split._probe import Call, call_tree, clone_module, detached_activations
from ride_plugin._split._references import refuse_captured
from ride_plugin._split._state import Layout
from ride_plugin._split._tape import Forked, Recorded, watch_classifier
from ride_plugin._split._views import Views, build_views, sides, spine_tensors

_COMPILED = "_orig_mod"  # where torch.compile keeps the module
_PARALLEL = frozenset(
    {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
    | {"DeepSpeedEngine", "_FabricModule"}
)


@dataclass(frozen=True)
class Examined:
    """What one forward of a backbone shows.

    Attributes:
        inputs: an example of two rows.
        root: the calls in evaluation mode.
        training_root: the calls in training mode; None where that needs more than the inputs.
        reader: takes the logits out of what the backbone returns; None if that is the logits.
        classifier: name of the module that returns them; None if there is none.
        num_classes: ``C``.
    """

    inputs: Inputs
    root: Call
    training_root: Call | None
    reader: LogitsReader | None
    classifier: str | None
    num_classes: int


def split_backbone(
    backbone: nn.Module,
    fork_at: str | None,
    example_input: Any,
    logits: Choice = None,
    num_classes: int | None = None,
) -> Split:
    """Cut ``backbone`` at ``fork_at``; the backbone and the random state are left as they are.

    Args:
        backbone: any module that returns logits ``[B, C]``, or something that holds them.
        fork_at: name of the first forked submodule; None for the default.
        example_input: a batch for it; None to guess one.
        logits: where in its output the logits are; None to find them.
        num_classes: how many columns they have, or shall have; None for as many as there are.

    Raises:
        SplitError: it cannot be cut there; the message says what to pass.
    """
    if not isinstance(backbone, nn.Module):
        raise ArgumentError(
            "Expected argument `backbone` to be a torch.nn.Module that maps a batch to logits "
            f"[B, C], but got {type(backbone).__name__}."
        )
    refuse_unfit(backbone)
    with random_state_kept(backbone):
        source = _source_of(backbone)
        seen = examine(source, example_input, logits, num_classes)
        if seen.reader is not None:
            source.register_forward_hook(seen.reader)  # every copy of it returns its logits
        fork = choose_fork(seen.root, fork_at)
        trunk_units, forked_units = sides(fork, seen.root, seen.training_root)
        outside = spine_tensors(source, [*trunk_units, *forked_units])
        views = build_views(source, trunk_units, forked_units, set())
        forked_tensors = tensors_only_experts_read(views, seen.inputs, outside, training=False)
        if seen.training_root is not None:
            forked_tensors &= tensors_only_experts_read(views, seen.inputs, outside, training=True)
        if forked_tensors:
            views = build_views(source, trunk_units, forked_units, forked_tensors)
        return learned(source, views, seen, fork.name, forked_units)


def reason_of_fork(backbone: nn.Module, fork_at: str | None, example_input: Any) -> tuple[str, str]:
    """Where ``backbone`` is forked, and why there, in words."""
    refuse_unfit(backbone)
    with random_state_kept(backbone):
        fork = choose_fork(examine(_source_of(backbone), example_input).root, fork_at)
    return fork.name, fork.reason


def examine(
    backbone: nn.Module,
    example_input: Any,
    logits: Choice = None,
    num_classes: int | None = None,
) -> Examined:
    """Run a copy of the backbone on the example, or on one that is guessed.

    Raises:
        SplitError: it does not run, or it is not certain which part of its output is the logits.
    """
    reader = LogitsReader(logits)
    probed = clone_module(backbone).eval()
    inputs = find_example(probed, example_input, reader)
    root, output = call_tree(probed, inputs)

    def differentiable() -> Any:
        copied = clone_module(backbone).eval()
        for parameter in copied.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            return copied(*inputs[0], **inputs[1])

    found, head = find_logits(reader, root, output, num_classes, differentiable)
    check_classifies(root, output, found, head, reader, num_classes)
    training_root, training_output = _training_call_tree(backbone, inputs)
    if training_root is not None:
        learn_training_output(reader, training_root, training_output, head)
    plain = isinstance(output, Tensor) and isinstance(training_output, Tensor | None)
    return Examined(
        inputs,
        root,
        training_root,
        None if plain and logits is None else reader,
        None if head is None else head.name,
        found.shape[1],
    )


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
    name = seen.classifier
    forked = name is not None and any(f"{name}.".startswith(f"{unit}.") for unit in forked_units)
    classifier = name if forked else None
    watch_classifier(views.expert, classifier, views.running)
    return Split(views, layouts, attributes, seen.inputs, seen.num_classes, fork_at, classifier)


def _source_of(backbone: nn.Module) -> nn.Module:
    """The backbone's modules anew around its own tensors, what was compiled as it was before.

    It is never run, only copied; so it may be changed while the backbone stays as it is.
    """
    memo: dict[int, Any] = dict(detached_activations(backbone))
    memo.update((id(t), t) for t in (*backbone.parameters(), *backbone.buffers()))
    compiled = [module for module in backbone.modules() if is_compiled(module)]
    for module in reversed(compiled):  # from inside to outside
        memo[id(module)] = copy.deepcopy(module.get_submodule(_COMPILED), memo)
    if compiled:
        warn_caller(
            "The backbone, or a part of it, is compiled. The experts are made of what was there "
            "before: compile the wrapped model instead, `torch.compile(model)`."
        )
    source: nn.Module = copy.deepcopy(backbone, memo)
    return source


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` returned; by name, as importing it takes long."""
    return type(module).__name__ == "OptimizedModule" and _COMPILED in module._modules


def refuse_unfit(backbone: nn.Module) -> None:
    """Raise SplitError where the modules or tensors are of a kind that cannot be split."""
    if torch.is_inference_mode_enabled():
        raise SplitError(
            "Expected to be called outside `torch.inference_mode()`: tensors made there can never "
            "be trained. Wrap the backbone first."
        )
    for name, module in backbone.named_modules():
        kind = type(module).__name__
        if kind in _PARALLEL:
            raise SplitError(
                f"Expected argument `backbone` to be a plain module, but {_called(name)} is "
                f"{kind}, which would run each expert's pass on its own and leave the ranks to "
                "drift apart. Wrap the plain module first, then the result: "
                f"`{kind}(RIDEWrapper(net, ...))`."
            )
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
        if type(tensor).__name__ == "DTensor":
            raise SplitError(
                f"Expected argument `backbone` to hold ordinary tensors, but `{name}` is sharded. "
                "Wrap the plain module first, then shard the wrapped model: "
                "`fully_shard(RIDEWrapper(net, ...))`."
            )
        if tensor.is_meta:
            raise SplitError(
                f"Expected argument `backbone` to have weights, but `{name}` is on the meta "
                "device. Materialise it (`to_empty`, then initialise or load) before wrapping it."
            )
    refuse_captured(backbone)


def _called(name: str) -> str:
    return f"`{name}`" if name else "it"


def _training_call_tree(backbone: nn.Module, inputs: Inputs) -> tuple[Call | None, Any]:
    """The calls of a forward in training mode and its output; None where it does not run so."""
    try:
        return call_tree(clone_module(backbone).train(), resize_batch(inputs, 3))
    except Exception:
        return None, None
