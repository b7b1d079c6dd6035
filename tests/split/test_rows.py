"""Which dimension of a value is the batch, and taking rows of it."""

from __future__ import annotations

import pytest
import torch

from ride_plugin import SplitError
from ride_plugin._split._rows import Rows, find_rows, take_rows
from ride_plugin._split._state import hollow


def test_the_dimension_that_scales_is_the_batch() -> None:
    assert find_rows("k", torch.rand(7, 2, 4), torch.rand(7, 3, 4), (2, 3)) == Rows(1, 1)
    assert find_rows("k", torch.rand(8, 4), torch.rand(12, 4), (2, 3)) == Rows(0, 4)
    assert find_rows("k", torch.rand(8, 4), torch.rand(8, 4), (2, 3)) is None


@pytest.mark.parametrize("shapes", [((2, 2), (3, 3)), ((2, 4), (5, 4)), ((2,), (3, 1))])
def test_ambiguity_is_an_error(shapes) -> None:
    with pytest.raises(SplitError, match=r"`windows` hands to the experts.*Pass `fork_at="):
        find_rows("windows", torch.rand(shapes[0]), torch.rand(shapes[1]), (2, 3))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_are_taken_in_the_layout_of_the_value(memory_format) -> None:
    value = torch.rand(5, 3, 4, 4).contiguous(memory_format=memory_format)
    rows = torch.tensor([4, 0, 0])
    taken = take_rows(value, Rows(0, 1), rows)
    assert torch.equal(taken, value[rows])
    assert taken.is_contiguous(memory_format=memory_format)


def test_rows_of_windows() -> None:
    value = torch.arange(12).view(6, 2)  # two windows for each of three samples
    taken = take_rows(value, Rows(0, 2), torch.tensor([2, 0]))
    assert torch.equal(taken, value[[4, 5, 0, 1]])
    along = take_rows(value.t(), Rows(1, 2), torch.tensor([1]))
    assert torch.equal(along, value.t()[:, 2:4])


def test_hollow_values_keep_taking_no_memory() -> None:
    taken = take_rows(hollow(torch.rand(5, 3)), Rows(0, 1), torch.tensor([1, 2]))
    assert taken.shape == (2, 3)
    assert taken.isnan().all()
    assert taken.stride() == (0, 0)
