"""Long-tailed subsets of any labelled data set."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from ride_plugin._checks import (
    Numbers,
    as_cpu_tensor,
    as_labels,
    check_choice,
    check_instance,
    check_integer,
    check_number,
    refuse,
)
from ride_plugin._errors import ArgumentError
from ride_plugin.longtail._given_labels import refuse_other_labels

Profile = Literal["exp", "step"]


def long_tailed_counts(
    num_classes: int, max_count: int, imbalance_factor: float, profile: Profile = "exp"
) -> list[int]:
    r"""Images per class of a long-tailed data set, class 0 the most frequent.

    With M images in class 0 and imbalance factor $\rho$,

    $$n_c = \lfloor M \rho^{-c / (C - 1)} \rfloor \quad\text{(exp)}, \qquad
    n_c = M \text{ if } c < \lfloor C / 2 \rfloor \text{ else } \lfloor M / \rho \rfloor
    \quad\text{(step)}$$

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019, section 4 (CIFAR-LT); the formula, with its rounding, is the field's common one.

    Args:
        num_classes: C.
        max_count: images of the most frequent class.
        imbalance_factor: largest over smallest count, at least 1 (CIFAR-LT: 10, 50, 100, 200).
        profile: ``"exp"`` or ``"step"``.

    Returns:
        C counts, none rising.

    Raises:
        ArgumentError: a number is out of range, or the rarest class would have no image.

    Example:
        >>> long_tailed_counts(5, 100, 50)
        [100, 37, 14, 5, 2]
        >>> long_tailed_counts(5, 100, 50, "step")
        [100, 100, 2, 2, 2]
    """
    num_classes = check_integer(num_classes, "num_classes", 1)
    max_count = check_integer(max_count, "max_count", 1)
    imbalance_factor = check_number(
        imbalance_factor,
        "imbalance_factor",
        1,
        advice="It is the largest class count over the smallest: 100 where other code says 0.01.",
    )
    rarest = 1 / imbalance_factor
    if check_choice(profile, "profile", get_args(Profile)) == "exp":
        last = max(num_classes - 1, 1)
        counts = [int(max_count * rarest ** (c / last)) for c in range(num_classes)]
        if num_classes > 1:  # a division: the product's rounding may fall below a whole number
            counts[-1] = int(max_count / imbalance_factor)
    else:
        head = num_classes // 2
        counts = [max_count] * head + [int(max_count / imbalance_factor)] * (num_classes - head)
    if counts[-1] < 1:
        raise ArgumentError(
            f"Expected argument `imbalance_factor` to leave an image in the rarest class, but got "
            f"{imbalance_factor:g} with {max_count} images at most. Pass at most {max_count}."
        )
    return counts


def long_tailed_indices(
    labels: Numbers,
    imbalance_factor: float = 100,
    *,
    profile: Profile = "exp",
    max_count: int | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices of a long-tailed part of a data set; which images stay is drawn at random.

    Args:
        labels: class of every image, ``[N]``, classes 0 .. C-1, each of them present.
        imbalance_factor: see :func:`long_tailed_counts`.
        profile: see :func:`long_tailed_counts`.
        max_count: images of class 0; the smallest class's size if None, which always suffices and
            is the common choice for a balanced data set.
        seed: of the draw.
        generator: draws in place of ``seed``, a generator on the CPU.

    Returns:
        Ascending int64 indices, as many as the counts' sum.

    Raises:
        ArgumentError: a class has fewer images than asked for, or an argument is out of range.

    Example:
        >>> long_tailed_indices([0, 0, 0, 0, 1, 1, 1, 1], 4).shape
        torch.Size([5])
    """
    classes = as_labels(labels)
    available = classes.bincount()
    smallest = int(available.min())
    limit = smallest if max_count is None else check_integer(max_count, "max_count", 1)
    seed = check_integer(seed, "seed", -(2**63), 2**64 - 1)  # what torch takes
    if generator is not None:
        check_instance(generator, "generator", torch.Generator, "a torch.Generator")
    if smallest == 0:
        raise ArgumentError(
            "Expected argument `labels` to have at least one image of each class 0 .. "
            f"{len(available) - 1}, but got none of class {int(available.argmin())}. Number the "
            "classes without gaps."
        )
    counts = long_tailed_counts(len(available), limit, imbalance_factor, profile)
    for c, (wanted, there) in enumerate(zip(counts, available.tolist(), strict=True)):
        if wanted > there:
            raise ArgumentError(
                f"Expected argument `labels` to have {wanted} images of class {c}, but got "
                f"{there}. Lower `max_count` (max_count=None takes {smallest})."
            )
    if generator is None:
        generator = torch.Generator().manual_seed(seed)
    kept = []
    for c, count in enumerate(counts):
        members = (classes == c).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator, device=generator.device)
        kept.append(members[order[:count].to(members.device)])
    return torch.cat(kept).sort().values


