"""Bias and variance of classifiers trained on resampled data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ride_plugin._checks import (
    ClassCounts,
    Numbers,
    as_indices,
    as_labels,
    check_class_counts,
    check_classes,
    refuse,
)
from ride_plugin.longtail._splits import BySplit, Ints, mean_by_split, shot_groups


@dataclass(frozen=True)
class BiasVariance:
    """Bias, variance and error of a set of models, by split.

    Attributes:
        bias: share of samples that the main prediction gets wrong.
        variance: how often a single model departs from the main prediction.
        error: how often a single model is wrong; the mean over models.
        main_prediction: the majority's class of each sample.
        num_models: M.
    """

    bias: BySplit
    variance: BySplit
    error: BySplit
    main_prediction: tuple[int, ...]
    num_models: int

    def __str__(self) -> str:
        rows = (("bias", self.bias), ("variance", self.variance), ("error", self.error))
        lines = [f"{name:<9} {value}" for name, value in rows]
        return "\n".join([f"{self.num_models} models", *lines])


def main_prediction(predictions: Ints) -> Ints:
    """Return the most frequent class of each sample, ``[M, N]`` -> ``[N]``; ties: the lowest class.

    Example:
        >>> main_prediction(np.array([[0, 2], [1, 2], [1, 0]])).tolist()
        [1, 2]
    """
    # Votes are counted per pair of models, so memory does not grow with the number of classes.
    votes = sum((predictions == row).astype(np.int64) for row in predictions)
    most = votes == np.max(votes, axis=0)
    result: Ints = np.where(most, predictions, np.iinfo(np.int64).max).min(axis=0)
    return result


def bias_variance(
    predictions: Numbers,
    target: Numbers,
    class_counts: ClassCounts,
    *,
    many: float = 100,
    few: float = 20,
) -> BiasVariance:
    r"""Split the error of M models into bias and variance, by many, medium and few shot.

    With $y_m(x)$ the prediction of model m and $\bar y(x)$ the main (most frequent)
    one,

    $$\text{bias} = \mathbb{E}_x [\bar y(x) \ne y], \qquad
    \text{variance} = \mathbb{E}_x \frac{1}{M} \sum_m [y_m(x) \ne \bar y(x)]$$

    Source: Domingos, "A Unified Bias-Variance Decomposition", ICML 2000 (zero-one loss), used in
    Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR
    2021. For zero-one loss the error is **not** their sum: where the main prediction is
    wrong, a departure from it may be right.

    Args:
        predictions: ``[M, N]`` integer classes; model m was trained on its own random draw of the
            training set (the paper: 20 draws).
        target: ``[N]`` true classes.
        class_counts: training images per class, ``[C]``, of one draw.
        many: see :func:`shot_report`.
        few: see :func:`shot_report`.

    Returns:
        A :class:`BiasVariance`.

    Raises:
        ArgumentError: fewer than two models, shapes do not fit, or a class is out of range.

    Example:
        >>> print(bias_variance([[0, 1], [0, 0], [0, 0]], [0, 1], [200, 50]))
        3 models
        bias      overall 0.500, many 0.000, medium 1.000, few absent
        variance  overall 0.167, many 0.000, medium 0.333, few absent
        error     overall 0.333, many 0.000, medium 0.667, few absent
    """
    counts = check_class_counts(class_counts)
    labels = as_labels(target, "target", len(counts)).numpy()
    stacked = as_indices(predictions, "predictions", "M", len(labels))
    if len(stacked) < 2:
        refuse("predictions", f"those of at least two models, [M, {len(labels)}]", stacked)
    check_classes(stacked, "predictions", len(counts))
    models = stacked.numpy()
    main = main_prediction(models)
    groups = shot_groups(counts, many, few)[labels]
    return BiasVariance(
        bias=mean_by_split(main != labels, groups),
        variance=mean_by_split((models != main).mean(0), groups),
        error=mean_by_split((models != labels).mean(0), groups),
        main_prediction=tuple(main.tolist()),
        num_models=len(models),
    )
