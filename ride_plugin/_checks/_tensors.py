"""Checks of tensors and of what becomes one: class counts, weights, labels, targets, logits.

A function here returns the argument in the form that the caller computes with, as those of
``_single`` do for single numbers.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ride_plugin._checks._single import as_python, check_number, refuse, shown
from ride_plugin._checks._values import are_probabilities, is_finite, may_read, rows_sum_to_one
from ride_plugin._errors import ArgumentError, warn_caller

Numbers: TypeAlias = Sequence[int] | Sequence[float] | Tensor | NDArray[np.generic]
"""A list, tuple, array or tensor of numbers."""

ClassCounts: TypeAlias = Numbers | Mapping[int, int] | Mapping[int, float]
"""Training samples of each class, in the order of class indices or with them as keys."""

NO_INDEX = torch.iinfo(torch.int64).min
"""For ``ignore_index``, whose default would leave out targets of -100 where nothing is read."""


def check_floating(value: object, name: str, *shape: int | str, advice: str = "") -> Tensor:
    """Return a floating-point tensor of this shape: a number is a size, a letter stands for any.

    A leading ``"..."`` allows any further dimensions.
    """
    sizes = shape[1:] if shape[:1] == ("...",) else shape
    if isinstance(value, Tensor) and value.is_floating_point():
        found = tuple(value.shape)
        if len(sizes) < len(shape):
            found = found[-len(sizes) :]
        if len(found) == len(sizes) and all(
            isinstance(size, str) or size == there for size, there in zip(sizes, found, strict=True)
        ):
            return value
    expected = f"a floating-point tensor [{', '.join(map(str, shape))}]"
    refuse(name, expected, value, advice)


def check_temperature(value: Tensor | float, size: int) -> Tensor | float:
    """Return a positive number, or a tensor of such, 0-dimensional or ``[size]``."""
    if not isinstance(value, Tensor):
        return check_number(value, "temperature", 0, open_low=True)
    return check_temperatures(value, *([size] if value.dim() else []))


def check_temperatures(value: Tensor, *shape: int | str) -> Tensor:
    """Return a tensor of temperatures, all positive and finite on the CPU and not in a graph."""
    check_floating(value, "temperature", *shape)
    if value.numel() and may_read(value):
        low, high = (float(bound) for bound in value.detach().aminmax())
        if not 0 < low <= high < math.inf:  # NaN is both bounds, if there is one
            raise ArgumentError(
                "Expected argument `temperature` to hold positive finite numbers, but got values "
                f"from {low:g} to {high:g}. functional.class_temperatures returns such."
            )
    return value


def check_class_counts(class_counts: ClassCounts, name: str = "class_counts") -> Tensor:
    """Return the class counts as a float64 CPU tensor ``[C]``, in the order of class indices.

    What names its classes by keys (a dict, a Counter, a pandas Series such as ``value_counts()``
    returns, which is ordered by frequency) is ordered by them.
    """
    counts = as_cpu_tensor(_by_class(class_counts, name), name)
    if counts.dim() != 1 or len(counts) < 2 or counts.is_complex() or counts.dtype == torch.bool:
        refuse(
            name,
            "one-dimensional, a number for each of at least two classes",
            counts,
            "Pass a list, an array or a tensor of length C.",
        )
    counts = counts.to(torch.float64)
    wrong = (~(counts.isfinite() & (counts > 0))).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise ArgumentError(
            f"Expected argument `{name}` to be positive and finite, but got "
            f"{counts[first].item():g} for class {first} ({len(wrong)} such classes). Leave out "
            "classes without training samples, or count them as one."
        )
    return counts


def check_no_shares(counts: Tensor) -> Tensor:
    """Return class counts whose scale matters, unless they are frequencies: all below one."""
    if bool((counts < 1).all()):
        raise ArgumentError(
            "Expected argument `class_counts` to hold numbers of samples, but got values from "
            f"{counts.min().item():g} to {counts.max().item():g}, like shares of them. Pass "
            "numbers of samples, not shares."
        )
    return counts


def check_target(
    target: object,
    batch: int,
    num_classes: int,
    *,
    soft: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """Return a target: class indices as int64 ``[B]``, or probabilities ``[B, C]`` if ``soft``.

    It has to lie on the ``device`` of what it is compared with, if that is given.
    The range of indices is left to `check_classes`, since some losses have an index to ignore.
    Probabilities are checked on the CPU, where nothing has to be waited for.
    """
    target = check_target_form(target, batch, num_classes, soft=soft, device=device)
    if target.is_floating_point() and may_read(target):
        _check_probabilities(target)
    return target


def check_target_form(
    target: object,
    batch: int,
    num_classes: int,
    *,
    soft: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """Return a target as `check_target` does, whatever numbers stand in it."""
    if isinstance(target, Tensor) and device is not None and target.device != device:
        refuse("target", f"on {device}, as the logits are", target, f"It is on {target.device}.")
    if isinstance(target, Tensor) and not target.is_complex() and target.dtype != torch.bool:
        if not target.is_floating_point() and target.shape == (batch,):
            return target.long()
        if target.is_floating_point() and soft and target.shape == (batch, num_classes):
            return target
    expected, advice = f"a tensor of class indices [{batch}]", "Pass one int64 index a sample."
    if soft:
        expected += f" or floating-point probabilities [{batch}, {num_classes}]"
    elif isinstance(target, Tensor) and target.is_floating_point():
        advice = "For mixed labels add two losses: lam * loss(z, a) + (1 - lam) * loss(z, b)."
    refuse("target", expected, target, advice)


def check_classes(labels: Tensor, name: str, num_classes: int | None = None) -> None:
    """Raise unless every label is in ``0 .. num_classes - 1``, on the CPU and not in a graph.

    On an accelerator the read would stop the queue at every step; there the kernels that use an
    index out of range raise by themselves.
    """
    if labels.is_floating_point() or not labels.numel() or not may_read(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        top = "on" if num_classes is None else f"to {num_classes - 1}"
        raise ArgumentError(
            f"Expected argument `{name}` to hold class indices from 0 {top}, but got values from "
            f"{low} to {high}. Check that the model, and class counts if they were passed, have as "
            "many classes as the data, and drop samples without a label."
        )


def check_logits_target(
    logits: Tensor, target: Tensor, num_classes: int | None, *, soft: bool = True
) -> Tensor:
    """Return the target as `check_target` does, if ``logits`` are ``[B, C]`` and fit."""
    columns: int | str = "C" if num_classes is None else num_classes
    advice = "For a wrapped model's experts, use experts_loss(criterion, output, target)."
    if isinstance(logits, Tensor) and logits.dim() == 2 and num_classes is not None:
        advice = f"The loss was built from counts of {num_classes} classes: pass the model's own."
    check_floating(logits, "logits", "B", columns, advice=advice)
    batch, classes = logits.shape
    if not batch or not classes:
        refuse("logits", "of at least one sample and class", logits)
    target = check_target(target, batch, classes, soft=soft, device=logits.device)
    check_classes(target, "target", classes)
    return target


def check_predictions(logits: Tensor, name: str) -> None:
    """Raise if some sample's logits ``[..., C]`` name no class, on the CPU and not in a graph.

    The largest logit is NaN if one is, +inf if one is, and -inf only if all classes are masked.
    On an accelerator the read would stall the device.
    """
    if not logits.numel() or not may_read(logits):
        return
    broken = ~logits.amax(dim=-1).isfinite()
    if bool(broken.any()):
        raise ArgumentError(
            f"Expected {name} to be free of NaN and +inf, with at least one class that is not -inf "
            f"for every sample, but got such in {int(broken.sum())} of {broken.numel()} rows. "
            "Stage one has probably diverged: look at its loss, or skip the bad samples."
        )


def check_numbers(values: Tensor, name: str) -> None:
    """Raise if a tensor holds NaN or an infinite value, on the CPU and not in a graph."""
    if not is_finite(values):
        raise ArgumentError(
            f"Expected {name} to be free of NaN and infinite values, but "
            f"{int((~values.isfinite()).sum())} of {values.numel()} are such. The training has "
            "probably diverged: look at its loss, or skip the bad samples."
        )


def check_least(values: Tensor, name: str, low: float) -> None:
    """Raise unless all values are finite and at least ``low``, on the CPU and not in a graph."""
    if may_read(values) and not bool((values.isfinite() & (values >= low)).all()):
        raise ArgumentError(
            f"Expected argument `{name}` to hold finite numbers >= {low}, but got values from "
            f"{values.min().item():g} to {values.max().item():g}."
        )


def as_cpu_tensor(values: object, name: str) -> Tensor:
    """Return ``values`` as a detached tensor on the CPU, whatever kind of array they came in.

    Python's own floats keep all their digits, where torch would make float32 of a list of them.
    """
    if isinstance(values, Tensor) and values.is_meta:
        refuse(name, "numbers", values, "It is on the meta device, where it has no values.")
    try:
        if not isinstance(values, Tensor) and hasattr(values, "__array__"):  # pandas and others too
            # torch takes no reversed array and warns of one that cannot be written.
            values = np.require(np.asarray(values), requirements=["C", "W"])
        tensor = torch.as_tensor(values, device="cpu")
        if tensor.is_floating_point() and not isinstance(values, Tensor | np.ndarray):
            tensor = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        # torch knows hardly an operation on these.
        wide_unsigned = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)
        return tensor.long() if wide_unsigned else tensor.detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentError(
            f"Expected argument `{name}` to be a tensor, an array or a list of numbers, but got "
            f"{shown(values)}. Pass e.g. a torch tensor."
        ) from error


def as_weight(weight: Numbers, num_classes: int | None = None) -> Tensor:
    """Return class weights as float32 ``[C]`` on the CPU; none negative, not all zero."""
    values = as_cpu_tensor(_by_class(weight, "weight"), "weight")
    good = values.dim() == 1 and len(values) > 0 and (num_classes in (None, len(values)))
    good = good and not (values.is_complex() or values.dtype == torch.bool)
    if not good or not bool(values.isfinite().all() & (values >= 0).all() & values.any()):
        wanted = "[C]" if num_classes is None else f"[{num_classes}]"
        refuse(
            "weight",
            f"finite, non-negative class weights {wanted}, not all of them zero",
            values,
            "Pass e.g. effective_number_weights(class_counts).",
        )
    # A copy: reweighting writes into it, and the caller may keep the tensor.
    return values.float().clone()


def as_indices(values: object, name: str, *shape: int | str) -> Tensor:
    """Return integers of this shape as int64 on the CPU; a letter stands for any size but zero."""
    tensor = as_cpu_tensor(values, name)
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    fits = tensor.dim() == len(shape) and all(
        there > 0 if isinstance(size, str) else there == size
        for size, there in zip(shape, tensor.shape, strict=True)
    )
    if not whole or not fits:
        expected = f"integers [{', '.join(map(str, shape))}], at least one of them"
        refuse(name, expected, tensor, "Pass one for each sample.")
    return tensor.long()


def as_labels(
    labels: Numbers, name: str = "labels", num_classes: int | None = None, *, empty: bool = False
) -> Tensor:
    """Return integer labels ``[N]`` as int64 on the CPU, checked against ``num_classes``.

    With ``empty``, there may be none of them: another rank may have some.
    """
    if empty and not as_cpu_tensor(labels, name).numel():
        return torch.empty(0, dtype=torch.long, device="cpu")
    values = as_indices(labels, name, "N")
    check_classes(values, name, num_classes)
    return values


def warn_of_probabilities(logits: Tensor, name: str) -> bool:
    """Warn if logits are probabilities, on the CPU and not in a graph.

    Returns:
        Whether the values were at hand, so that a loss need not look again.
    """
    if not may_read(logits):
        return False
    if are_probabilities(logits):
        warn_caller(
            f"The rows of argument `{name}` sum to one, as probabilities do, but logits are "
            "expected: a softmax of probabilities is nearly flat, and a prior that is added to "
            "them outweighs them. Pass what the model returns before its softmax, or the "
            "logarithm of the probabilities, `p.log()`."
        )
    return True


def _check_probabilities(target: Tensor) -> None:
    if not rows_sum_to_one(target) or not bool((target >= 0).all()):
        sums = target.detach().double().sum(dim=1)
        raise ArgumentError(
            "Expected argument `target`, being floating-point, to hold probabilities that are not "
            f"negative and sum to one in each row, but got sums from {sums.min().item():g} to "
            f"{sums.max().item():g} and values down to {target.min().item():g}. Pass class indices "
            "as int64, or apply softmax to logits first."
        )


def _by_class(values: object, name: str) -> object:
    """One value for each class, in the order of class indices if they come with keys."""
    keyed = values
    to_dict = getattr(values, "to_dict", None)
    if callable(to_dict) and getattr(values, "ndim", None) == 1:  # a pandas Series
        keyed = to_dict()
    if not isinstance(keyed, Mapping):
        return values
    size = len(values)  # type: ignore[arg-type]
    if len(keyed) != size or set(keyed) != set(range(size)):
        raise ArgumentError(
            f"Expected argument `{name}` to have the class indices from 0 on as its keys, each "
            f"once, but got {size} entries with keys {reprlib.repr(list(keyed))}. Pass a list in "
            "the order of class indices: [value_of_class_0, value_of_class_1, ...]."
        )
    return [as_python(keyed[c]) for c in range(size)]
