"""Every check of an argument: what is asked of it, and what is said when it is not so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ride_plugin._errors import ArgumentError

Numbers: TypeAlias = Sequence[int] | Sequence[float] | Tensor | NDArray[np.generic]
"""A list, tuple, array or tensor of numbers."""

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


def as_cpu_tensor(values: object, name: str) -> Tensor:
    """Return ``values`` as a detached tensor on the CPU, whatever kind of array they came in."""
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"Expected argument `{name}` to be a tensor, an array or a list of numbers, but got "
            f"{type(values).__name__}. Pass e.g. a torch tensor."
        ) from error


def as_weight(weight: Numbers, num_classes: int | None = None) -> Tensor:
    """Return class weights as float32 ``[C]`` on the CPU; none negative, not all zero."""
    # A copy: reweighting writes into it, and the caller may keep the tensor.
    values = as_cpu_tensor(weight, "weight").float().clone()
    good = values.dim() == 1 and len(values) > 0 and (num_classes in (None, len(values)))
    if not good or not bool(values.isfinite().all() & (values >= 0).all() & values.any()):
        wanted = "[C]" if num_classes is None else f"[{num_classes}]"
        raise ArgumentError(
            f"Expected argument `weight` to be finite, non-negative class weights {wanted}, but "
            f"got shape {list(values.shape)} with values {values.flatten()[:4].tolist()}.... "
            "Pass e.g. effective_number_weights(class_counts)."
        )
    return values


def as_labels(labels: Numbers, name: str = "labels", num_classes: int | None = None) -> Tensor:
    """Return integer labels ``[N]`` as int64 on the CPU, checked against ``num_classes``."""
    values = as_cpu_tensor(labels, name)
    if values.dim() != 1 or len(values) == 0 or values.is_floating_point() or values.is_complex():
        raise ArgumentError(
            f"Expected argument `{name}` to be integer class labels [N] with N > 0, but got shape "
            f"{list(values.shape)} and dtype {values.dtype}. Pass one class index per sample."
        )
    values = values.long()
    check_label_range(values, name, num_classes)
    return values


def check_label_range(labels: Tensor, name: str, num_classes: int | None) -> None:
    """Raise unless every label is in ``0 .. num_classes - 1``; for CPU tensors, it reads values."""
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or (num_classes is not None and high >= num_classes):
        top = "" if num_classes is None else f" .. {num_classes - 1}"
        raise ArgumentError(
            f"Expected argument `{name}` to hold class labels 0{top}, but got labels from {low} to "
            f"{high}. Check the label mapping and the number of classes."
        )


def check_logits_target(
    logits: Tensor, target: Tensor, num_classes: int | None, *, soft: bool = True
) -> None:
    """Raise unless ``logits`` are ``[B, C]`` and ``target`` is ``[B]``, or ``[B, C]`` if soft.

    Values are read on the CPU only and never while compiling: on an accelerator the read would
    stop the queue at every step, and an index out of range raises in the kernel anyway.
    """
    shape = list(logits.shape)
    if logits.dim() != 2 or 0 in shape or not logits.is_floating_point():
        raise ArgumentError(
            f"Expected argument `logits` to be floating point [B, C], but got shape {shape} and "
            f"dtype {logits.dtype}. For a wrapped model's experts, use experts_loss(criterion, "
            "output, target)."
        )
    if num_classes is not None and shape[1] != num_classes:
        raise ArgumentError(
            f"Expected argument `logits` to have {num_classes} classes, as the loss was built for, "
            f"but got shape {shape}. Build the loss from counts of the model's own classes."
        )
    if target.is_floating_point() and soft:
        check_target(target, shape[0], shape[1])
    elif target.dtype == torch.int64 and list(target.shape) == shape[:1]:
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            check_label_range(target, "target", shape[1])
    else:
        wanted = f"int64 [{shape[0]}]" + (f" or probabilities {shape}" if soft else "")
        hint = (
            "For mixed labels, add two losses: lam * loss(logits, a) + (1 - lam) * loss(logits, b)."
            if target.is_floating_point()
            else "Convert class indices with .long()."
        )
        raise ArgumentError(
            f"Expected argument `target` to be {wanted}, but got shape {list(target.shape)} and "
            f"dtype {target.dtype}. {hint}"
        )


def check_number(
    value: float, name: str, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """Return ``value`` as float if ``low <= value < high`` (``low < value`` if ``open_low``)."""
    fine = isinstance(value, Real) and (value > low if open_low else value >= low)
    if not fine or not value < high:
        raise ArgumentError(
            f"Expected argument `{name}` to be a number {'>' if open_low else '>='} {low:g}"
            f"{'' if math.isinf(high) else f' and < {high:g}'}, but got {value!r}. "
            f"Choose `{name}` in that range."
        )
    return float(value)