class LongTailedSubset(Subset[Any]):
    """Long-tailed part of a labelled data set, usable wherever the data set is.

    The same seed gives the same images. Make the *training* set long-tailed and leave the test set
    as it is.

    Attributes:
        class_counts: images per class, a list of C numbers.
        labels: ``[N]`` int64, class of every image of the subset; for ClassBalancedSampler.

    Example:
        >>> x, y = torch.zeros(200, 3), torch.arange(200) % 4
        >>> data = LongTailedSubset(torch.utils.data.TensorDataset(x, y), 10)
        >>> data.class_counts, len(data)
        ([50, 23, 10, 5], 88)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        imbalance_factor: float = 100,
        *,
        labels: Numbers | None = None,
        profile: Profile = "exp",
        max_count: int | None = None,
        seed: int = 0,
    ) -> None:
        """Choose the images.

        Args:
            dataset: any map-style data set.
            imbalance_factor: see :func:`long_tailed_counts`.
            labels: class of every image; read from the data set's ``targets`` or ``labels``, or
                from the second tensor of a TensorDataset, if None; those of the sets behind a
                Subset (``random_split``) or a ConcatDataset. A ``target_transform`` of the data set
                is applied to what is read, which may be names then. Where ``__getitem__`` is
                somebody's own, a few samples are asked for the label that they give out.
            profile: see :func:`long_tailed_counts`.
            max_count: see :func:`long_tailed_indices`.
            seed: of the draw.

        Raises:
            ArgumentError: no labels are found, samples give out others, their number does not
                fit, or a class has too few images.
        """
        found = labels is None
        classes = as_labels(_labels_of(dataset) if labels is None else labels)
        if not hasattr(dataset, "__len__"):
            refuse("dataset", "a map-style data set, with a length", dataset)
        size = len(dataset)
        if len(classes) != size:
            raise ArgumentError(
                f"Expected argument `labels` to have one entry for each of the data set's {size} "
                f"samples, but got {len(classes)}. Pass labels in the data set's order."
            )
        if found:
            refuse_other_labels(dataset, classes)
        indices = long_tailed_indices(
            classes, imbalance_factor, profile=profile, max_count=max_count, seed=seed
        )
        super().__init__(dataset, indices.tolist())
        self.labels = classes[indices]
        self.class_counts: list[int] = self.labels.bincount().tolist()


def _labels_of(dataset: Dataset[Any]) -> Numbers:
    stored = _stored_in(dataset)
    transform = getattr(dataset, "target_transform", None)
    return stored if transform is None else _transformed(stored, transform)


def _stored_in(dataset: Dataset[Any]) -> Numbers:
    for name in ("targets", "labels"):
        found: Numbers | None = getattr(dataset, name, None)
        if found is not None:
            return found
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return tuple(dataset.tensors)[1]
    if isinstance(dataset, Subset):
        chosen = as_cpu_tensor(dataset.indices, "dataset.indices").long()
        return as_cpu_tensor(_labels_of(dataset.dataset), "labels")[chosen]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([as_cpu_tensor(_labels_of(part), "labels") for part in dataset.datasets])
    raise ArgumentError(
        "Expected argument `dataset` to have its classes in `targets` or `labels`, but got "
        f"{type(dataset).__name__} without. Pass labels=[the class of every sample]."
    )


def _transformed(labels: Any, transform: Any) -> list[Any]:
    """Labels of any kind, names too, as torchvision's data sets give them out with a sample."""
    try:
        stored = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        return [transform(label) for label in stored]
    except Exception as error:
        raise ArgumentError(
            "Expected argument `dataset` to have classes that its `target_transform` maps to "
            f"numbers, but that failed with {type(error).__name__}: {error}. Pass labels=[the "
            "class of every sample]."
        ) from error
