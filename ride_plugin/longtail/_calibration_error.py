"""Expected calibration error."""

from __future__ import annotations

import numpy as np

from ride_plugin._checks import Numbers, as_cpu_tensor, check_integer
from ride_plugin._errors import ArgumentError


def expected_calibration_error(confidence: Numbers, correct: Numbers, num_bins: int = 15) -> float:
    r"""Gap between confidence and accuracy, averaged over bins of equal width.

    $$\text{ECE} = \sum_b \frac{|B_b|}{N} \left| \text{acc}(B_b) - \text{conf}(B_b) \right|$$

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3: bin b
    of K holds confidences in ``((b - 1) / K, b / K]``.

    Args:
        confidence: ``[N]``, probability of the predicted class, in ``[0, 1]``.
        correct: ``[N]``, whether the prediction is right.
        num_bins: K (the common choice: 15).

    Returns:
        A number in ``[0, 1]``.

    Raises:
        ArgumentError: shapes do not fit, there is no sample, or a confidence is no probability.

    Example:
        >>> round(expected_calibration_error([0.9, 0.9], [True, False]), 6)
        0.4
    """
    num_bins = check_integer(num_bins, "num_bins", 1, advice="The common choice is 15.")
    confident = as_cpu_tensor(confidence, "confidence").double().numpy()
    right = as_cpu_tensor(correct, "correct").double().numpy()
    if confident.ndim != 1 or confident.shape != right.shape or not len(confident):
        raise ArgumentError(
            "Expected arguments `confidence` and `correct` to be [N] each with N > 0, but got "
            f"shapes {list(confident.shape)} and {list(right.shape)}. Pass one entry per sample."
        )
    # A softmax may exceed 1 by rounding.
    if not bool(np.all((confident >= 0) & (confident <= 1 + 1e-6))):
        raise ArgumentError(
            "Expected argument `confidence` to hold probabilities in [0, 1], but got values from "
            f"{confident.min():g} to {confident.max():g}. Pass the largest softmax probability."
        )
    if not bool(np.isin(right, (0, 1)).all()):
        raise ArgumentError(
            "Expected argument `correct` to hold True or False (1 or 0), but got values from "
            f"{right.min():g} to {right.max():g}. Pass `predicted == target`."
        )
    # Edges are divided out: 0.07 * 100 is above 7 by rounding, and would be in the next bin.
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confident, side="left")
    gaps = np.bincount(bins, weights=right - confident, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confident))
