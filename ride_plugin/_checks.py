"""What the losses ask of targets and class counts, and what they say when it is not so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ride_plugin._errors import ArgumentError

ClassCounts: TypeAlias = "Sequence[int] | Sequence[float] | np.ndarray | Tensor"


def check_class_counts(class_counts: ClassCounts) -> Tensor:
    """Return the class counts as a float64 CPU tensor ``[C]``, or say what is wrong with them."""
    try:
        counts = torch.as_tensor(class_counts).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            "Expected argument `class_counts` to be numbers, one for each class, but got "
            f"{type(class_counts).__name__}. Pass a list, an array or a tensor of length C."
        ) from error
    if counts.dim() != 1 or counts.numel() < 2:
        raise ArgumentError(
            "Expected argument `class_counts` to be one-dimensional with an entry for each of at "
            f"least two classes, but got shape {list(counts.shape)}."
        )
    wrong = (~(counts.isfinite() & (counts > 0))).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise ArgumentError(
            "Expected argument `class_counts` to be positive and finite, but got "
            f"{counts[first].item():g} for class {first} ({len(wrong)} such classes). Leave out "
            "classes without training samples, or count them as one."
        )
    return counts


def check_target(target: Tensor, batch: int, num_classes: int) -> None:
    """Check the form of a target: indices int64 ``[B]`` or probabilities ``[B, C]``.

    The range of indices is not looked at: that would read a value back from the device at every
    step, and the kernels that use an index raise by themselves; `explain_target` then says why.
    Probabilities are checked on the CPU, where nothing has to be waited for.
    """
    if not isinstance(target, Tensor):
        raise ArgumentError(
            "Expected argument `target` to be a tensor of class indices [B] or probabilities "
            f"[B, C], but got {type(target).__name__}."
        )
    if target.is_floating_point():
        if target.shape != (batch, num_classes):
            raise ArgumentError(
                "Expected argument `target`, being floating-point, to hold probabilities of shape "
                f"{[batch, num_classes]}, but got shape {list(target.shape)}. Class indices must "
                "be int64 of shape [B]."
            )
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_probabilities(target)
    elif target.shape != (batch,) or target.dtype == torch.bool or target.is_complex():
        raise ArgumentError(
            f"Expected argument `target` to be class indices of shape {[batch]} or floating-point "
            f"probabilities of shape {[batch, num_classes]}, but got {target.dtype} of shape "
            f"{list(target.shape)}."
        )


def explain_target(target: Tensor, num_classes: int, error: Exception) -> None:
    """After a failed lookup: raise a clear error if an index is out of range, else return."""
    if target.is_floating_point() or target.device.type != "cpu" or not target.numel():
        return
    lowest, highest = int(target.min()), int(target.max())
    if lowest < 0 or highest >= num_classes:
        raise ArgumentError(
            f"Expected argument `target` to hold class indices from 0 to {num_classes - 1}, but "
            f"got values from {lowest} to {highest}. Check that the model was built with as many "
            "classes as the data have, and drop samples without a label."
        ) from error


def _check_probabilities(target: Tensor) -> None:
    sums = target.detach().double().sum(dim=1)
    # Tolerant of rows that were mixed or smoothed in bfloat16.
    if not bool(((sums - 1).abs() < 0.02).all() & (target >= 0).all()):
        raise ArgumentError(
            "Expected argument `target`, being floating-point, to hold probabilities that are not "
            f"negative and sum to one in each row, but got sums from {sums.min().item():g} to "
            f"{sums.max().item():g} and values down to {target.min().item():g}. Pass class indices "
            "as int64, or apply softmax to logits first."
        )
