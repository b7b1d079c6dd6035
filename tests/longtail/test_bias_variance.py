from collections import Counter

import numpy as np
import pytest
import torch

from ride_plugin import RIDEError
from ride_plugin.longtail import bias_variance

COUNTS = [300, 60, 4, 3]
SPLIT = ["many", "medium", "few", "few"]


def naive(predictions, target):
    """Bias, variance and error of every sample, by loops; ties go to the lowest class."""
    rows = []
    for n, label in enumerate(target):
        votes = [model[n] for model in predictions]
        counts = Counter(votes)
        main = min(c for c in counts if counts[c] == max(counts.values()))
        rows.append(
            (
                main,
                float(main != label),
                sum(v != main for v in votes) / len(votes),
                sum(v != label for v in votes) / len(votes),
            )
        )
    return rows


@pytest.mark.parametrize("num_models", [2, 5, 20])
def test_equals_the_definition_by_loops(num_models: int) -> None:
    generator = np.random.default_rng(num_models)
    target = generator.integers(4, size=50)
    noise = generator.integers(4, size=(num_models, 50))
    predictions = np.where(generator.random((num_models, 50)) < 0.5, target, noise)
    result = bias_variance(predictions, target, COUNTS)
    rows = naive(predictions.tolist(), target.tolist())
    assert list(result.main_prediction) == [row[0] for row in rows]
    for k, name in enumerate(("bias", "variance", "error"), start=1):
        for split in ("overall", "many", "medium", "few"):
            chosen = [
                row[k]
                for row, t in zip(rows, target, strict=True)
                if split in ("overall", SPLIT[t])
            ]
            got = getattr(getattr(result, name), split)
            assert got == pytest.approx(sum(chosen) / len(chosen)), (name, split)


def test_equal_models_have_no_variance_and_their_error_is_bias() -> None:
    predictions = torch.tensor([[0, 1, 1, 3]]).repeat(4, 1)
    result = bias_variance(predictions, [0, 1, 2, 3], COUNTS)
    assert list(result.variance) == [0.0] * 4
    assert list(result.bias) == list(result.error) == [0.25, 0.0, 0.0, 0.5]


def test_absent_splits_are_none_and_printed_as_absent() -> None:
    result = bias_variance([[0, 0], [0, 1]], [0, 1], COUNTS)
    assert result.bias.few is None
    assert str(result).splitlines()[1].endswith("few absent")


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([[0, 1]], r"at least two models.*\[1, 2\]"),
        ([0, 1], r"`predictions`.*\[2\]"),
        ([[0, 1, 1], [0, 1, 1]], r"integers \[M, 2\].*\[2, 3\]"),
        ([[0.0, 1.0], [0.0, 1.0]], r"integer.*float64"),
        ([[0, 1], [0, 4]], "`predictions`.*0 to 3.*to 4"),
    ],
)
def test_bad_input_is_named(predictions, message: str) -> None:
    with pytest.raises(RIDEError, match=message):
        bias_variance(predictions, [0, 1], COUNTS)
