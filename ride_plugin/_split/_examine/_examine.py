"""What one forward of a backbone shows: an example, the calls, the logits and their classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._contexts import in_mode
from ride_plugin._inputs import Inputs, own_inputs
from ride_plugin._split._copying import running_copy
from ride_plugin._split._examine._activated import warn_of_activated
from ride_plugin._split._examine._beside import sequence_around
from ride_plugin._split._examine._classifier import find_picked
from ride_plugin._split._examine._example import find_example
from ride_plugin._split._examine._logits import Choice, LogitsReader, check_classifies, find_logits
from ride_plugin._split._examine._meta import on_meta
from ride_plugin._split._examine._positions import refuse_scores_of_positions
from ride_plugin._split._examine._probe import Call, call_tree
from ride_plugin._split._examine._training_output import (
    Traced,
    check_columns,
    learn_training_output,
)
from ride_plugin._tree import Place, tensors_in


@dataclass(frozen=True)
class Examined:
    """What one forward of a backbone shows.

    Attributes:
        inputs: an example of two rows.
        root: the calls in evaluation mode.
        training_root: the calls in training mode; None where that needs more than the inputs.
        reader: takes the logits out of what the backbone returns.
        classifier: name of the module that returns them; None if there is none.
        num_classes: ``C``.
        by_shapes: whether it runs on tensors without contents.
        settings: where modules hold settings that the forward leaves as they are.
        sequence: see :func:`~ride_plugin._split._examine._beside.sequence_around`.
    """

    inputs: Inputs
    root: Call
    training_root: Call | None
    reader: LogitsReader
    classifier: str | None
    num_classes: int
    by_shapes: bool
    settings: frozenset[Place]
    sequence: tuple[str, bool] | None


def examine(
    backbone: nn.Module,
    example_input: Any,
    logits: Choice = None,
    num_classes: int | None = None,
    written: frozenset[str] = frozenset(),
) -> Examined:
    """Run a copy of the backbone on the example, or on one that is guessed.

    Raises:
        SplitError: it does not run, or it is not certain which part of its output is the logits.
    """
    reader = LogitsReader(logits)

    def copied(training: bool, meta: bool = False) -> nn.Module:
        return in_mode(running_copy(backbone, (backbone,), written, meta), training)

    def learning(training: bool, meta: bool) -> nn.Module:
        module = copied(training, meta)
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return module

    def gradients(names: Sequence[str]) -> Sequence[Tensor | None]:
        module = learning(False, meta=False)
        with torch.enable_grad():
            args, kwargs = own_inputs(inputs, tensors=True)
            logits = reader.logits_of(module(*args, **kwargs))
        assert logits is not None  # as it was before
        by = [module.get_parameter(name) for name in names]
        return torch.autograd.grad(logits[:, 0].sum(), by, allow_unused=True)

    def traced(training: bool, names: Sequence[str] = (), meta: bool = False) -> Traced:
        module = learning(training, meta)
        parts = {name: module.get_submodule(name) for name in names}
        made: dict[str, list[Tensor]] = {name: [] for name in names}
        for name, part in parts.items():
            part.register_forward_hook(
                lambda part, args, result, name=name: made[name].extend(tensors_in(result))
            )
        with torch.enable_grad(), on_meta(inputs, meta) as given:
            args, kwargs = own_inputs(given, tensors=True)
            output = module(*args, **kwargs)
        return Traced(output, made, {name: list(p.parameters()) for name, p in parts.items()})

    def traced_soon(training: bool, names: Sequence[str]) -> Traced:
        try:
            return traced(training, names, meta=True)
        except Exception:
            return traced(training, names)

    # With values first: what a forward keeps outside of its modules shall have contents.
    inputs, real = find_example(copied(False), example_input, reader)
    root, output = _calls(copied, inputs, False)
    found: Tensor | None
    found, head = find_logits(reader, root, output, num_classes, lambda: traced(False).output)
    by_shapes = found.is_meta
    if by_shapes:
        output, found = real, reader.logits_of(real)
        assert found is not None  # of the shapes it is not
    if head is None or not head.exact:
        picked = find_picked(lambda: copied(False), inputs, root, reader.logits_of, found.shape[1])
        head = picked or head
    if num_classes is None:
        refuse_scores_of_positions(
            lambda: copied(False), inputs, reader.logits_of, output, found.shape[1]
        )
    check_classifies(root, output, found, head, reader, num_classes, gradients)
    warn_of_activated(found, lambda: reader.logits_of(traced(False).output))
    training_root: Call | None = None
    training_output: Any = None
    try:
        training_root, training_output = _calls(copied, inputs, True)
    except Exception:  # it needs more than inputs there, targets say
        pass
    else:
        roots, outputs = (root, training_root), (output, training_output)
        learn_training_output(reader, roots, outputs, head, traced_soon)
        check_columns(reader, outputs)
    return Examined(
        inputs,
        root,
        training_root,
        reader,
        None if head is None else head.name,
        found.shape[1],
        by_shapes,
        root.settings if training_root is None else root.settings & training_root.settings,
        sequence_around(reader, output, training_output, lambda: traced_soon(True, ()).output),
    )


def _calls(
    copied: Callable[[bool, bool], nn.Module], inputs: Inputs, training: bool
) -> tuple[Call, Any]:
    """The calls of a forward, and its output: on the meta device if that will do."""
    try:
        with on_meta(inputs, True) as shapes:
            return call_tree(copied(training, True), shapes)
    except Exception:
        return call_tree(copied(training, False), inputs)
