"""Whether a data set gives out the labels that were read from what it stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ride_plugin._contexts import random_state_kept
from ride_plugin._errors import ArgumentError

_SAMPLES = 8
_NAMES = ("label", "labels", "target", "targets")
_KNOWN = ("torch", "torchvision")  # whose data sets give out what they store


def refuse_other_labels(dataset: Any, labels: Tensor) -> None:
    """Look at a few samples, of different classes, where somebody's own code makes them.

    A ``__getitem__`` may merge classes or draw wrong labels, of which what is stored says nothing.
    A sample that cannot be read, or in which no label is found, says nothing either.

    Raises:
        ArgumentError: a sample gives out another label than was read.
    """
    if not any(map(_is_made_by_hand, _sets_in(dataset))):
        return
    first: dict[int, int] = {}
    for index, label in enumerate(labels.tolist()):
        if index != label:  # else an index in the sample may be taken for the label
            first.setdefault(label, index)
    with random_state_kept(torch.empty(0, device="cpu")):
        for label, index in sorted(first.items())[:_SAMPLES]:
            try:
                given = {*_whole_numbers(dataset[index])}
            except Exception:  # whatever the user's own code raises: a file is not there, say
                return
            others = given - {index}
            if others and label not in given:
                raise ArgumentError(
                    f"Expected argument `dataset` to give out the labels that it stores, but "
                    f"sample {index} comes with {min(others)}, and {label} was read from its "
                    "`targets`, `labels` or the data set inside: a `__getitem__` changes them. "
                    "Pass labels=[the class that every sample comes with]."
                )


def _sets_in(dataset: Any) -> Iterator[Any]:
    """A data set and those that it is made of."""
    yield dataset
    inside: Sequence[Any] = ()
    if isinstance(dataset, Subset):
        inside = [dataset.dataset]
    elif isinstance(dataset, ConcatDataset):
        inside = dataset.datasets
    for part in inside:
        yield from _sets_in(part)


def _is_made_by_hand(dataset: Any) -> bool:
    for cls in type(dataset).__mro__:
        if "__getitem__" in vars(cls):
            return cls.__module__.partition(".")[0] not in _KNOWN
    return False


def _whole_numbers(sample: Any) -> Iterator[int]:
    """What may be the label in a sample: beside the image there may be others, or an index."""
    if isinstance(sample, Mapping):
        values = [sample[name] for name in _NAMES if name in sample]
    else:
        values = list(sample[1:]) if isinstance(sample, tuple | list) else []
    for value in values:
        if isinstance(value, Tensor | np.ndarray | np.generic):
            if np.prod(value.shape) == 1:
                value = value.item()
            elif len(value.shape) == 1 and [x for x in value.tolist() if x != 0] == [1]:
                value = int(value.argmax())  # one-hot
        if isinstance(value, int) and not isinstance(value, bool):
            yield value
