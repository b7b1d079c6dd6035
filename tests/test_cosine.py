"""The cosine classifier."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from ride_plugin import ArgumentError
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


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, "30", None])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale: Any) -> None:
    with pytest.raises(ArgumentError, match="`scale` to be a finite number > 0"):
        CosineClassifier(3, 4, scale=scale)


@pytest.mark.parametrize("size", [0, 2.5, "3", None])
def test_a_size_that_is_no_number_of_features_or_classes_is_refused(size: Any) -> None:
    with pytest.raises(ArgumentError, match="`in_features` to be an integer >= 1"):
        CosineClassifier(size, 4)
    with pytest.raises(ArgumentError, match="`num_classes` to be an integer >= 1"):
        CosineClassifier(3, size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once_at_the_end(dtype: torch.dtype) -> None:
    """The norm of large features is infinite in half precision, and every logit was zero then."""
    head = CosineClassifier(512, 5).to(dtype)
    x = (3000 * torch.randn(4, 512, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = copy.deepcopy(head).double()(x.double())
    got = head(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert not head(torch.zeros(1, 512, dtype=dtype)).any()


def test_it_runs_without_contents_as_the_probe_of_a_build_does() -> None:
    with torch.device("meta"):
        logits = CosineClassifier(16, 4)(torch.empty(2, 16))
    assert logits.is_meta
    assert logits.shape == (2, 4)
