"""Checks and conversions shared by the long-tail tools: every bad argument ends here, by name."""

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
from ride_plugin._checks import check_target

Numbers: TypeAlias = Sequence[int] | Sequence[float] | Tensor | NDArray[np.generic]
"""A list, tuple, array or tensor of numbers."""


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
