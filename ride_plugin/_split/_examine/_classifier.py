"""The classifier of a backbone: how it is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._closeness import close
from ride_plugin._inputs import Inputs, run_plainly
from ride_plugin._split._copying import trains
from ride_plugin._split._examine._probe import Call, address_of
from ride_plugin._tree import dotted


@dataclass(frozen=True)
class Head:
    """A module whose result is as large as the logits, or holds them.

    Attributes:
        name: its name in the backbone.
        exact: whether its result is the logits, or entries of it are, or its mean, and nothing else
            that is computed from it.
    """

    name: str
    exact: bool


def find_classifier(root: Call, logits: Tensor) -> Head | None:
    """The module with a weight matrix that returned the logits, else the last one that may have.

    None if there is none, for example where the class weights are used by a function call.
    """
    candidates = _candidates(root, logits)
    exact = [call for call in candidates if call.outputs[0][0] == address_of(logits)]
    # The innermost: a container returns what its last module does.
    around = exact[0] if exact else root
    leaves = [call for call in around.leaves if any(call is other for other in candidates)]
    if exact and (not exact[0].children or not leaves):
        return Head(exact[0].name, True)
    # One that is frozen beside others may be a copy of them, a moving average of the head say.
    leaves = [call for call in leaves if trains(call.module.parameters())] or leaves
    return Head(leaves[-1].name, False) if leaves else None


def find_picked(
    copied: Callable[[], nn.Module],
    inputs: Inputs,
    root: Call,
    logits_of: Callable[[Any], Tensor | None],
    num_classes: int,
) -> Head | None:
    """The last layer that classifies every token, frame or patch, if that gives the logits.

    The forward picks one result for each sample, or takes their mean. That is certain where it does
    so with numbers that are put in the place of the results as well.

    Args:
        copied: returns a copy of the backbone in evaluation mode.
        inputs: an example of two rows.
        root: the calls that they lead to.
        logits_of: takes the logits out of what the backbone returns.
        num_classes: ``C``.
    """

    def holding(names: list[str], change: Callable[[Tensor], Tensor]) -> list[str]:
        """Those layers whose results hold the logits when all results are changed."""
        backbone, results = copied(), dict[str, Tensor]()

        def changed(name: str, module: nn.Module, args: Any, result: Any) -> Any:
            if isinstance(result, Tensor):
                result = results[name] = change(result)
            return result

        for name in names:
            backbone.get_submodule(name).register_forward_hook(partial(changed, name))
        try:
            with torch.no_grad():
                logits = logits_of(run_plainly(backbone, inputs))
        except Exception:  # the forward may look at values, which are not those of a classifier
            return []
        return [n for n in names if n in results and _holds(results[n], logits)]

    calls = [call for call in root.leaves if _classifies_each(call, num_classes)]
    names = list(dict.fromkeys(call.name for call in calls))
    for name in reversed(holding(names, lambda result: result) if names else []):
        if holding([name], torch.randn_like):
            return Head(name, True)
    return None


def _classifies_each(call: Call, num_classes: int) -> bool:
    """Whether a layer has returned ``[B, ..., C]`` for ``[B, ..., D]``."""
    if call.shape is None or len(call.shape) < 3 or not call.inputs:
        return False
    *leading, in_features = call.inputs[0][1] or (0,)
    return (
        call.shape == (*leading, num_classes)
        and in_features_of(call.module, num_classes) == in_features
    )


def _holds(result: Tensor, logits: Tensor | None) -> bool:
    """Whether the logits of each row are one of its entries in the result, or their mean."""
    if logits is None or result.shape[:: result.dim() - 1] != logits.shape:
        return False
    entries = result.flatten(1, -2).to(logits.dtype)
    return bool((entries == logits[:, None]).all(2).any(1).all()) or close(
        entries.mean(1), logits, units=100, scale=0.0
    )


def used_by_function(
    root: Call, num_classes: int, gradients: Callable[[Sequence[str]], Sequence[Tensor | None]]
) -> bool:
    """Whether a matrix of a module that is never called has the weights of each class.

    Some may have as many rows or columns as there are features (a table of positions, learned
    queries), so that a gradient is asked: of one class it reaches the weights of no other.

    Args:
        root: the calls that lead to the logits.
        num_classes: ``C``.
        gradients: of the first column of the logits, by parameters with these names.
    """
    called = {id(call.module) for call in root.walk() if not call.children}
    axes = {
        dotted(path, name): [axis for axis, n in enumerate(sides) if n == num_classes]
        for path, module in root.module.named_modules()
        if id(module) not in called
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 2
        and num_classes in (sides := parameter.shape[: 1 if isinstance(module, nn.Linear) else 2])
    }
    try:
        found = gradients(list(axes)) if axes else []
    except Exception:  # no gradients: then nothing is known but the shape
        return True
    return any(
        gradient is not None
        and bool(gradient.any())
        and any(not gradient.narrow(axis, 1, num_classes - 1).any() for axis in axes[name])
        for name, gradient in zip(axes, found, strict=True)
    )


def innermost_candidates(root: Call, logits: Tensor) -> list[Call]:
    """The calls that logits of this size may have come from, without those around others."""
    candidates = _candidates(root, logits)
    return [
        call
        for call in candidates
        if not any(
            inner is other for inner in call.walk() for other in candidates if other is not call
        )
    ]


def _candidates(root: Call, logits: Tensor) -> list[Call]:
    return [
        call
        for call in root.walk()
        if call is not root
        and call.shape is not None
        and torch.Size(call.shape).numel() == logits.numel()
        and any(_is_weight(parameter) for parameter in call.module.parameters())
    ]


def _is_weight(parameter: Tensor) -> bool:
    """Whether a parameter mixes its inputs: a scale for each class, [1, C], does not."""
    return parameter.dim() > 1 and min(parameter.shape[0], parameter[0].numel()) > 1


def in_features_of(head: nn.Module, num_classes: int) -> int | None:
    """How many features a classifier takes, as far as its attributes tell."""
    in_features = getattr(head, "in_features", None)
    weight = getattr(head, "weight", None)
    if in_features is None and isinstance(weight, Tensor) and weight.dim() == 2:
        in_features = weight.shape[0] if weight.shape[1] == num_classes else weight.shape[1]
    return in_features if isinstance(in_features, int) else None
