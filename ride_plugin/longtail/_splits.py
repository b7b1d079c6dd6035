"""Many-, medium- and few-shot classes, and averages over them that never turn into NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ride_plugin._checks import ClassCounts, check_class_counts, check_no_shares, check_number
from ride_plugin._errors import ArgumentError

Ints: TypeAlias = NDArray[np.int64]

SPLITS = ("many", "medium", "few")


def shot_groups(class_counts: ClassCounts, many: float = 100, few: float = 20) -> Ints:
    """Return for each class 0 (many-shot), 1 (medium-shot) or 2 (few-shot).

    Many-shot classes have more than ``many`` training images, few-shot classes fewer than ``few``,
    medium-shot classes the rest: with the defaults n > 100, 20 <= n <= 100, n < 20, after Liu et
    al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019.

    Raises:
        ArgumentError: a count is not positive, the cut-offs are not ``0 <= few <= many``, or all
            counts are shares, below one, while the cut-offs are not.

    Example:
        >>> shot_groups([101, 100, 20, 19]).tolist()
        [0, 1, 1, 2]
    """
    counts = check_class_counts(class_counts)
    many, few = check_number(many, "many", 0), check_number(few, "few", 0)
    if few > many:
        raise ArgumentError(
            "Expected arguments `many` and `few` to satisfy 0 <= few <= many, but got "
            f"many={many:g} and few={few:g}. The field's cut-offs are many=100, few=20."
        )
    numbers = (check_no_shares(counts) if many >= 1 else counts).numpy()
    groups: Ints = np.where(numbers > many, 0, np.where(numbers < few, 2, 1))
    return groups


@dataclass(frozen=True)
class BySplit:
    """One quantity over all samples and over the samples of many-, medium- and few-shot classes.

    A split without a sample is None: absent, not zero and not NaN.

    Attributes:
        overall: mean over all samples.
        many: mean over the samples of many-shot classes.
        medium: the same, medium-shot.
        few: the same, few-shot.

    Example:
        >>> print(BySplit(0.5, 0.75, None, 0.25))
        overall 0.500, many 0.750, medium absent, few 0.250
    """

    overall: float
    many: float | None
    medium: float | None
    few: float | None

    def __iter__(self) -> Iterator[float | None]:
        """Yield overall, many, medium, few."""
        return iter((self.overall, self.many, self.medium, self.few))

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {shown(value)}" for name, value in zip(("overall", *SPLITS), self, strict=True)
        )


def shown(value: float | None) -> str:
    """Return the number as reports print it."""
    return "absent" if value is None else f"{value:.3f}"


def masks_by_split(sample_groups: Ints) -> list[NDArray[np.bool_]]:
    """Return which samples count in overall, many, medium and few."""
    return [np.ones(len(sample_groups), dtype=bool), *(sample_groups == g for g in range(3))]


def mean_by_split(values: NDArray[np.generic], sample_groups: Ints) -> BySplit:
    """Average one number per sample over all samples and within each split.

    Args:
        values: ``[N]``.
        sample_groups: ``[N]``, the :func:`shot_groups` entry of each sample's class.
    """
    means = [
        float(values[mask].astype(np.float64).mean()) if mask.any() else None
        for mask in masks_by_split(sample_groups)
    ]
    return by_split(means)


def by_split(values: list[float | None]) -> BySplit:
    """Return the four values, overall first, as a :class:`BySplit`; overall must be there."""
    overall, many, medium, few = values
    assert overall is not None
    return BySplit(overall, many, medium, few)
