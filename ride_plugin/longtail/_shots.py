"""Accuracy by shot: overall, many, medium, few, and each class."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from ride_plugin._checks import (
    ClassCounts,
    Numbers,
    as_cpu_tensor,
    as_labels,
    check_bool,
    check_class_counts,
    check_classes,
    check_predictions,
)
from ride_plugin._distributed import of_all_ranks, running
from ride_plugin._errors import ArgumentError
from ride_plugin._output import ExpertOutput, without_experts
from ride_plugin.longtail._splits import (
    SPLITS,
    BySplit,
    by_split,
    mean_by_split,
    shot_groups,
    shown,
)


@dataclass(frozen=True)
class ShotReport:
    """Top-1 accuracy by shot. Print it for a table.

    Accuracies are averages over **samples**: of the whole test set, or of the test samples whose
    class is in the split. On a balanced test set this is also the average over classes; on an
    unequal one the two differ, and ``class_mean`` gives the latter. None stands for a split
    without test samples.

    Attributes:
        overall: accuracy over all test samples.
        many: over those of many-shot classes (training images above ``cutoffs[0]``).
        medium: over those of medium-shot classes.
        few: over those of few-shot classes (training images below ``cutoffs[1]``).
        class_mean: the same four numbers as averages over the classes that have test samples.
        cutoffs: ``(many, few)``.
        class_counts: training images of each class.
        num_samples: test samples of each class.
        num_correct: correctly predicted test samples of each class.
    """

    overall: float
    many: float | None
    medium: float | None
    few: float | None
    class_mean: BySplit
    cutoffs: tuple[float, float]
    class_counts: tuple[float, ...]
    num_samples: tuple[int, ...]
    num_correct: tuple[int, ...]

    @property
    def per_class(self) -> tuple[float | None, ...]:
        """Accuracy of each class; None where the test set has no sample of it."""
        pairs = zip(self.num_correct, self.num_samples, strict=True)
        return tuple(right / n if n else None for right, n in pairs)

    @property
    def split_classes(self) -> dict[str, int]:
        """Number of classes in each split, whether tested or not."""
        groups = shot_groups(self.class_counts, *self.cutoffs)
        return {name: int((groups == g).sum()) for g, name in enumerate(SPLITS)}

    @property
    def split_samples(self) -> dict[str, int]:
        """Number of test samples in each split."""
        groups = shot_groups(self.class_counts, *self.cutoffs)
        tested = np.array(self.num_samples)
        return {name: int(tested[groups == g].sum()) for g, name in enumerate(SPLITS)}

    def per_class_csv(self, path: str | PathLike[str]) -> None:
        """Write one line per class: class, split, training images, test images, correct, accuracy.

        The accuracy of a class without test images is left empty.
        """
        groups = shot_groups(self.class_counts, *self.cutoffs)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "split", "train", "test", "correct", "accuracy"])
            rows = zip(
                (SPLITS[g] for g in groups),
                (f"{n:.15g}" for n in self.class_counts),
                self.num_samples,
                self.num_correct,
                ("" if a is None else f"{a:.6g}" for a in self.per_class),
                strict=True,
            )
            writer.writerows([c, *row] for c, row in enumerate(rows))

    def __str__(self) -> str:
        many, few = (f"{x:g}" for x in self.cutoffs)
        labels = ["overall", f"many (n > {many})", f"medium ({few} <= n <= {many})"]
        labels.append(f"few (n < {few})")
        classes, samples = self.split_classes, self.split_samples
        sizes = [(len(self.class_counts), sum(self.num_samples))]
        sizes += [(classes[name], samples[name]) for name in SPLITS]
        accuracies = (self.overall, self.many, self.medium, self.few)
        lines = [f"{'split':<24} {'classes':>7} {'samples':>8} {'top-1':>7} {'class mean':>11}"]
        for label, (c, n), top, mean in zip(
            labels, sizes, accuracies, self.class_mean, strict=True
        ):
            lines.append(f"{label:<24} {c:>7} {n:>8} {shown(top):>7} {shown(mean):>11}")
        return "\n".join(lines)


def shot_report(
    output: Numbers | ExpertOutput,
    target: Numbers,
    class_counts: ClassCounts,
    *,
    many: float = 100,
    few: float = 20,
    over_ranks: bool = True,
) -> ShotReport:
    """Compute accuracy overall, by many, medium and few shot, and by class.

    Where ``torch.distributed`` is initialised, every rank calls this with its own samples, and
    gets the report of all of them.

    Args:
        output: logits or probabilities ``[N, C]``, an ``ExpertOutput``, or predicted classes
            ``[N]`` (integers).
        target: ``[N]`` true classes.
        class_counts: **training** images per class, ``[C]``, positive.
        many: classes with more training images than this are many-shot.
        few: classes with fewer training images than this are few-shot.
        over_ranks: False for the report of these samples alone, which one rank may ask for.

    Returns:
        A :class:`ShotReport`, whose docstring says which averages are taken.

    Raises:
        ArgumentError: shapes do not fit, a label is out of range, a row of logits names no class,
            or the cut-offs cross.

    Example:
        >>> report = shot_report([0, 0, 1, 2], [0, 1, 1, 2], [500, 50, 30])
        >>> report.many, report.medium, report.few
        (1.0, 0.6666666666666666, None)
        >>> print(report)
        split                    classes  samples   top-1  class mean
        overall                        3        4   0.750       0.833
        many (n > 100)                 1        1   1.000       1.000
        medium (20 <= n <= 100)        2        3   0.667       0.750
        few (n < 20)                   0        0  absent      absent
    """
    counts = check_class_counts(class_counts)
    shared = check_bool(over_ranks, "over_ranks") and running()
    truth = as_labels(target, "target", len(counts), empty=shared)
    predicted = _predictions(output, len(truth), len(counts))
    groups = shot_groups(counts, many, few)
    tables = np.stack(
        [
            np.bincount(labels.numpy(), minlength=len(counts))
            for labels in (truth, truth[predicted == truth])
        ]
    )
    if shared:
        tables = np.sum(of_all_ranks(tables, "shot_report"), axis=0)
    num_samples, num_correct = tables
    tested = num_samples > 0
    if not tested.any():
        raise ArgumentError(
            "Expected argument `target` to hold at least one sample on one of the ranks, but it is "
            "empty on each."
        )
    masks = [tested, *(tested & (groups == group) for group in range(3))]
    top = [num_correct[m].sum() / num_samples[m].sum() if m.any() else None for m in masks]
    by_sample = by_split([None if value is None else float(value) for value in top])
    return ShotReport(
        overall=by_sample.overall,
        many=by_sample.many,
        medium=by_sample.medium,
        few=by_sample.few,
        class_mean=mean_by_split(num_correct[tested] / num_samples[tested], groups[tested]),
        cutoffs=(many, few),
        class_counts=tuple(counts.tolist()),
        num_samples=tuple(num_samples.tolist()),
        num_correct=tuple(num_correct.tolist()),
    )


def _predictions(output: Numbers | ExpertOutput, num_samples: int, num_classes: int) -> Tensor:
    values = as_cpu_tensor(without_experts(output), "output")
    if not num_samples and not values.numel():  # this rank has none
        return values.flatten().long()
    if values.is_floating_point() and list(values.shape) == [num_samples, num_classes]:
        check_predictions(values, "argument `output`")
        return values.argmax(1)
    integral = not (values.is_floating_point() or values.is_complex())
    if integral and values.dtype != torch.bool and list(values.shape) == [num_samples]:
        check_classes(values, "output", num_classes)
        return values.long()
    raise ArgumentError(
        f"Expected argument `output` to be logits [{num_samples}, {num_classes}] or predicted "
        f"classes [{num_samples}], as `target` and `class_counts` have it, but got shape "
        f"{list(values.shape)} and dtype {values.dtype}. Pass the ensemble's logits."
    )
