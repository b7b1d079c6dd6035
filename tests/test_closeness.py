"""Equal up to rounding, as a comparison entry by entry in float64 would say."""

import pytest
import torch

from ride_plugin._closeness import close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("largest", [1e-4, 1.0, 3e4])
def test_the_bound_is_in_units_of_the_largest_number(dtype: torch.dtype, largest: float) -> None:
    unit = torch.finfo(dtype).eps
    b = torch.tensor([largest, 0.0], dtype=torch.float64).to(dtype)
    near, far = (b + torch.tensor([0.0, k * unit * largest]).to(dtype) for k in (3, 5))
    high = b + torch.tensor([6 * unit * largest, 0.0]).to(dtype)  # once for itself, once beside it
    assert close(high, b, 4, scale=0.0)
    assert not close(b + torch.tensor([10 * unit * largest, 0.0]).to(dtype), b, 4, scale=0.0)
    assert close(near, b, 4, scale=0.0)
    assert not close(far, b, 4, scale=0.0)
    assert close(far, b, 4, scale=2 * largest)
    assert close(far, b, 4, scale=0.0, allowed=6 * unit * largest)


def test_units_are_never_everything() -> None:
    b = torch.ones(2, dtype=torch.bfloat16)
    assert not close(1.5 * b, b, units=1e3)


def test_another_shape_or_dtype_or_nothing_is_not_close() -> None:
    b = torch.ones(2)
    assert not close(None, b, 1)
    assert not close(b, None, 1)
    assert not close(b.double(), b, 1)
    assert not close(b[:1], b, 1)
    assert close(torch.ones(0), torch.ones(0), 1)


def test_integers_are_equal_or_not() -> None:
    b = torch.tensor([10**9, 3])
    assert close(b.clone(), b, 1e6)
    assert not close(b + 1, b, 1e6)


def test_a_nan_is_close_to_a_nan_at_most() -> None:
    b = torch.tensor([1.0, torch.nan])
    assert not close(b.clone(), b, 1)
    assert close(b.clone(), b, 1, equal_nan=True)
    assert not close(torch.ones(2), b, 1, equal_nan=True)


def test_without_a_number_of_units_half_of_the_digits_may_differ() -> None:
    for dtype, relative in ((torch.float32, 3.4e-4), (torch.float64, 1.49e-8)):
        b = torch.tensor([0.0, 8.0], dtype=dtype)
        step = torch.tensor([8 * relative, 0.0], dtype=dtype)
        assert close(b + step, b)
        assert not close(b + 1.1 * step, b)
