"""The cosine classifier."""

from __future__ import annotations

import math

import pytest
import torch

from ride_plugin.longtail import CosineClassifier


def test_logits_are_cosines_times_the_scale() -> None:
    head = CosineClassifier(3, 4, scale=7.0)
    x = torch.randn(2, 3)
    for row, logits in zip(x.tolist(), head(x).tolist(), strict=True):
        for weight, logit in zip(head.weight.tolist(), logits, strict=True):
            dot = sum(a * b for a, b in zip(row, weight, strict=True))
            assert logit == pytest.approx(
                7 * dot / math.hypot(*row) / math.hypot(*weight), abs=1e-5
            )


def test_features_that_autocast_rounded_give_logits_in_float32() -> None:
    head = CosineClassifier(16, 4)
    x = torch.randn(8, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = head(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, head(x.float()))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="`scale` to be positive"):
        CosineClassifier(3, 4, scale=scale)


def test_it_runs_without_contents_as_the_probe_of_a_build_does() -> None:
    with torch.device("meta"):
        logits = CosineClassifier(16, 4)(torch.empty(2, 16))
    assert logits.is_meta
    assert logits.shape == (2, 4)
